package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

const (
	balancePrompt = "Enter token balance:"
	bpmPrompt     = "\nEnter a new BPM:"

	// maxLine is the longest line in bytes, its end not counted.
	maxLine = 64

	// maxBPM has 15 digits, which every reader of JSON keeps exactly. Its type
	// makes the build fail where an int cannot hold it.
	maxBPM int = 999_999_999_999_999

	// maxQueue bounds the messages that are queued for a slow client.
	maxQueue = 64

	// maxRefusals bounds the clients that are being refused since the server is full.
	maxRefusals = 100

	// writeBuffer bounds in bytes what the kernel holds for a client that reads slowly;
	// Linux takes twice as much. Left to itself Linux would hold 4 MB.
	writeBuffer = 256 << 10

	balanceLimit  = 10 * time.Minute       // from connecting to a token balance
	stallInterval = time.Second            // between two checks whether a client takes what is written
	stallChecks   = 10                     // a client that takes no byte in so many checks in a row is reset
	announceStep  = 25 * time.Millisecond  // the step of flushAll for a draw
	broadcastStep = 500 * time.Millisecond // and for the chain, which takes longer to write
	lingerLimit   = time.Second            // from the last line to the reset
	stopLimit     = 2 * time.Second        // from the stop to the reset of connections that are still being written to
)

var (
	errInterrupted = errors.New("it was interrupted by telnet's Ctrl-C")
	errClosing     = errors.New("the server has closed it")
	errStalled     = fmt.Errorf("it took nothing for %v", stallChecks*stallInterval)
	errQueueFull   = fmt.Errorf("it is %d messages behind", maxQueue)
)

// isSlowClient reports whether err says that a client was too slow and was reset.
func isSlowClient(err error) bool { return err == errStalled || err == errQueueFull }

// A server accepts the validators of one lottery and sends them its results.
//
// Lock order: the server's mutex, then a socket's, then the lottery's.
type server struct {
	lottery       *lottery
	maxValidators int
	log           *log.Logger

	mu       sync.Mutex // guards the following
	clients  []*client  // connected, or disconnected with a stake in the round
	refusals int        // clients that are being refused since the server is full

	open sync.WaitGroup // counts connections
}

// A client is a connection and, once it has staked, its validator.
type client struct {
	socket
	index     int        // in the server's clients; guarded by the server's mutex
	validator *validator // nil until the stake; set once, under the server's mutex
}

func newServer(lottery *lottery, maxValidators int, logger *log.Logger) *server {
	return &server{
		lottery:       lottery,
		maxValidators: maxValidators,
		log:           logger,
	}
}

// serve accepts clients until ctx is done, then tells all of them that the server is
// shutting down and returns when their connections are closed. An Accept that fails is
// retried after 5 ms, then each time after twice as long, up to a second: what was
// missing, such as a file descriptor, may be free by then.
func (s *server) serve(ctx context.Context, listener net.Listener) {
	defer context.AfterFunc(ctx, func() { listener.Close() })()
	var delay time.Duration
	for ctx.Err() == nil {
		conn, err := listener.Accept()
		if err == nil {
			delay = 0
			s.accept(ctx, conn.(tcpConn))
		} else if ctx.Err() == nil {
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			s.log.Printf("cannot accept a connection, trying again in %v: %v", delay, err)
			select {
			case <-time.After(delay):
			case <-ctx.Done():
			}
		}
	}

	s.eachClient(func(c *client) { c.conn.SetReadDeadline(time.Now()) }) // its reader finds ctx done
	defer time.AfterFunc(stopLimit, func() { s.eachClient(func(c *client) { c.reset() }) }).Stop()
	s.open.Wait()
}

// eachClient calls f with each client. The server's mutex is held meanwhile.
func (s *server) eachClient(f func(c *client)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.clients {
		f(c)
	}
}

