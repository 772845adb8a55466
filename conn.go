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

	// maxBPM has 15 digits: what every reader of JSON keeps exactly. The type
	// keeps the program from being built where an int cannot hold it.
	maxBPM int = 999_999_999_999_999

	// maxWaiting bounds the messages that wait for a client that is slow to take them.
	maxWaiting = 64

	// maxRefusals bounds the clients that are being told that the server is full.
	maxRefusals = 100

	balanceLimit   = time.Minute            // from connecting to a token balance
	nudgeInterval  = time.Second            // between two looks at who stalls
	stallNudges    = 12                     // in a row without a byte taken: 10 to 12 s
	stuckLimit     = 25 * time.Millisecond  // between two looks at how a message spreads
	stuckServed    = 20                     // clients in that time, for each goroutine; see tell
	lastWordsLimit = 500 * time.Millisecond // from the last words to the close
	stopLimit      = 3 * time.Second        // from the stop to the close of what is still open
)

var (
	errHungUp  = errors.New("it sends nothing more")
	errStalled = fmt.Errorf("it took nothing for %v", (stallNudges-2)*nudgeInterval)
	errBehind  = fmt.Errorf("it is %d messages behind", maxWaiting)
)

// A server holds the connections of the validators of one lottery.
type server struct {
	lottery       *lottery
	maxValidators int
	log           *log.Logger

	mu       sync.Mutex // guards the following
	sessions []*session // everyone connected, or gone with a stake in the round
	admitted int        // sessions that are not refused

	ended sync.WaitGroup // counts the sessions
}

// A role is what a session is to the server.
type role byte

const (
	refused role = iota // is being told that the server is full
	guest               // has not staked yet
	member              // is a validator, and hears what they all hear
)

func newServer(lottery *lottery, maxValidators int, logger *log.Logger) *server {
	return &server{
		lottery:       lottery,
		maxValidators: maxValidators,
		log:           logger,
	}
}

// serve accepts validators until ctx is done, then says goodbye to all of them
// and returns when they are gone. An Accept that fails is tried again later, at
// first after 5 ms and at last every second: what it lacks, descriptors say,
// may be there again by then.
func (s *server) serve(ctx context.Context, listener net.Listener) {
	defer context.AfterFunc(ctx, func() { listener.Close() })()
	go s.nudge(ctx)
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
	for _, c := range s.sessions {
		c.conn.SetReadDeadline(time.Now()) // wakes its reader, which finds ctx done
	}
	s.mu.Unlock()
	defer time.AfterFunc(stopLimit, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, c := range s.sessions {
			c.conn.Close()
		}
	}).Stop()
	s.ended.Wait()
}

// nudge looks every nudgeInterval at who takes nothing of what is written. This
// costs less than a deadline for every write.
func (s *server) nudge(ctx context.Context) {
	ticker := time.NewTicker(nudgeInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		s.mu.Lock()
		for _, c := range s.sessions {
			c.nudge()
		}
		s.mu.Unlock()
	}
}

// open starts a session, if only to say that there is no room for it.
func (s *server) open(ctx context.Context, conn net.Conn) {
	c := newSession(conn)
	s.mu.Lock()
	defer s.mu.Unlock()
	full := s.admitted == s.maxValidators
	if full && len(s.sessions)-s.admitted == maxRefusals {
		conn.Close()
		return
	}
	c.place = len(s.sessions)
	s.sessions = append(s.sessions, c)
	s.ended.Add(1)
	if full {
		go s.close(ctx, c, "server full, try again later\n")
		return
	}
	s.admitted++
	c.role = guest
	conn.SetReadDeadline(time.Now().Add(balanceLimit)) // before a stop can set another
	go s.handleConn(ctx, c)
}

