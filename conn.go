package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"
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

	// maxRefusals bounds the clients that are being refused for lack of room.
	maxRefusals = 100

	balanceLimit = 10 * time.Minute // from connecting to a token balance
	writeLimit   = 2 * time.Second  // from the stop to the reset of connections that are still being written to
)

// A server accepts the validators of one lottery and sends them its results.
//
// Lock order: the server's mutex, a client's, then its connection's or the lottery's.
type server struct {
	lottery       *lottery
	maxValidators int
	maxPerAddress int // clients of one network; 0 is no limit
	maxStake      int // of one validator, in tokens
	log           *log.Logger

	mu       sync.Mutex           // guards the following
	clients  []*client            // connected, or disconnected with a stake in the round
	networks map[netip.Prefix]int // the clients of each, if maxPerAddress is set
	refusals int                  // clients that are being refused

	open sync.WaitGroup // counts clients and refusals
}

// A client is a connection and, once it has staked, its validator.
type client struct {
	*lineconn.Conn
	index int // in the server's clients; guarded by its mutex

	// mu is held while a line is handled, until its reply is queued, and while a result is
	// queued. So a block is acknowledged before the winner of its round. It guards the
	// following, which only the client's own goroutine changes.
	mu        sync.Mutex
	validator *validator      // nil until the stake
	left      <-chan struct{} // nil until it leaves; closed after the draw that ends its round
}

func newServer(lottery *lottery, maxValidators int, logger *log.Logger) *server {
	return &server{
		lottery:       lottery,
		maxValidators: maxValidators,
		maxStake:      maxStake,
		log:           logger,
		networks:      make(map[netip.Prefix]int),
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

// networkOf returns the part of a client's address that maxPerAddress is about: all of IPv4,
// and of IPv6 the first 64 bits, since any host may choose the rest.
func networkOf(address net.Addr) netip.Prefix {
	client, _ := netip.ParseAddrPort(address.String())
	network, _ := client.Addr().Prefix(min(client.Addr().BitLen(), 64))
	return network
}

// countLocked counts n more clients of the address's network, if maxPerAddress is set. s.mu
// must be held.
func (s *server) countLocked(address net.Addr, n int) {
	if s.maxPerAddress == 0 {
		return
	}
	network := networkOf(address)
	if s.networks[network] += n; s.networks[network] == 0 {
		delete(s.networks, network)
	}
}

// accept starts to serve a client, if there is room for it.
func (s *server) accept(ctx context.Context, conn lineconn.TCPConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(s.clients) >= s.maxValidators:
		s.refuseLocked(conn, "server full", "server full, try again later\n")
	case s.maxPerAddress > 0 && s.networks[networkOf(conn.RemoteAddr())] >= s.maxPerAddress:
		s.refuseLocked(conn, "too many connections from its address", "too many connections from your address, try again later\n")
	default:
		conn.SetReadDeadline(time.Now().Add(balanceLimit)) // here, since later it could undo Stop's
		c := &client{Conn: lineconn.New(conn), index: len(s.clients)}
		s.clients = append(s.clients, c)
		s.countLocked(conn.RemoteAddr(), 1)
		s.open.Add(1)
		go s.handleConn(ctx, c)
	}
}

// refuseLocked tells a client why there is no room for it, unless maxRefusals are being told
// already. s.mu must be held.
func (s *server) refuseLocked(conn lineconn.TCPConn, reason, lastLine string) {
	if s.refusals == maxRefusals {
		conn.Close()
		return
	}
	s.refusals++
	s.open.Go(func() {
		s.log.Printf("%v refused: %s", conn.RemoteAddr(), reason)
		lineconn.New(conn).Close(lastLine)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.refusals--
	})
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
	s.countLocked(c.RemoteAddr(), -1)
}

// parseNumber returns the number in the line, from low to high, or else a LineError.
func parseNumber(line []byte, low, high int) (int, error) {
	number, err := strconv.ParseInt(string(line), 10, 64)
	if err != nil || number < int64(low) || number > int64(high) {
		return 0, lineconn.LineError(line)
	}
	return int(number), nil
}

// handleConn serves a client: it stakes, then it proposes a block with each line.
func (s *server) handleConn(ctx context.Context, c *client) {
	defer s.remove(c)
	io.WriteString(c, balancePrompt)
	var err error
	for err == nil && ctx.Err() == nil {
		var line []byte
		line, err = c.ReadLine()
		switch {
		case err != nil:
		case c.validator == nil:
			err = s.stakeApart(c, line)
		default:
			err = s.propose(c, line)
		}
	}
	s.leave(ctx, c, err)
}

// stakeApart is stake in a goroutine of its own, with which the stack that it needs goes; see
// docs/measurements.md.
func (s *server) stakeApart(c *client, line []byte) error {
	staked := make(chan error)
	go func() { staked <- s.stake(c, line) }()
	return <-staked
}

const (
	shuttingDown = "\nserver shutting down\n"
	joinAgain    = "; the connection is closed, join again\n" // or people type their next line into the shell
)

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
	c.SetReadDeadline(time.Time{}) // if this undoes Stop's, handleConn finds ctx done
	c.mu.Lock()
	defer c.mu.Unlock()
	v := s.lottery.join(int64(stake), c.RemoteAddr().String())
	c.validator = v
	fmt.Fprintf(c, "validator %s stakes %d tokens\n"+
		"Each round, enter a whole number to propose a block; anything else forfeits the tokens.\n", v.address, stake)
	c.reply(s.lottery.standing(v))
	return nil
}