// accept starts to serve a client, if there is room for it.
func (s *server) accept(ctx context.Context, conn tcpConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(s.clients) < s.maxValidators:
		c := &client{socket: socket{conn: conn}, index: len(s.clients)}
		conn.SetWriteBuffer(writeBuffer)
		conn.SetReadDeadline(time.Now().Add(balanceLimit)) // before serve can set another
		s.clients = append(s.clients, c)
		s.open.Add(1)
		go s.handleConn(ctx, c)
	case s.refusals < maxRefusals:
		s.refusals++
		s.open.Add(1)
		go s.refuse(conn)
	default:
		conn.Close()
	}
}

// refuse tells a client that there is no room for it.
func (s *server) refuse(conn tcpConn) {
	c := socket{conn: conn}
	c.finish("server full, try again later\n", func() {
		s.mu.Lock()
		s.refusals--
		s.mu.Unlock()
		s.open.Done()
	})
}

// handleConn serves a client until it has staked.
func (s *server) handleConn(ctx context.Context, c *client) {
	c.reply(balancePrompt)
	var err error
	for err == nil && c.validator == nil {
		var line []byte
		if line, err = c.readLine(); err == nil {
			err = s.stake(c, line)
		}
	}
	var bad badLine
	switch {
	case err == nil:
		// This goroutine's stack has grown to 4 kB by now, and the runtime would not shrink
		// it during a Read. A new one starts with 2 kB, which is enough for BPMs.
		go s.handleBPMs(ctx, c)
	case errors.As(err, &bad):
		s.close(ctx, c, fmt.Sprintf("token balance must be a whole number from 1 to %d, %v\n", maxStake, bad))
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.close(ctx, c, fmt.Sprintf("\nno token balance within %v\n", balanceLimit))
	default:
		s.close(ctx, c, "")
	}
}

// stake makes the client a validator, to which all results are sent from now on. A line
// that is no token balance is an error, a badLine.
func (s *server) stake(c *client, line []byte) error {
	if len(line) == 0 {
		c.reply(balancePrompt)
		return nil
	}
	stake, err := parseNumber(line, 1, maxStake)
	if err != nil {
		return err
	}
	c.conn.SetReadDeadline(time.Time{})
	v, validators, tokens := s.lottery.join(int64(stake))
	s.mu.Lock()
	c.validator = v
	s.mu.Unlock()
	s.log.Printf("validator %s joins with %d tokens; validators: %d, tokens: %d", v.address, stake, validators, tokens)
	c.reply("validator %s stakes %d tokens\n%s", v.address, stake, bpmPrompt)
	return nil
}

// handleBPMs serves a validator from its stake until its connection is closed.
func (s *server) handleBPMs(ctx context.Context, c *client) {
	var err error
	for err == nil && ctx.Err() == nil {
		var line []byte
		if line, err = c.readLine(); err == nil {
			err = s.propose(c, line)
		}
	}
	s.leave(ctx, c, err)
}

// propose proposes a block with the BPM in the line. The reply repeats the BPM: if a
// message arrives while the user is typing, the terminal still sends what was typed
// before it. A line that is no BPM is an error, a badLine.
func (s *server) propose(c *client, line []byte) error {
	if len(line) == 0 {
		c.reply(bpmPrompt)
		return nil
	}
	bpm, err := parseNumber(line, -maxBPM, maxBPM)
	if err != nil {
		return err
	}
	p := s.lottery.propose(c.validator, bpm)
	replies := c.replyBuffer()
	r := append(replies.AvailableBuffer(), "block "...) // without fmt, which needs a larger stack
	r = strconv.AppendInt(r, int64(p.index), 10)
	if !p.added {
		r = append(r, " already"...)
	}
	r = append(r, " proposed with BPM "...)
	r = strconv.AppendInt(r, int64(p.bpm), 10)
	r = append(r, ": "...)
	r = strconv.AppendInt(r, c.validator.stake, 10)
	r = append(r, " of "...)
	r = strconv.AppendInt(r, p.tokens, 10)
	r = append(r, " tokens so far, draw in "...)
	r = append(r, p.drawIn.Round(time.Second).String()...)
	replies.Write(append(r, "\n"+bpmPrompt...))
	return nil
}

