package main

import (
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
	"time"

	"proof-of-stake/internal/lineconn"
)

const (
	balancePrompt = "Enter token balance:"
	bpmPrompt     = "\nEnter a new BPM:"

	// maxBPM has 15 digits, which every reader of JSON keeps exactly. Its type
	// makes the build fail where an int cannot hold it.
	maxBPM int = 999_999_999_999_999

	// maxRefusals bounds the clients that are being refused since the server is full.
	maxRefusals = 100

	balanceLimit  = 10 * time.Minute       // from connecting to a token balance
	announceStep  = 25 * time.Millisecond  // the step of fanOut for a draw
	broadcastStep = 500 * time.Millisecond // and for the chain, which takes longer to write
	writeLimit    = 2 * time.Second        // from the stop to the reset of connections that are still being written to
)

// A server accepts the validators of one lottery and sends them its results.
//
// Lock order: the server's mutex, then a connection's or the lottery's.
type server struct {
	lottery       *lottery
	maxValidators int
	maxStake      int // of one validator, in tokens
	log           *log.Logger

	mu       sync.Mutex // guards the following
	clients  []*client  // connected, or disconnected with a stake in the round; to write in a map's order takes a quarter longer
	refusals int        // clients that are being refused since the server is full

	open sync.WaitGroup // counts clients and refusals
}

// A client is a connection and, once it has staked, its validator. The server's mutex
// guards what is set after the accept.
type client struct {
	*lineconn.Conn
	index     int             // in the server's clients
	validator *validator      // nil until the stake
	removed   <-chan struct{} // nil until it has left; closed after the draw that ends its round
}

func newServer(lottery *lottery, maxValidators int, logger *log.Logger) *server {
	return &server{
		lottery:       lottery,
		maxValidators: maxValidators,
		maxStake:      maxStake,
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
			s.accept(ctx, conn.(lineconn.TCPConn))
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
	for _, c := range s.clients {
		c.Stop(writeLimit) // its reader finds ctx done
	}
	s.mu.Unlock()
	s.open.Wait()
}

// accept starts to serve a client, if there is room for it.
func (s *server) accept(ctx context.Context, conn lineconn.TCPConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(s.clients) < s.maxValidators:
		conn.SetReadDeadline(time.Now().Add(balanceLimit)) // before serve can set another
		c := &client{Conn: lineconn.New(conn), index: len(s.clients)}
		s.clients = append(s.clients, c)
		s.open.Add(1)
		go s.handleConn(ctx, c)
	case s.refusals < maxRefusals:
		s.refusals++
		s.open.Add(1)
		go s.refuse(lineconn.New(conn))
	default:
		conn.Close()
	}
}

// refuse tells a client that there is no room for it.
func (s *server) refuse(conn *lineconn.Conn) {
	defer s.open.Done()
	s.log.Printf("%v refused: server full", conn.RemoteAddr())
	conn.Close("server full, try again later\n")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refusals--
}

// remove removes a client whose connection is closed.
func (s *server) remove(c *client) {
	defer s.open.Done()
	s.mu.Lock()
	defer s.mu.Unlock()
	last := len(s.clients) - 1
	s.clients[c.index] = s.clients[last]
	s.clients[c.index].index = c.index
	s.clients = slices.Delete(s.clients, last, last+1)
}

// parseNumber returns the number in the line, from low to high, or else a LineError.
func parseNumber(line []byte, low, high int) (int, error) {
	number, err := strconv.ParseInt(string(line), 10, 64)
	if err != nil || number < int64(low) || number > int64(high) {
		return 0, lineconn.LineError(line)
	}
	return int(number), nil
}

