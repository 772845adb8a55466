package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"os"
	"runtime"
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

	// maxBPM has 15 digits: what every reader of JSON keeps exactly. The type
	// keeps the program from being built where an int cannot hold it.
	maxBPM int = 999_999_999_999_999

	// maxWaiting bounds the messages that wait for a client that is slow to take them.
	maxWaiting = 64

	// maxRefusals bounds the clients that are being told that the server is full.
	maxRefusals = 100

	balanceLimit   = time.Minute            // from connecting to a token balance
	stallLimit     = 10 * time.Second       // without a byte taken of what is written
	stuckLimit     = time.Millisecond       // without a client served; see deliver
	lastWordsLimit = 500 * time.Millisecond // from the last words to the close
	stopLimit      = 3 * time.Second        // from the stop to the close of what is still open
)

var (
	errLineTooLong = fmt.Errorf("a line is longer than %d bytes", maxLine)
	errStalled     = fmt.Errorf("it took nothing for %v", stallLimit)
	errHungUp      = errors.New("it sends nothing more")
	errQueueFull   = fmt.Errorf("it is %d messages behind", maxWaiting)
)

// A server holds the connections of the validators of one lottery.
type server struct {
	lottery       *lottery
	maxValidators int
	log           *log.Logger

	mu       sync.Mutex        // guards the following
	sessions map[*session]bool // everyone connected, or gone with a stake in the round; true for those who hear announcements
	admitted int               // sessions, without those that are refused because the server is full
	ended    sync.WaitGroup    // handleConn's goroutines
}

func newServer(lottery *lottery, maxValidators int, logger *log.Logger) *server {
	return &server{
		lottery:       lottery,
		maxValidators: maxValidators,
		log:           logger,
		sessions:      make(map[*session]bool),
	}
}

// serve accepts validators until ctx is done, then says goodbye to all of them
// and returns when they are gone. An Accept that fails is tried again later, at
// first after 5 ms and at last every second: what it lacks, descriptors say,
// may be there again by then.
func (s *server) serve(ctx context.Context, listener net.Listener) {
	defer context.AfterFunc(ctx, func() { listener.Close() })()
	for delay := time.Duration(0); ctx.Err() == nil; {
		conn, err := listener.Accept()
		if err == nil {
			delay = 0
			s.open(ctx, conn)
		} else if ctx.Err() == nil {
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			s.log.Printf("cannot accept a connection, trying again in %v: %v", delay, err)
			select {
			case <-time.After(delay):
			case <-ctx.Done():
			}
		}
	}

	s.mu.Lock()
	for c := range s.sessions {
		c.conn.SetReadDeadline(time.Now()) // wakes its reader, which finds ctx done
	}
	s.mu.Unlock()
	defer time.AfterFunc(stopLimit, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range s.sessions {
			c.conn.Close()
		}
	}).Stop()
	s.ended.Wait()
}

// open starts a session, if only to say that there is no room for it.
func (s *server) open(ctx context.Context, conn net.Conn) {
	c := newSession(conn)
	s.mu.Lock()
	defer s.mu.Unlock()
	admit := s.admitted < s.maxValidators
	if admit {
		s.admitted++
	} else if len(s.sessions)-s.admitted >= maxRefusals {
		conn.Close()
		return
	}
	s.sessions[c] = false
	s.ended.Go(func() {
		if admit {
			s.handleConn(ctx, c)
		} else {
			c.end("server full, try again later\n")
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.sessions, c)
		if admit {
			s.admitted--
		}
	})
}

// handleConn is the one resident goroutine of a connection. It leads the client
// from its token balance through its BPMs to the end of its session; all ways
// out meet here.
func (s *server) handleConn(ctx context.Context, c *session) {
	v, lastWords, err := s.converse(ctx, c)
	if v != nil && ctx.Err() == nil {
		// Its stake and its block stay until the draw, and if it can still
		// listen it hears who wins.
		s.log.Printf("validator %s is out after the draw: %v", v.address, err)
		c.listenOnly()
		select {
		case <-s.lottery.leave(v):
		case <-ctx.Done():
		}
		c.takeTurn()
	}
	if ctx.Err() != nil {
		lastWords = "\nserver shutting down\n"
	}
	c.end(lastWords)
}