// leave ends the session of a validator that sends no more BPMs: err is a badLine, which
// disqualifies it, or why it has disconnected.
func (s *server) leave(ctx context.Context, c *client, err error) {
	lastLine := ""
	var bad badLine
	if errors.As(err, &bad) {
		s.lottery.disqualify(c.validator)
		s.log.Printf("validator %s dropped: its BPM was %q; it forfeits its %d tokens", c.validator.address, string(bad), c.validator.stake)
		lastLine = fmt.Sprintf("BPM must be a whole number of at most 15 digits, %v: %d staked tokens forfeited\n", bad, c.validator.stake)
	} else if ctx.Err() == nil {
		s.disconnect(ctx, c, err)
	}
	s.close(ctx, c, lastLine)
}

// disconnect waits for the draw that the validator's stake and block stay in. That draw
// is still announced to a client that has only closed its sending half. err is why there
// are no more BPMs.
func (s *server) disconnect(ctx context.Context, c *client, err error) {
	how := "disconnects"
	if isSlowClient(err) {
		how = fmt.Sprintf("dropped: %v", err)
	}
	s.log.Printf("validator %s %s; its stake counts until the next draw", c.validator.address, how)
	c.mu.Lock() // so that nothing is enqueued after the disconnect and before c.removed is set
	c.removed = s.lottery.disconnect(c.validator)
	c.mu.Unlock()
	c.flush()
	if err == errInterrupted {
		c.conn.CloseWrite()
	}
	select {
	case <-c.removed:
	case <-ctx.Done():
	}
	if dropped := c.acquire(); dropped != err && isSlowClient(dropped) {
		s.log.Printf("validator %s dropped: %v", c.validator.address, dropped)
	}
}

// close ends the connection of a client, after its last line if that is not empty.
func (s *server) close(ctx context.Context, c *client, lastLine string) {
	if ctx.Err() != nil {
		lastLine = "\nserver shutting down\n"
	}
	c.finish(lastLine, s.open.Done)
	s.mu.Lock()
	defer s.mu.Unlock()
	last := len(s.clients) - 1
	s.clients[c.index] = s.clients[last]
	s.clients[c.index].index = c.index
	s.clients = slices.Delete(s.clients, last, last+1)
}

// announce sends the winner of a draw to all validators. tokens are all that were in it.
func (s *server) announce(winner *validator, tokens int64) {
	text := func(you string) *message {
		return &message{pieces: [][]byte{fmt.Appendf(nil, "\nwinning validator: %s%s with %d of %d tokens\n%s",
			winner.address, you, winner.stake, tokens, bpmPrompt)}}
	}
	toAll, toWinner := text(""), text(" (you)")
	s.flushAll(announceStep, s.enqueueAll(func(c *client) *message {
		if c.validator == winner {
			return toWinner
		}
		return toAll
	}))
}

// broadcast sends the chain to all validators. It does not wait until it is written.
func (s *server) broadcast(chain [][]byte) {
	m := &message{
		pieces:  slices.Concat([][]byte{[]byte("\n[")}, chain, [][]byte{[]byte("]\n" + bpmPrompt)}),
		isChain: true,
	}
	go s.flushAll(broadcastStep, s.enqueueAll(func(*client) *message { return m }))
}

// enqueueAll enqueues a message for every validator, without waiting, and returns
// their clients.
func (s *server) enqueueAll(messageFor func(c *client) *message) (validators []*client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	validators = make([]*client, 0, len(s.clients))
	for _, c := range s.clients {
		if c.validator != nil {
			c.enqueue(messageFor(c))
			validators = append(validators, c)
		}
	}
	return validators
}