// handleConn serves a client until it has staked.
func (s *server) handleConn(ctx context.Context, c *client) {
	io.WriteString(c, balancePrompt)
	var err error
	for err == nil && c.validator == nil {
		var line []byte
		if line, err = c.ReadLine(); err == nil {
			err = s.stake(c, line)
		}
	}
	if err == nil {
		// This goroutine's stack has grown to 4 kB by now, and the runtime would not shrink
		// it during a Read. A new one starts with 2 kB, which is enough for BPMs.
		go s.handleBPMs(ctx, c)
		return
	}
	defer s.remove(c)
	var bad lineconn.LineError
	switch {
	case ctx.Err() != nil:
		c.Close(shuttingDown)
	case errors.As(err, &bad):
		s.log.Printf("%v refused: its token balance was %q", c.RemoteAddr(), string(bad))
		c.Close(fmt.Sprintf("token balance must be a whole number from 1 to %d, %v\n", s.maxStake, bad))
	case errors.Is(err, os.ErrDeadlineExceeded):
		s.log.Printf("%v refused: no token balance within %v", c.RemoteAddr(), balanceLimit)
		c.Close(fmt.Sprintf("\nno token balance within %v\n", balanceLimit))
	default:
		c.Close("")
	}
}

const shuttingDown = "\nserver shutting down\n"

// stake makes the client a validator, to which all results are sent from now on. A line
// that is no token balance is a LineError.
func (s *server) stake(c *client, line []byte) error {
	if len(line) == 0 {
		io.WriteString(c, balancePrompt)
		return nil
	}
	stake, err := parseNumber(line, 1, s.maxStake)
	if err != nil {
		return err
	}
	c.SetReadDeadline(time.Time{}) // if this undoes Stop's, handleBPMs finds ctx done
	v := s.join(c, int64(stake))
	fmt.Fprintf(c, "validator %s stakes %d tokens\n"+
		"Each round, enter a whole number to propose a block; anything else forfeits the tokens.\n%s", v.address, stake, bpmPrompt)
	return nil
}

// join makes the client a validator and logs it, one at a time, so that the log has the
// numbers of validators and tokens in the order of its lines.
func (s *server) join(c *client, stake int64) *validator {
	s.mu.Lock()
	defer s.mu.Unlock()
	v, validators, tokens := s.lottery.join(stake)
	c.validator = v
	s.log.Printf("validator %s joins from %v with %d tokens; validators: %d, tokens: %d", v.address, c.RemoteAddr(), stake, validators, tokens)
	return v
}

// handleBPMs serves a validator from its stake until it is removed.
func (s *server) handleBPMs(ctx context.Context, c *client) {
	var err error
	for err == nil && ctx.Err() == nil {
		var line []byte
		if line, err = c.ReadLine(); err == nil {
			err = s.propose(c, line)
		}
	}
	s.leave(ctx, c, err)
	s.remove(c)
}

// propose proposes a block with the BPM in the line. The reply repeats the BPM: if a
// message arrives while the user is typing, the terminal still sends what was typed
// before it. A line that is no BPM is a LineError.
func (s *server) propose(c *client, line []byte) error {
	if len(line) == 0 {
		io.WriteString(c, bpmPrompt)
		return nil
	}
	bpm, err := parseNumber(line, -maxBPM, maxBPM)
	if err != nil {
		return err
	}
	p := s.lottery.propose(c.validator, bpm)
	r := append(c.AvailableBuffer(), "block "...) // without fmt, which needs a larger stack
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
	c.Write(append(r, "\n"+bpmPrompt...))
	return nil
}