// handleConn leads a client from connecting to its token balance.
func (s *server) handleConn(ctx context.Context, c *session) {
	c.say(balancePrompt)
	stake, err := c.readNumber(1, maxStake, balancePrompt)
	var bad badLine
	switch {
	case errors.As(err, &bad):
		s.close(ctx, c, fmt.Sprintf("token balance must be a whole number from 1 to %d, %v\n", maxStake, bad))
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.close(ctx, c, fmt.Sprintf("\nno token balance within %v\n", balanceLimit))
	case err != nil:
		s.close(ctx, c, "")
	default:
		c.conn.SetReadDeadline(time.Time{})
		v := s.join(c, int64(stake))
		// Joining took a larger stack than waiting for a line does, and a stack
		// never shrinks to less than 4 kB: the rest is for a new goroutine.
		go s.takeBPMs(ctx, c, v)
	}
}

// join makes the client a validator, who from now on hears what everyone hears.
func (s *server) join(c *session, stake int64) *validator {
	v, validators, tokens := s.lottery.join(stake)
	s.mu.Lock()
	c.role = member
	s.mu.Unlock()
	s.log.Printf("validator %s joins with %d tokens; validators: %d, tokens: %d", v.address, stake, validators, tokens)
	c.say("validator ", v.address, " stakes ", strconv.FormatInt(stake, 10), " tokens\n", bpmPrompt)
	return v
}

// takeBPMs is the one resident goroutine of a validator.
func (s *server) takeBPMs(ctx context.Context, c *session, v *validator) {
	for ctx.Err() == nil {
		bpm, err := c.readNumber(-maxBPM, maxBPM, bpmPrompt)
		if err != nil {
			s.part(ctx, c, v, err)
			return
		}
		s.propose(c, v, bpm)
	}
	s.close(ctx, c, "")
}

// propose proposes a block, and says so or that there is one already.
func (s *server) propose(c *session, v *validator, bpm int) {
	index, added, drawIn := s.lottery.propose(v, bpm)
	already := ""
	if !added {
		already = "already "
	}
	c.say("block ", strconv.Itoa(index), " ", already, "proposed, draw in ", drawIn.Round(time.Second).String(), "\n", bpmPrompt)
}

// part ends the session of a validator who sends no more BPMs. What it sent
// instead of one costs it its stake. If it sends nothing at all or was given up,
// its stake and its block stay until the draw, and it hears that if it still listens.
func (s *server) part(ctx context.Context, c *session, v *validator, err error) {
	var bad badLine
	if errors.As(err, &bad) {
		s.lottery.disqualify(v)
		s.log.Printf("validator %s dropped: not a BPM: %v", v.address, bad)
		s.close(ctx, c, fmt.Sprintf("BPM must be a whole number of at most 15 digits, %v: %d staked tokens forfeited\n", bad, v.stake))
		return
	}
	if ctx.Err() == nil {
		s.log.Printf("validator %s leaves, its stake stays until the draw: %v", v.address, err)
		c.mu.Lock() // no message may come between the two
		c.gone = s.lottery.leave(v)
		c.mu.Unlock()
		c.endTurn()
		select {
		case <-c.gone:
		case <-ctx.Done():
		}
		c.takeTurn()
	}
	s.close(ctx, c, "")
}

// close ends any session, with the last words for its client if there are any.
func (s *server) close(ctx context.Context, c *session, lastWords string) {
	if ctx.Err() != nil {
		lastWords = "\nserver shutting down\n"
	}
	c.end(lastWords)
	defer s.ended.Done()
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.role != refused {
		s.admitted--
	}
	last := len(s.sessions) - 1
	s.sessions[c.place] = s.sessions[last]
	s.sessions[c.place].place = c.place
	s.sessions[last] = nil
	s.sessions = s.sessions[:last]
}

// announce tells all validators who won.
func (s *server) announce(winner Block) {
	news := "\nwinning validator: " + winner.Validator + "\n" + bpmPrompt
	s.tell(&message{pieces: [][]byte{[]byte(news)}})
}

// broadcast sends the chain to all validators.
func (s *server) broadcast(chain [][]byte) {
	pieces := slices.Concat([][]byte{[]byte("\n[")}, chain, [][]byte{[]byte("]\n" + bpmPrompt)})
	s.tell(&message{pieces: pieces, isChain: true})
}