// flushAll writes what is queued for the clients. It returns when each of them has been
// written to or is being written to, so that draws do not get ahead of their announcements.
//
// A few workers write, since the stacks of ten thousand goroutines would stay with
// the process. A client that takes nothing blocks its worker, so after each step
// flushAll starts more of them, twice as many as the last time: a dozen steps are enough
// if 10,000 clients block. A worker ends when there is no client left for it.
func (s *server) flushAll(step time.Duration, clients []*client) {
	if len(clients) == 0 {
		return
	}
	var next atomic.Int64
	started := make(chan struct{}) // closed when the last client's worker has started
	work := func() {
		for i := next.Add(1); i <= int64(len(clients)); i = next.Add(1) {
			if i == int64(len(clients)) {
				close(started)
			}
			clients[i-1].tryFlush()
		}
	}
	for workers := runtime.GOMAXPROCS(0); ; workers *= 2 {
		for range workers {
			go work()
		}
		select {
		case <-started:
			return
		case <-time.After(step):
		}
	}
}

// A message is text for several clients, which share its bytes.
type message struct {
	pieces  [][]byte
	isChain bool // a broadcast of the chain
}

// A tcpConn is what a socket needs of a net.TCPConn.
type tcpConn interface {
	net.Conn
	CloseWrite() error
	SetLinger(sec int) error
	SetWriteBuffer(bytes int) error
}

// A socket reads a client's lines and writes replies and messages to it, in the
// way of ergo's irc/socket.go:
//
//  1. One goroutine at a time is the writer. At first it is the reader. Before the reader
//     waits for input, it flushes its replies and gives up being the writer; before it
//     handles the input, it becomes the writer again. So the server stops reading from
//     a client that does not read its replies.
//  2. enqueue never waits. The writer writes what is queued, in that order, after
//     its replies.
//  3. At most maxQueue messages are queued, and of the chain's broadcasts one.
//  4. No goroutine but the reader stays when everything is written.
type socket struct {
	conn    tcpConn
	replies *bytes.Buffer // not yet written; nil if there are none; belongs to the writer

	mu          sync.Mutex // guards the following; never held during a write
	queue       []*message
	err         error           // why nothing can be enqueued any more
	idle        chan struct{}   // made by acquire while it waits; closed when there is no writer
	removed     <-chan struct{} // set when the client sends no more; once it is closed, nothing is enqueued
	released    bool            // there is no writer; false at first, since the reader is
	chainQueued bool            // a broadcast of the chain is queued or being written

	// The following belong to the reader.
	telnet   telnetState
	handled  uint8 // bytes of input that have been returned as lines
	received uint8 // bytes of input in all
	input    [maxLine + len("\r\n")]byte
}

// A badLine is an error: a line that is not the number that was asked for, cut to
// maxLine bytes.
type badLine string

func (b badLine) Error() string { return fmt.Sprintf("got %q", string(b)) }

// parseNumber returns the number in the line, from low to high, or else a badLine.
func parseNumber(line []byte, low, high int) (int, error) {
	number, err := strconv.ParseInt(string(line), 10, 64)
	if err != nil || number < int64(low) || number > int64(high) {
		return 0, badLine(line)
	}
	return int(number), nil
}

// readLine returns the next line without its end and the blanks around it; it is
// valid until the next call. The last line needs no end. A line longer than maxLine
// is a badLine. Before readLine waits for the client it flushes, and afterwards it
// becomes the writer again.
func (s *socket) readLine() ([]byte, error) {
	for {
		line, _, ended := bytes.Cut(s.input[s.handled:s.received], []byte("\n"))
		switch {
		case ended:
			s.handled += uint8(len(line) + 1)
			return checkLine(line)
		case len(line) == len(s.input):
			return checkLine(line)
		case s.telnet == telnetInterrupt:
			return nil, errInterrupted
		}
		s.received = uint8(copy(s.input[:], line))
		s.handled = 0

		s.flush()
		n, err := s.conn.Read(s.input[s.received:])
		s.received += uint8(s.telnet.strip(s.input[s.received:][:n]))
		if lost := s.acquire(); lost != nil {
			return nil, lost
		}
		if err == io.EOF && len(bytes.TrimSuffix(s.input[:s.received], []byte("\r"))) > 0 {
			s.handled = s.received
			return checkLine(s.input[:s.received])
		}
		if err != nil {
			return nil, err
		}
	}
}