// leave ends the session of a validator that sends no more BPMs. err is a LineError, which
// disqualifies it, or why it has disconnected. Then its stake and its block stay for the
// draw that ends the round, whose winner is announced to it if it has only ended its input.
func (s *server) leave(ctx context.Context, c *client, err error) {
	var bad lineconn.LineError
	switch {
	case errors.As(err, &bad):
		s.lottery.disqualify(c.validator)
		s.log.Printf("validator %s dropped: its BPM was %q; it forfeits its %d tokens", c.validator.address, string(bad), c.validator.stake)
		c.Close(fmt.Sprintf("BPM must be a whole number of at most 15 digits, %v: %d staked tokens forfeited\n", bad, c.validator.stake))
		return
	case ctx.Err() != nil:
		c.Close(shuttingDown)
		return
	}
	s.mu.Lock()
	c.removed = s.lottery.disconnect(c.validator)
	s.mu.Unlock()
	how := "disconnects"
	if isSlow(err) {
		how = fmt.Sprintf("dropped: %v", err)
	}
	s.log.Printf("validator %s %s; its stake counts until the next draw", c.validator.address, how)
	if err != io.EOF {
		c.Close("")
	}
	select {
	case <-c.removed:
	case <-ctx.Done():
	}
	if err != io.EOF {
		return
	}
	if err := c.Err(); isSlow(err) {
		s.log.Printf("validator %s dropped: %v", c.validator.address, err)
	}
	lastLine := ""
	if ctx.Err() != nil {
		lastLine = shuttingDown
	}
	c.Close(lastLine)
}

// isSlow reports whether err says that a client was too slow and was reset.
func isSlow(err error) bool { return err == lineconn.ErrQueueFull || err == lineconn.ErrTimeout }

// announce sends the winner of a draw to all validators. tokens are all that were in it.
func (s *server) announce(winner *validator, tokens int64) {
	message := func(you, prompt string) *lineconn.Message {
		return lineconn.NewMessage(fmt.Appendf(nil, "\nwinning validator: %s%s with %d of %d tokens\n%s",
			winner.address, you, winner.stake, tokens, prompt))
	}
	toOthers, toWinner := message("", bpmPrompt), message(" (you)", bpmPrompt)
	lastToOthers, lastToWinner := message("", ""), message(" (you)", "") // who sends no more needs no prompt
	fanOut(announceStep, s.enqueue(func(c *client) *lineconn.Message {
		switch {
		case c.removed != nil && c.validator == winner:
			return lastToWinner
		case c.removed != nil:
			return lastToOthers
		case c.validator == winner:
			return toWinner
		}
		return toOthers
	}))
}

// broadcast sends the chain to all validators. It does not wait until it is written.
func (s *server) broadcast(chain [][]byte) {
	m := lineconn.NewDroppableMessage(slices.Concat([][]byte{[]byte("\n[")}, chain, [][]byte{[]byte("]\n" + bpmPrompt)})...)
	go fanOut(broadcastStep, s.enqueue(func(*client) *lineconn.Message { return m }))
}

// enqueue enqueues a message for every validator that has not been removed, without
// waiting, and returns their clients.
func (s *server) enqueue(messageFor func(c *client) *lineconn.Message) <-chan *client {
	s.mu.Lock()
	defer s.mu.Unlock()
	validators := make(chan *client, len(s.clients))
	defer close(validators)
	for _, c := range s.clients {
		select {
		case <-c.removed: // never if it is nil
			continue
		default:
		}
		if c.validator != nil {
			c.Enqueue(messageFor(c))
			validators <- c
		}
	}
	return validators
}

// fanOut has what is queued for the clients written. It returns when each of them has been
// written to or is being written to, so that draws do not get ahead of their announcements.
//
// A few workers write, since the stacks of ten thousand goroutines would stay with the
// process. A client that takes nothing blocks its worker, so after each step fanOut
// starts more of them, twice as many as the last time, unless the others will soon be done.
func fanOut(step time.Duration, clients <-chan *client) {
	none := make(chan struct{}, 1) // receives when no client is left
	work := func() {
		for c := range clients {
			c.Flush()
		}
		select {
		case none <- struct{}{}:
		default:
		}
	}
	before := len(clients)
	workers := runtime.GOMAXPROCS(0)
	for range workers {
		go work()
	}
	steps := time.NewTicker(step)
	defer steps.Stop()
	for {
		select {
		case <-none:
			return
		case <-steps.C:
		}
		left := len(clients)
		if left == 0 {
			return
		}
		if done := before - left; 8*done < left { // at this speed the rest takes more than 8 steps
			workers *= 2
			for range workers {
				go work()
			}
		}
		before = left
	}
}