// tell has the message in the outbox of every validator when it returns, and
// written or being written wherever nothing else is.
//
// It takes a few goroutines rather than one for each client, since the stacks of
// thousands would stay with the process. A goroutine whose client takes nothing
// is stuck with it; so whenever each has served no more than stuckServed clients in
// stuckLimit, there are twice as many.
func (s *server) tell(m *message) {
	s.mu.Lock()
	listeners := make([]*session, 0, len(s.sessions))
	for _, c := range s.sessions {
		if c.role == member {
			listeners = append(listeners, c)
		}
	}
	s.mu.Unlock()

	last := int64(len(listeners))
	var taken, served atomic.Int64
	done := make(chan struct{})
	work := func() {
		for i := taken.Add(1); i <= last; i = taken.Add(1) {
			c := listeners[i-1]
			myTurn := c.put(m)
			if served.Add(1) == last {
				close(done)
			}
			if myTurn {
				c.endTurn()
			}
		}
	}
	workers, before := int64(0), int64(0)
	for now := int64(0); now < last; now = served.Load() {
		if now-before <= workers*stuckServed {
			more := min(max(workers, int64(runtime.GOMAXPROCS(0))), last-workers)
			for range more {
				go work()
			}
			workers += more
		}
		before = now
		select {
		case <-done:
		case <-time.After(stuckLimit):
		}
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
//  2. put never waits. What it puts there is written by whose turn it is, in that
//     order, and after the replies of the same turn.
//  3. At most maxWaiting messages wait, beside the one being written. At most one
//     of them all is a broadcast.
//  4. Nothing but the reader stays behind when all is said.
type session struct {
	conn    net.Conn
	lines   *bufio.Reader // the reader's own
	replies []byte        // to lines that came together; whose turn it is has them

	place int  // in the server's sessions, guarded by its mutex, like the next
	role  role // what it is to the server

	mu         sync.Mutex // guards the following; never held while writing
	turnOver   sync.Cond  // signals that busy is false again
	busy       bool       // it is somebody's turn
	chainWaits bool       // one of the waiting, or the one being written, is a broadcast
	waiting    []*message
	err        error           // why nothing can be said any more; conn is closed then
	gone       <-chan struct{} // set when its validator leaves, closed when that is over
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

// A badLine is an error: the beginning of a line that is not the number that
// was asked for.
type badLine string

func (b badLine) Error() string {
	return fmt.Sprintf("got %q", string(b[:min(len(b), maxLine)]))
}

// readNumber returns the next line that is not blank as a number, from low to
// high. Blank lines are answered with the prompt. The error is a badLine, or says
// why there are no more lines. The reader has the turn before and after, but not
// while it waits for the client; so replies to lines that came together leave
// together.
func (c *session) readNumber(low, high int, prompt string) (int, error) {
	for {
		waits := !c.hasLine()
		if waits {
			c.endTurn()
		}
		line, err := c.readLine()
		if waits {
			if failed := c.takeTurn(); failed != nil {
				return 0, failed
			}
		}
		switch {
		case err != nil:
			return 0, err
		case len(line) > 0:
			return parseNumber(line, low, high)
		}
		c.say(prompt)
	}
}

// parseNumber returns the number that the line is, or else a badLine.
func parseNumber(line []byte, low, high int) (int, error) {
	number, err := strconv.ParseInt(string(line), 10, 64)
	if err != nil || number < int64(low) || number > int64(high) {
		return 0, badLine(line)
	}
	return int(number), nil
}

// hasLine reports whether a line, with its end, has been received already.
func (c *session) hasLine() bool {
	received, _ := c.lines.Peek(c.lines.Buffered())
	return bytes.IndexByte(received, '\n') >= 0
}

// readLine returns the next line without its end and the blanks around it,
// valid until the next call. The last line needs no end. If the line is longer
// than maxLine, its beginning is the error, a badLine.
func (c *session) readLine() ([]byte, error) {
	line, err := c.lines.ReadSlice('\n')
	length := len(bytes.TrimSuffix(bytes.TrimSuffix(line, []byte("\n")), []byte("\r")))
	line = bytes.TrimSpace(line)
	switch {
	case err == bufio.ErrBufferFull || length > maxLine:
		err = badLine(line)
	case err == io.EOF && length > 0:
		err = nil
	case err == io.EOF:
		err = errHungUp
	}
	return line, err
}

// say adds to the replies. The reader has the turn.
func (c *session) say(parts ...string) {
	for _, part := range parts {
		c.replies = append(c.replies, part...)
	}
}

// takeTurn waits until it is the reader's turn. Its error says why nothing can
// be said any more.
func (c *session) takeTurn() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.busy {
		c.turnOver.Wait()
	}
	c.busy = true
	return c.err
}

// endTurn writes the replies, and what was put into the outbox meanwhile.
func (c *session) endTurn() {
	err := c.write(c.replies)
	c.replies = c.replies[:0]
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fail(err)
	c.drain()
	c.busy = false
	c.turnOver.Signal()
}

// drain writes what waits. It is called with mu held, by whose turn it is, and
// lets go of mu while it writes.
func (c *session) drain() {
	for len(c.waiting) > 0 {
		next := c.waiting[0]
		c.waiting = slices.Delete(c.waiting, 0, 1)
		c.mu.Unlock()
		var err error
		for i := 0; i < len(next.pieces) && err == nil; i++ {
			err = c.write(next.pieces[i])
		}
		c.mu.Lock()
		c.fail(err)
		if next.isChain {
			c.chainWaits = false
		}
	}
}

// write writes for whose turn it is. The client may take the piece as slowly as
// it likes, but must take some of it within stallNudges. They are counted, rather
// than the time, so that a server that was stopped for a while gives nobody up.
func (c *session) write(piece []byte) (err error) {
	for nudges := 0; len(piece) > 0 && err == nil; {
		var n int
		n, err = c.conn.Write(piece)
		piece = piece[n:]
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if nudges++; n > 0 {
				nudges = 1
			}
			if err = errStalled; nudges < stallNudges {
				err = c.conn.SetWriteDeadline(time.Time{})
			}
		}
	}
	return err
}

// nudge interrupts a write, to see whether it gets anywhere.
func (c *session) nudge() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.busy {
		c.conn.SetWriteDeadline(time.Now())
	}
}