// checkLine returns the line without a carriage return at its end and without the blanks
// around it, or a badLine if it is longer than maxLine.
func checkLine(line []byte) ([]byte, error) {
	length := len(bytes.TrimSuffix(line, []byte("\r")))
	line = bytes.TrimSpace(line)
	if length > maxLine {
		return nil, badLine(line[:min(len(line), maxLine)])
	}
	return line, nil
}

// telnetState says where in a telnet command the input is (RFC 854).
type telnetState byte

const (
	telnetText           telnetState = iota
	telnetCommand                    // after IAC
	telnetOption                     // after IAC WILL, WONT, DO or DONT
	telnetSubnegotiation             // after IAC SB
	telnetSubCommand                 // after IAC in a subnegotiation
	telnetInterrupt                  // after IAC IP or IAC BRK; the end
)

const (
	telnetSE   = 240 // end of subnegotiation
	telnetBRK  = 243 // break
	telnetIP   = 244 // interrupt process: Ctrl-C
	telnetSB   = 250 // subnegotiation
	telnetWILL = 251 // the first of WILL, WONT, DO and DONT
	telnetIAC  = 255 // interpret as command
)

// strip removes telnet's commands from p, and what follows an interrupt. It returns
// how many bytes are left.
func (t *telnetState) strip(p []byte) (n int) {
	if *t == telnetText && bytes.IndexByte(p, telnetIAC) < 0 {
		return len(p)
	}
	for _, b := range p {
		switch state := *t; {
		case state == telnetText && b != telnetIAC, state == telnetCommand && b == telnetIAC:
			*t = telnetText
			p[n] = b
			n++
		case state == telnetText:
			*t = telnetCommand
		case state == telnetCommand && (b == telnetIP || b == telnetBRK), state == telnetInterrupt:
			*t = telnetInterrupt
		case state == telnetCommand && b >= telnetWILL:
			*t = telnetOption
		case state == telnetCommand && b == telnetSB, state == telnetSubCommand && b != telnetSE:
			*t = telnetSubnegotiation
		case state == telnetSubnegotiation && b == telnetIAC:
			*t = telnetSubCommand
		case state != telnetSubnegotiation: // the command is complete
			*t = telnetText
		}
	}
	return n
}

// replyBuffers are shared by all sockets, since few have replies to write at the same time.
var replyBuffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// replyBuffer returns the buffer of the replies. The caller is the writer.
func (s *socket) replyBuffer() *bytes.Buffer {
	if s.replies == nil {
		s.replies = replyBuffers.Get().(*bytes.Buffer)
	}
	return s.replies
}

// reply adds to the replies. The caller is the writer.
func (s *socket) reply(format string, args ...any) {
	fmt.Fprintf(s.replyBuffer(), format, args...)
}

// enqueue queues a message for whoever flushes next. If the queue is full, the connection
// is reset; a broadcast of the chain is left out instead.
func (s *socket) enqueue(m *message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.removed:
		return
	default:
	}
	full := len(s.queue) == maxQueue
	switch {
	case s.err != nil, m.isChain && (full || s.chainQueued):
		return
	case full:
		s.failLocked(errQueueFull)
		return
	case s.removed != nil && !m.isChain: // a client that sends no more needs no prompt
		m = &message{pieces: [][]byte{bytes.TrimSuffix(m.pieces[0], []byte(bpmPrompt))}}
	}
	s.queue = append(s.queue, m)
	s.chainQueued = s.chainQueued || m.isChain
}