// propose proposes a block with the BPM in the line; an empty one asks how the round stands.
// A line that is no BPM is a LineError.
func (s *server) propose(c *client, line []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(line) == 0 {
		c.reply(s.lottery.standing(c.validator))
		return nil
	}
	bpm, err := parseNumber(line, -maxBPM, maxBPM)
	if err != nil {
		return err
	}
	c.reply(s.lottery.propose(c.validator, bpm))
	return nil
}

// reply tells the client how the round stands, and prompts it. It repeats the BPM: if a message
// arrives while the user is typing, the terminal still sends what was typed before it. For
// why it does without fmt, see docs/measurements.md.
func (c *client) reply(s standing) {
	var buffer [192]byte
	r := buffer[:0]
	if !s.proposed {
		r = append(r, "no BPM for "...)
	}
	r = append(r, "block "...)
	r = strconv.AppendInt(r, int64(s.index), 10)
	switch {
	case !s.proposed:
		r = append(r, " yet: "...)
	case s.added:
		r = append(r, " proposed with BPM "...)
	default:
		r = append(r, " already proposed with BPM "...)
	}
	if s.proposed {
		r = strconv.AppendInt(r, int64(s.bpm), 10)
		r = append(r, ": "...)
		r = strconv.AppendInt(r, c.validator.stake, 10)
		r = append(r, " of "...)
	}
	r = strconv.AppendInt(r, s.tokens, 10)
	r = append(r, " tokens so far, draw in "...)
	r = append(r, s.drawIn.Round(time.Second).String()...)
	c.Write(append(r, "\n"+bpmPrompt...))
}

// leave ends the session of a client that sends no more lines. err is a LineError, why it
// has hung up, or why the server stops.
func (s *server) leave(ctx context.Context, c *client, err error) {
	v, lastLine := c.validator, ""
	var bad lineconn.LineError
	isBad := errors.As(err, &bad)
	switch {
	case isBad && v == nil:
		s.log.Printf("%v refused: its token balance was %q", c.RemoteAddr(), string(bad))
		lastLine = fmt.Sprintf("token balance must be a whole number from 1 to %d, %v%s", s.maxStake, bad, joinAgain)
	case isBad:
		s.lottery.disqualify(v)
		s.log.Printf("validator %s dropped: its BPM was %q; it forfeits its %d tokens", v.address, string(bad), v.stake)
		lastLine = fmt.Sprintf("BPM must be a whole number of at most %d digits, %v: %d staked tokens forfeited%s", len(strconv.Itoa(maxBPM)), bad, v.stake, joinAgain)
	case ctx.Err() != nil:
		lastLine = shuttingDown
	case v == nil && errors.Is(err, os.ErrDeadlineExceeded):
		s.log.Printf("%v refused: no token balance within %v", c.RemoteAddr(), balanceLimit)
		lastLine = fmt.Sprintf("\nno token balance within %v%s", balanceLimit, joinAgain)
	case v != nil:
		lastLine = s.awaitDraw(ctx, c, err)
	}
	c.Close(lastLine)
}

// awaitDraw has the stake and the block of a validator that hangs up stay for the draw that
// ends the round. If it has only ended its input it still hears of the winner, and of a stop
// before the draw by the last line that is returned.
func (s *server) awaitDraw(ctx context.Context, c *client, err error) (lastLine string) {
	v := c.validator
	c.mu.Lock()
	c.left = s.lottery.leave(v)
	c.mu.Unlock()
	how := "disconnects"
	if isSlow(err) {
		how = fmt.Sprintf("dropped: %v", err)
	}
	s.log.Printf("validator %s %s; its stake counts until the next draw", v.address, how)
	if err != io.EOF {
		c.Close("")
	}
	select {
	case <-c.left:
	case <-ctx.Done():
		lastLine = shuttingDown
	}
	if reset := c.Err(); err == io.EOF && isSlow(reset) {
		s.log.Printf("validator %s dropped: %v", v.address, reset)
	}
	return lastLine
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
	flush(s.enqueue(func(c *client) *lineconn.Message {
		switch {
		case c.left != nil && c.validator == winner:
			return lastToWinner
		case c.left != nil:
			return lastToOthers
		case c.validator == winner:
			return toWinner
		}
		return toOthers
	}))
}

// broadcast sends the chain to all validators. It does not wait until it is written.
func (s *server) broadcast(chain []byte) {
	m := lineconn.NewMessage([]byte("\n["), chain, []byte("]\n"+bpmPrompt))
	m.Droppable = true
	go flush(s.enqueue(func(*client) *lineconn.Message { return m }))
}

// enqueue enqueues a message for every validator that has not been removed, and returns
// their clients.
func (s *server) enqueue(messageFor func(c *client) *lineconn.Message) (validators []*client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	validators = make([]*client, 0, len(s.clients))
	for _, c := range s.clients {
		if c.enqueue(messageFor) {
			validators = append(validators, c)
		}
	}
	return validators
}

// enqueue enqueues a message for the client, if that is a validator that has not been removed.
func (c *client) enqueue(messageFor func(c *client) *lineconn.Message) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.left: // never if it is nil
		return false
	default:
	}
	if c.validator == nil {
		return false
	}
	c.Enqueue(messageFor(c))
	return true
}

// flush writes what is queued for the clients, as far as the system takes it at once.
func flush(clients []*client) {
	var flushing sync.WaitGroup
	for part := range slices.Chunk(clients, len(clients)/runtime.GOMAXPROCS(0)+1) {
		flushing.Go(func() {
			for _, c := range part {
				c.Flush()
			}
		})
	}
	flushing.Wait()
}