// converse reads a token balance and then BPMs for as long as the client sends
// them. It returns the validator if its stake is still in when that ends, and
// why it ended: in words for the client, if there are any, or as an error.
func (s *server) converse(ctx context.Context, c *session) (v *validator, lastWords string, err error) {
	c.conn.SetReadDeadline(time.Now().Add(balanceLimit))
	c.say(balancePrompt)
	stake, err := c.readNumber(1, maxStake, balancePrompt)
	var refused refusedLine
	switch {
	case errors.As(err, &refused):
		return nil, fmt.Sprintf("token balance must be a whole number from 1 to %d, %v\n", maxStake, refused), nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Sprintf("\nno token balance within %v\n", balanceLimit), nil
	case err != nil:
		return nil, "", err
	}
	v = s.join(c, int64(stake))
	c.conn.SetReadDeadline(time.Time{})
	c.say(fmt.Sprintf("validator %s stakes %d tokens\n"+bpmPrompt, v.address, stake))

	for ctx.Err() == nil {
		bpm, err := c.readNumber(-maxBPM, maxBPM, bpmPrompt)
		if errors.As(err, &refused) {
			s.lottery.disqualify(v)
			lastWords = fmt.Sprintf("BPM must be a whole number of at most 15 digits, %v: %d staked tokens forfeited\n", refused, stake)
			s.log.Printf("validator %s dropped: %s", v.address, lastWords)
			return nil, lastWords, nil
		}
		if err != nil {
			return v, "", err
		}
		index, added, drawIn := s.lottery.propose(v, bpm)
		already := ""
		if !added {
			already = "already "
		}
		c.say(fmt.Sprintf("block %d %sproposed, draw in %v\n"+bpmPrompt, index, already, drawIn.Round(time.Second)))
	}
	return v, "", nil
}

// join makes the client a validator, who from now on hears what everyone hears.
func (s *server) join(c *session, stake int64) *validator {
	v, validators, tokens := s.lottery.join(stake)
	s.mu.Lock()
	s.sessions[c] = true
	s.mu.Unlock()
	s.log.Printf("validator %s joins with %d tokens; validators: %d, tokens: %d", v.address, stake, validators, tokens)
	return v
}

// announce tells all validators who won.
func (s *server) announce(winner Block) {
	news := "\nwinning validator: " + winner.Validator + "\n" + bpmPrompt
	s.tell(message{pieces: [][]byte{[]byte(news)}})
}

// broadcast sends the chain to all validators.
func (s *server) broadcast(chain [][]byte) {
	pieces := append([][]byte{[]byte("\n[")}, chain...)
	s.tell(message{pieces: append(pieces, []byte("]\n"+bpmPrompt)), isChain: true})
}

// tell puts the message in the outbox of each validator and sees that it is
// delivered, without waiting for that.
func (s *server) tell(m message) {
	var listeners []*session
	s.mu.Lock()
	for c, listens := range s.sessions {
		if listens {
			listeners = append(listeners, c)
		}
	}
	s.mu.Unlock()
	for _, c := range listeners {
		c.put(m)
	}
	go deliver(listeners)
}

// deliver flushes the outboxes of all sessions, in a few goroutines rather than
// in one each, since the stacks of thousands would stay with the process. A
// goroutine whose client takes nothing is stuck with it; so whenever nobody was
// served for stuckLimit, there are twice as many.
func deliver(sessions []*session) {
	var served atomic.Int64
	flushAll := func() {
		for i := served.Add(1); i <= int64(len(sessions)); i = served.Add(1) {
			sessions[i-1].flush()
		}
	}
	workers, before := 0, int64(0)
	for now := int64(0); now < int64(len(sessions)); now = served.Load() {
		if now == before {
			more := max(workers, runtime.GOMAXPROCS(0))
			for range more {
				go flushAll()
			}
			workers += more
		}
		before = now
		time.Sleep(stuckLimit)
	}
}

// A message is what several clients are told in the same bytes.
type message struct {
	pieces  [][]byte
	isChain bool // a broadcast of the chain
}

// A session is one client's connection: the lines it sends, and an outbox of
// what it is told.
//
//  1. One goroutine at a time writes: whose turn it is. The reader takes its
//     turn before it acts on a line and ends it with the reply, so replies wait
//     for a slow client and nothing more is read from it.
//  2. put never waits. What it puts there is written by whoever has the turn, or
//     else by flush. The order of what happened is the order of what is said.
//  3. The outbox holds at most maxWaiting messages, and one broadcast.
//  4. Nothing but the reader stays behind when all is said.
type session struct {
	conn    net.Conn
	lines   *bufio.Reader // the reader's own
	replies []byte        // to lines that came together; whose turn it is has them

	mu          sync.Mutex // guards the following; never held while writing
	turnOver    sync.Cond  // signals that busy is false again
	busy        bool       // it is somebody's turn
	waiting     []message
	chainWaits  bool  // one of them, or the one being written, is a broadcast
	listensOnly bool  // its sending half is closed
	ended       bool  // its last words are said
	err         error // why nothing can be said any more; conn is closed then
}

// newSession returns a session in which it is the reader's turn.
func newSession(conn net.Conn) *session {
	c := &session{
		conn:  conn,
		lines: bufio.NewReaderSize(conn, maxLine+len("\r\n")),
		busy:  true,
	}
	c.turnOver.L = &c.mu
	return c
}

// A refusedLine is an error: the beginning of a line that is not the number
// that was asked for.
type refusedLine string

func (r refusedLine) Error() string {
	return fmt.Sprintf("got %q", string(r[:min(len(r), maxLine)]))
}