// acquire waits until there is no writer and makes the caller the writer. Its
// error says why nothing can be written any more.
func (s *socket) acquire() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.released {
		idle := make(chan struct{})
		s.idle = idle
		s.mu.Unlock()
		<-idle
		s.mu.Lock()
	}
	s.released = false
	return s.err
}

// flush writes the replies and all that is queued, also what is queued meanwhile.
// The caller must be the writer; when flush returns, it no longer is.
func (s *socket) flush() {
	var err error
	if s.replies != nil {
		err = s.write(s.replies.Bytes())
		s.replies.Reset()
		replyBuffers.Put(s.replies)
		s.replies = nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flushQueueLocked(err)
}

// tryFlush writes all that is queued. If there is a writer already, tryFlush returns at
// once, since that one will write it.
func (s *socket) tryFlush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.released {
		s.released = false
		s.flushQueueLocked(nil)
	}
}

// flushQueueLocked writes all that is queued, unless err says that a write has failed
// already. The caller must be the writer; when flushQueueLocked returns it no longer is.
// s.mu must be held; it is released during writes.
func (s *socket) flushQueueLocked(err error) {
	for len(s.queue) > 0 && err == nil {
		m := s.queue[0]
		s.queue = slices.Delete(s.queue, 0, 1)
		s.mu.Unlock()
		for i := 0; i < len(m.pieces) && err == nil; i++ {
			err = s.write(m.pieces[i])
		}
		s.conn.SetWriteDeadline(time.Time{}) // else a broadcast would leave the timers of all clients
		s.mu.Lock()
		if m.isChain {
			s.chainQueued = false
		}
	}
	if err != nil {
		s.failLocked(err)
	}
	s.released = true
	if s.idle != nil {
		close(s.idle)
		s.idle = nil
	}
}

// write writes the data and leaves a deadline set, which the next write moves. The caller
// must be the writer. The client may take the data as slowly as it likes, but if it takes
// nothing in stallChecks checks in a row, write fails with errStalled. Checks are counted,
// rather than time, so that a pause of the whole process costs no client its connection.
func (s *socket) write(data []byte) error {
	for stalled := 0; len(data) > 0; {
		s.conn.SetWriteDeadline(time.Now().Add(stallInterval))
		n, err := s.conn.Write(data)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		data = data[n:]
		if stalled++; n > 0 {
			stalled = 0
		}
		if stalled == stallChecks {
			return errStalled
		}
	}
	return nil
}

// failLocked resets the connection because of the error, which wakes its reader.
// s.mu must be held.
func (s *socket) failLocked(err error) {
	if s.err == nil {
		s.err = err
	}
	s.queue = nil
	s.reset()
}

// reset closes the connection at once. What the client has not taken is discarded: the
// kernel would keep it, up to megabytes of it for minutes.
func (s *socket) reset() {
	s.conn.SetLinger(0)
	s.conn.Close()
}

// finish closes the connection after all that is queued and the last line. The caller is
// the reader and the writer. Input is discarded for a while, or until the client
// closes too: closing with unread input would reset the connection before the
// client has read the last line. After lingerLimit in all it is reset, and closed
// is called.
func (s *socket) finish(lastLine string, closed func()) {
	s.mu.Lock()
	if s.err == nil {
		s.err = errClosing
		s.queue = append(s.queue, &message{pieces: [][]byte{[]byte(lastLine)}})
	}
	s.mu.Unlock()
	s.flush()
	s.conn.CloseWrite()
	deadline := time.Now().Add(lingerLimit)
	s.conn.SetReadDeadline(deadline)
	discarded := make([]byte, 512)
	for err := error(nil); err == nil; {
		_, err = s.conn.Read(discarded)
	}
	go func() { // not time.AfterFunc, which in tests with synctest crashed the race detector
		time.Sleep(time.Until(deadline))
		s.reset()
		closed()
	}()
}