// fail gives up the connection after an error, if it is one, which wakes its
// reader. mu is held.
func (c *session) fail(err error) {
	if err != nil && c.err == nil {
		c.err = err
		c.conn.Close()
	}
}

// put adds a message to what waits for the client, and takes the turn if it is
// nobody's: then the caller has to end it. If too much waits already the client is
// given up; but if the message is a broadcast, it is left out.
func (c *session) put(m *message) (myTurn bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	full := len(c.waiting) == maxWaiting
	switch {
	case c.isGone():
		return false
	case m.isChain && (full || c.chainWaits):
		return false
	case full:
		c.fail(errBehind)
		return false
	case c.gone != nil && !m.isChain:
		m = &message{pieces: [][]byte{bytes.TrimSuffix(m.pieces[0], []byte(bpmPrompt))}}
	}
	c.waiting = append(c.waiting, m)
	c.chainWaits = c.chainWaits || m.isChain
	myTurn = !c.busy
	c.busy = true
	return myTurn
}

// isGone reports whether the session's validator has left and is gone. mu is held.
func (c *session) isGone() bool {
	select {
	case <-c.gone:
		return true
	default:
		return false
	}
}

// end says the last words, if there are any, after all else, and closes the
// connection. It is the reader's turn and stays so. Closing a connection while
// the client still sends would reset it, and the last words might never be
// seen; so what comes is thrown away, for a while.
func (c *session) end(lastWords string) {
	defer c.conn.Close()
	c.endTurn()
	if c.takeTurn() != nil || lastWords == "" || c.write([]byte(lastWords)) != nil {
		return
	}
	if conn, ok := c.conn.(interface{ CloseWrite() error }); ok {
		conn.CloseWrite()
	}
	c.conn.SetReadDeadline(time.Now().Add(lastWordsLimit))
	c.lines.Discard(math.MaxInt)
}