// readNumber returns the next whole number, which must be from low to high. It
// answers blank lines with the prompt. Its error is a refusedLine, or says
// why there are no more lines.
func (c *session) readNumber(low, high int, prompt string) (int, error) {
	for {
		line, err := c.readLine()
		line = bytes.TrimSpace(line)
		if err == nil && len(line) == 0 {
			c.say(prompt)
			continue
		}
		if err != nil && err != errLineTooLong {
			return 0, err
		}
		number, notNumber := strconv.ParseInt(string(line), 10, 64)
		if err != nil || notNumber != nil || number < int64(low) || number > int64(high) {
			return 0, refusedLine(line)
		}
		return int(number), nil
	}
}

// readLine returns the next line, with its end if it has one: the last line
// needs none. It is valid until the next call. Of a line longer than maxLine
// the beginning is returned with errLineTooLong. The reader has the turn before
// and after, but not while it waits for the client.
func (c *session) readLine() (line []byte, err error) {
	buffered, _ := c.lines.Peek(c.lines.Buffered())
	if bytes.IndexByte(buffered, '\n') >= 0 {
		line, err = c.lines.ReadSlice('\n')
	} else {
		c.endTurn()
		line, err = c.lines.ReadSlice('\n')
		if failed := c.takeTurn(); failed != nil {
			return nil, failed
		}
	}
	text := bytes.TrimSuffix(bytes.TrimSuffix(line, []byte("\n")), []byte("\r"))
	switch {
	case err == bufio.ErrBufferFull || len(text) > maxLine:
		return line, errLineTooLong
	case err == io.EOF && len(line) > 0:
		return line, nil
	case err == io.EOF:
		return nil, errHungUp
	}
	return line, err
}

// say adds a reply. The reader has the turn.
func (c *session) say(text string) {
	c.replies = append(c.replies, text...)
}

// takeTurn waits until it is the reader's turn to write, and what was waiting
// is written. Its error says that nothing can be said any more.
func (c *session) takeTurn() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.busy {
		c.turnOver.Wait()
	}
	c.busy = true
	c.drain()
	return c.err
}

// endTurn writes the replies, and what was put into the outbox meanwhile.
func (c *session) endTurn() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drain()
	c.busy = false
	c.turnOver.Signal()
}

// flush writes what waits, unless it is somebody's turn, who then will.
func (c *session) flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.busy {
		c.busy = true
		c.drain()
		c.busy = false
		c.turnOver.Signal()
	}
}

// drain writes the replies and then what waits. It is called with mu held, by
// whose turn it is, and lets go of mu while it writes.
func (c *session) drain() {
	if len(c.replies) > 0 {
		c.write(c.replies)
		c.replies = nil
	}
	for len(c.waiting) > 0 {
		next := c.waiting[0]
		c.waiting = c.waiting[1:]
		c.write(next.pieces...)
		if next.isChain {
			c.chainWaits = false
		}
	}
	c.waiting = nil // and the array behind it
}

// write is drain's way of writing one message.
func (c *session) write(pieces ...[]byte) {
	c.mu.Unlock()
	var err error
	for _, piece := range pieces {
		for len(piece) > 0 && err == nil {
			var n int
			c.conn.SetWriteDeadline(time.Now().Add(stallLimit))
			n, err = c.conn.Write(piece)
			piece = piece[n:]
			if errors.Is(err, os.ErrDeadlineExceeded) {
				if err = errStalled; n > 0 {
					err = nil // slow is no fault
				}
			}
		}
	}
	c.mu.Lock()
	if err != nil {
		c.fail(err)
	}
}

// fail gives up the connection, which wakes its reader. mu is held.
func (c *session) fail(err error) {
	if c.err == nil {
		c.err, c.waiting = err, nil
		c.conn.Close()
	}
}

// put adds a message to what waits for the client. A client that lags too far
// behind is dropped, but for a broadcast only the broadcast is.
func (c *session) put(m message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch full := len(c.waiting) == maxWaiting; {
	case c.ended || c.err != nil:
	case m.isChain && (full || c.chainWaits):
	case full:
		c.fail(errQueueFull)
	default:
		if c.listensOnly && !m.isChain {
			m.pieces = [][]byte{bytes.TrimSuffix(m.pieces[0], []byte(bpmPrompt))}
		}
		c.waiting = append(c.waiting, m)
		c.chainWaits = c.chainWaits || m.isChain
	}
}

// listenOnly ends the reader's last turn: the client can only listen from now on.
func (c *session) listenOnly() {
	c.mu.Lock()
	c.listensOnly = true
	c.mu.Unlock()
	c.endTurn()
}

// end says the last words, if there are any, after all else, and closes the
// connection. It is the reader's turn and stays so. Closing a connection while
// the client still sends would reset it, and the last words might never be
// seen; so what comes is thrown away, for a while.
func (c *session) end(lastWords string) {
	defer c.conn.Close()
	c.mu.Lock()
	c.drain()
	c.ended = true
	if lastWords != "" && c.err == nil {
		c.write([]byte(lastWords))
	}
	failed := c.err != nil
	c.mu.Unlock()
	if failed || lastWords == "" {
		return
	}
	if conn, ok := c.conn.(interface{ CloseWrite() error }); ok {
		conn.CloseWrite()
	}
	c.conn.SetReadDeadline(time.Now().Add(lastWordsLimit))
	c.lines.Discard(math.MaxInt)
}
