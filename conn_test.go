package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"proof-of-stake/internal/lineconn"
	"proof-of-stake/internal/tcptest"
)

// A buffer is a bytes.Buffer that may be written to and read from at once.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// take returns what was written since the last take.
func (b *buffer) take() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.b.Reset()
	return b.b.String()
}

// peek returns what take would return.
func (b *buffer) peek() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// A testServer is a server whose clients are in the same process, all in one bubble
// of virtual time.
type testServer struct {
	*testing.T
	*server
	listener    *tcptest.Listener
	stdout, log buffer
	stop        func() // returns when serve has
	err         error  // what it has returned
}

// runServer runs f beside a server with 30 second rounds. f starts halfway between
// two seconds, so that nothing it does falls on the instant of a tick. runServer returns
// when no goroutine of the server and of its clients is left.
func runServer(t *testing.T, f func(ts *testServer)) {
	t.Helper()
	runServerWith(t, func(*server) {}, f)
}

func runServerWith(t *testing.T, set func(*server), f func(ts *testServer)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ts := &testServer{T: t, listener: tcptest.NewListener()}
		logger := log.New(&ts.log, "", 0)
		l := newLottery(newBlockchain(t), &ts.stdout, logger)
		l.roundInterval = 30 * time.Second
		l.broadcastInterval = time.Minute
		ts.server = newServer(l, 1000, logger)
		set(ts.server)

		ctx, stop := context.WithCancel(t.Context())
		var serving sync.WaitGroup
		serving.Go(func() { ts.err = serve(ctx, l, ts.server, ts.listener) })
		ts.stop = func() {
			stop()
			serving.Wait()
		}
		time.Sleep(500 * time.Millisecond)
		synctest.Wait()
		f(ts)
		ts.stop()
	})
}

// advance lets time pass.
func (ts *testServer) advance(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// A testClient is the other end of a connection. It reads all that is sent to it, unless
// it is stalled.
type testClient struct {
	*testServer
	net.Conn
	received buffer
	closed   chan struct{} // closed when the server has closed the connection
	address  string        // once it has joined, like the next
	stake    int
}

// connect returns a client that has received nothing yet.
func (ts *testServer) connect() *testClient {
	c := ts.connectStalled()
	go func() {
		io.Copy(&c.received, c.Conn)
		close(c.closed)
	}()
	return c
}

func (ts *testServer) connectStalled() *testClient {
	mine, its := tcptest.Pipe()
	return ts.accepted(mine, its)
}

// connectFrom is connectStalled from another address, such as 192.0.2.1:5000.
func (ts *testServer) connectFrom(address string) *testClient {
	mine, its := tcptest.Pipe()
	return ts.accepted(mine, &connFrom{its, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(address))})
}

// accepted returns the client whose end of a connection is mine.
func (ts *testServer) accepted(mine *tcptest.Conn, its net.Conn) *testClient {
	c := &testClient{testServer: ts, Conn: mine, closed: make(chan struct{})}
	ts.Cleanup(func() { mine.Close() })
	ts.listener.Accepts <- its
	synctest.Wait()
	return c
}

// A connFrom is a connection from the address.
type connFrom struct {
	*tcptest.Conn
	address net.Addr
}

func (c *connFrom) RemoteAddr() net.Addr { return c.address }

// joinStalled returns a client with one token that reads nothing more.
func (ts *testServer) joinStalled() *testClient {
	ts.Helper()
	c := ts.connectStalled()
	c.readTo(balancePrompt)
	c.send("1\n")
	c.stake = 1
	c.readTo(bpmPrompt)
	return c
}

// readTo has a stalled client read to the end of the text, which must come at once.
func (c *testClient) readTo(text string) {
	c.Helper()
	c.SetReadDeadline(time.Now().Add(time.Second))
	defer c.SetReadDeadline(time.Time{})
	received := ""
	for one := make([]byte, 1); !strings.HasSuffix(received, text); received += string(one) {
		if _, err := c.Read(one); err != nil {
			c.Fatalf("received %q, %v\nwant %q at its end", received, err, text)
		}
	}
	synctest.Wait()
}

// joinLate has a client join with one token that takes the first byte of each message and
// then, so many nanoseconds later, the rest.
func (ts *testServer) joinLate(late *atomic.Int64) {
	ts.Helper()
	c := ts.joinStalled()
	go func() {
		for message := make([]byte, 1000); ; {
			if _, err := c.Read(message[:1]); err != nil {
				return
			}
			time.Sleep(time.Duration(late.Load()))
			c.Read(message)
		}
	}()
}

var addressPattern = regexp.MustCompile("[0-9a-f]{64}")

// join returns a client that stakes so many tokens and has received the reply.
func (ts *testServer) join(stake int) *testClient {
	ts.Helper()
	c := ts.connect()
	c.send(fmt.Sprintf("%d\n", stake))
	received := c.received.take()
	c.address, c.stake = addressPattern.FindString(received), stake
	if c.address == "" || !strings.HasPrefix(received, balancePrompt) || !strings.HasSuffix(received, bpmPrompt) {
		ts.Fatalf("after staking %d: received %q\nwant an address between %q and %q", stake, received, balancePrompt, bpmPrompt)
	}
	return c
}

// send sends text and waits until the server has dealt with it.
func (c *testClient) send(text string) {
	c.Helper()
	if _, err := io.WriteString(c.Conn, text); err != nil {
		c.Fatalf("sending %.100q: %v", text, err)
	}
	synctest.Wait()
}

// flood sends the line 100,000 times, or as often as is read while the client
// takes no reply, which must be little: one batch whose replies are being written, 64
// lines, and what is read at once.
func (c *testClient) flood(line string) {
	c.Helper()
	c.SetWriteDeadline(time.Now().Add(time.Second))
	n, err := io.WriteString(c.Conn, strings.Repeat(line, 100_000))
	if !errors.Is(err, os.ErrDeadlineExceeded) || n > 5*(lineconn.MaxLine+2) {
		c.Errorf("%d bytes were taken before a reply was, %v", n, err)
	}
}

// want is all that the client has received since the last want.
func (c *testClient) want(text string) {
	c.Helper()
	synctest.Wait()
	if received := c.received.take(); received != text {
		c.Fatalf("received %q\nwant  %q", received, text)
	}
}

// wantClosed is want, after which the server closes the connection.
func (c *testClient) wantClosed(text string) {
	c.Helper()
	c.want(text)
	select {
	case <-c.closed:
	default:
		c.Fatal("the connection is open, want it closed")
	}
}

// wantQuoted is wantClosed for a last line of which only what it quotes matters.
func (c *testClient) wantQuoted(quote string) {
	c.Helper()
	synctest.Wait()
	received := c.received.peek()
	if want := "got " + quote; !strings.Contains(received, want) {
		c.Fatalf("received %q\nwant %s in it", received, want)
	}
	c.wantClosed(received)
}

// halfClose closes the client's sending half.
func (c *testClient) halfClose() {
	c.Conn.(*tcptest.Conn).CloseWrite()
	synctest.Wait()
}

// What a client receives is put together here, so that a changed sentence is changed in one
// place, and in TestSession and TestLastLines, which have all of it word for word.

const rule = "Each round, enter a whole number to propose a block; anything else forfeits the tokens."

// standingText is how a round stands for who has so much at stake, and the prompt.
func standingText(s standing, stake int) string {
	text := fmt.Sprintf("no BPM for block %d yet: ", s.index)
	if s.proposed {
		already := " already"
		if s.added {
			already = ""
		}
		text = fmt.Sprintf("block %d%s proposed with BPM %d: %d of ", s.index, already, s.bpm, stake)
	}
	return text + fmt.Sprintf("%d tokens so far, draw in %v\n%s", s.tokens, s.drawIn.Round(time.Second), bpmPrompt)
}

// greets is the reply to the stake in a round of so many tokens.
func (c *testClient) greets(index, tokens int, drawIn time.Duration) string {
	return fmt.Sprintf("validator %s stakes %d tokens\n%s\n%s", c.address, c.stake, rule, noBPM(index, tokens, drawIn))
}

// noBPM is how a round of so many tokens stands for who has no block in it.
func noBPM(index, tokens int, drawIn time.Duration) string {
	return standingText(standing{index: index, tokens: int64(tokens), drawIn: drawIn}, 0)
}

// proposes is the reply to the client's first BPM in a round.
func (c *testClient) proposes(index, bpm, tokens int, drawIn time.Duration) string {
	return standingText(standing{index, bpm, int64(tokens), drawIn, true, true}, c.stake)
}

// stands is the reply to its others, and to an empty line from then on.
func (c *testClient) stands(index, bpm, tokens int, drawIn time.Duration) string {
	return standingText(standing{index, bpm, int64(tokens), drawIn, true, false}, c.stake)
}

// wins is what all others receive if the client wins a draw of so many tokens.
func (c *testClient) wins(tokens int) string {
	return fmt.Sprintf("\nwinning validator: %s with %d of %d tokens\n%s", c.address, c.stake, tokens, bpmPrompt)
}

// won is what the client itself receives then.
func (c *testClient) won(tokens int) string {
	return fmt.Sprintf("\nwinning validator: %s (you) with %d of %d tokens\n%s", c.address, c.stake, tokens, bpmPrompt)
}

// chain is what a broadcast sends.
func (ts *testServer) chain() string {
	return fmt.Sprintf("\n[%s]\n%s", ts.lottery.chain.latest(), bpmPrompt)
}

// badBalance is the last line after a line that is no stake.
func badBalance(maxStake int, quote string) string {
	return fmt.Sprintf("token balance must be a whole number from 1 to %d, got %s%s", maxStake, quote, joinAgain)
}

// forfeits is the last line after a line that is no BPM.
func (c *testClient) forfeits(quote string) string {
	return fmt.Sprintf("BPM must be a whole number of at most %d digits, got %s: %d staked tokens forfeited%s",
		len(strconv.Itoa(maxBPM)), quote, c.stake, joinAgain)
}

// Telnet's IAC DO TIMING-MARK, and the answer.
const (
	doMark = "\xff\xfd\x06"
	mark   = "\xff\xfc\x06"
)

const (
	full    = "server full, try again later\n"
	tooMany = "too many connections from your address, try again later\n"
)

// wantLog is something that must have been logged since the last wantLog.
func (ts *testServer) wantLog(text string) {
	ts.Helper()
	if logged := ts.log.take(); !strings.Contains(logged, text) {
		ts.Fatalf("logged %q\nwant   %q in it", logged, text)
	}
}

// wantValidators checks how many there are of validators and of their tokens.
func (ts *testServer) wantValidators(validators int, tokens int64) {
	ts.Helper()
	ts.lottery.mu.Lock()
	defer ts.lottery.mu.Unlock()
	if len(ts.lottery.validators) != validators || ts.lottery.tokens != tokens {
		ts.Fatalf("%d validators with %d tokens, want %d with %d", len(ts.lottery.validators), ts.lottery.tokens, validators, tokens)
	}
}

// Each reply, word for word.
func TestSession(t *testing.T) {
	runServer(t, func(ts *testServer) {
		other := ts.join(300)
		ts.log.take()
		c := ts.connect()
		c.want("Enter token balance:")
		c.send("\n")
		c.want("Enter token balance:")
		c.send(" \t\n")
		c.want("Enter token balance:")
		ts.advance(2 * time.Second)
		other.send("71\n") // 2.5 s of the round have passed
		other.want("block 1 proposed with BPM 71: 300 of 300 tokens so far, draw in 28s\n\nEnter a new BPM:")
		ts.advance(3 * time.Second)
		c.send("100\n")
		received := c.received.take()
		c.address, c.stake = addressPattern.FindString(received), 100
		if want := "validator " + c.address + " stakes 100 tokens\n" +
			"Each round, enter a whole number to propose a block; anything else forfeits the tokens.\n" +
			"no BPM for block 1 yet: 300 tokens so far, draw in 25s\n\nEnter a new BPM:"; received != want {
			t.Fatalf("received %q\nwant     %q", received, want)
		}
		ts.wantLog("validator " + c.address + " joins from pipe with 100 tokens; validators: 2, tokens: 400\n")
		c.send("\n")
		c.want("no BPM for block 1 yet: 300 tokens so far, draw in 25s\n\nEnter a new BPM:")

		ts.advance(7100 * time.Millisecond) // 12.6 s
		c.send("72\n")
		c.want("block 1 proposed with BPM 72: 100 of 400 tokens so far, draw in 17s\n\nEnter a new BPM:")
		ts.advance(5 * time.Second)
		c.send("73\n")
		c.want("block 1 already proposed with BPM 72: 100 of 400 tokens so far, draw in 12s\n\nEnter a new BPM:")
		c.send("\n")
		c.want("block 1 already proposed with BPM 72: 100 of 400 tokens so far, draw in 12s\n\nEnter a new BPM:")
		other.send("oops\n")
		other.wantClosed("BPM must be a whole number of at most 15 digits, got \"oops\": 300 staked tokens forfeited; the connection is closed, join again\n")
		ts.advance(12 * time.Second)
		c.want("")
		ts.stdout.take() // the genesis block
		ts.advance(time.Second)
		c.want("\nwinning validator: " + c.address + " (you) with 100 of 100 tokens\n\nEnter a new BPM:")
		ts.wantLog("block 1: validator " + c.address + " wins with 100 tokens; candidates: 1, tokens: 100\n")
		if dump := ts.stdout.take(); !strings.HasPrefix(dump, "(main.Block) {\n Index: (int) 1,\n") || !strings.Contains(dump, " BPM: (int) 72,\n") {
			t.Errorf("printed %s", dump)
		}
	})
}

// Each last line, word for word.
func TestLastLines(t *testing.T) {
	const again = "; the connection is closed, join again\n"
	set := func(s *server) { s.maxValidators, s.maxPerAddress, s.maxStake = 3, 2, 500 }
	runServerWith(t, set, func(ts *testServer) {
		stays := ts.join(500)
		c := ts.connect()
		c.send("abc\n")
		c.wantClosed(balancePrompt + "token balance must be a whole number from 1 to 500, got \"abc\"" + again)
		c.Close()
		synctest.Wait()
		c = ts.join(7)
		c.send("7.5\n")
		c.wantClosed("BPM must be a whole number of at most 15 digits, got \"7.5\": 7 staked tokens forfeited" + again)
		c.Close()
		synctest.Wait()
		c = ts.connect()
		c.want(balancePrompt)
		ts.connect().wantClosed("too many connections from your address, try again later\n")
		ts.connectFrom("192.0.2.1:5000")
		ts.connect().wantClosed("server full, try again later\n")
		ts.advance(10 * time.Minute)
		c.wantClosed("\nno token balance within 10m0s" + again)
		stays.received.take()
		ts.stop()
		stays.wantClosed("\nserver shutting down\n")
	})
}

// An empty line costs nothing and is answered with how the round stands.
func TestEmptyLine(t *testing.T) {
	name, _ := newChainFile(t, 1)
	file := new(hookedFile)
	set := func(s *server) {
		*s.lottery.chain = *open(t, name)
		file.chainFile, file.sync = s.lottery.chain.file, func() error { return nil }
		s.lottery.chain.file = file
		s.lottery.broadcastInterval = time.Hour
	}
	runServerWith(t, set, func(ts *testServer) {
		c, other := ts.join(100), ts.join(20)
		empty := func(c *testClient, want string) {
			t.Helper()
			for _, line := range []string{"\n", " \t \n", "7\b\n", "\x1b[A\n"} {
				c.send(line)
				c.want(want)
			}
		}
		draw := func() { // in this very instant
			if err := ts.lottery.pickWinner(time.Now(), ts.server); err != nil {
				t.Fatal(err)
			}
		}
		empty(c, noBPM(1, 0, 30*time.Second))
		ts.advance(40 * time.Second) // a round without a block
		empty(c, noBPM(1, 0, 20*time.Second))

		other.send("70\n")
		other.want(other.proposes(1, 70, 20, 20*time.Second))
		empty(c, noBPM(1, 20, 20*time.Second))
		empty(other, other.stands(1, 70, 20, 20*time.Second))
		c.send("71\n")
		c.want(c.proposes(1, 71, 120, 20*time.Second))
		c.send("72\n")
		c.want(c.stands(1, 71, 120, 20*time.Second))
		empty(c, c.stands(1, 71, 120, 20*time.Second))
		other.send("oops\n")
		other.wantClosed(other.forfeits(`"oops"`))
		empty(c, c.stands(1, 71, 100, 20*time.Second))

		ts.advance(19500*time.Millisecond - 1)
		empty(c, c.stands(1, 71, 100, 0))
		ts.advance(1)
		c.want(c.won(100))
		empty(c, noBPM(2, 0, 30*time.Second))

		// Before and after a draw in the same instant.
		c.send("\n73\n\n")
		c.want(noBPM(2, 0, 30*time.Second) + c.proposes(2, 73, 100, 30*time.Second) + c.stands(2, 73, 100, 30*time.Second))
		draw()
		c.want(c.won(100))
		empty(c, noBPM(3, 0, 30*time.Second))

		// While the winner is being written, the next round is open; if that fails, it goes on.
		c.send("74\n")
		c.received.take()
		file.sync = func() error {
			empty(c, noBPM(4, 0, 30*time.Second))
			return errors.New("input/output error")
		}
		draw()
		empty(c, c.stands(3, 74, 100, 30*time.Second))
		file.sync = func() error { return nil }
		draw()
		c.want(c.won(100))
		ts.wantValidators(1, 100)
	})
}

// A telnet that waits for a timing mark has it in its place among the replies, whether it has
// staked or not, and from then on \r\n. It is nothing in the line.
func TestTimingMark(t *testing.T) {
	crlf := func(text string) string { return strings.ReplaceAll(text, "\n", "\r\n") }
	runServer(t, func(ts *testServer) {
		c := ts.join(100)
		c.send("72\n7\xff\xed\xff\xfd\x06\x7f73\n") // as after Ctrl-Z
		c.want(c.proposes(1, 72, 100, 30*time.Second) + mark + crlf(c.stands(1, 72, 100, 30*time.Second)))
		c.send(doMark)
		c.want(mark)
		ts.advance(30 * time.Second)
		c.want(crlf(c.won(100)))
		c.send("oops" + doMark + "\n" + doMark)
		c.wantClosed(mark + crlf(c.forfeits(`"oops"`)))

		c = ts.connect()
		c.send(doMark + "1" + doMark + "00\n")
		received := c.received.take()
		c.address, c.stake = addressPattern.FindString(received), 100
		if want := balancePrompt + mark + mark + crlf(c.greets(2, 0, 30*time.Second)); received != want {
			t.Errorf("received %q\nwant %q", received, want)
		}
	})
}

// A validator that proposes nothing receives the winner and the chain too; a client that
// has not staked receives neither.
func TestEverybodyHears(t *testing.T) {
	runServer(t, func(ts *testServer) {
		proposer, listener, unstaked := ts.join(5), ts.join(7), ts.connect()
		unstaked.want(balancePrompt)
		proposer.send("72\n")
		proposer.received.take()
		ts.advance(30 * time.Second)
		proposer.want(proposer.won(5))
		listener.want(proposer.wins(5))

		proposer.send("73\n")
		proposer.want(proposer.proposes(2, 73, 5, 30*time.Second))
		ts.advance(29 * time.Second)
		proposer.want("")
		ts.advance(time.Second) // a draw and a broadcast at once: the draw first, the broadcast with its block
		chain := ts.chain()
		if !strings.Contains(chain, `"Index":2,`) {
			t.Errorf("the chain is %s", chain)
		}
		proposer.want(proposer.won(5) + chain)
		listener.want(proposer.wins(5) + chain)
		unstaked.want("")

		ts.advance(time.Minute) // rounds without a candidate say nothing
		listener.want(chain)
	})
}

// Where both ticks wait for a draw that takes long, the next draw is first.
func TestDrawComesFirst(t *testing.T) {
	for range 20 { // or a toss of a coin would do
		runServer(t, func(ts *testServer) {
			name, _ := newChainFile(t, 1)
			chain := open(t, name)
			file := &hookedFile{chain.file, func() error { time.Sleep(40 * time.Second); return nil }}
			ts.lottery.chain.file, ts.lottery.chain.size = file, chain.size
			c := ts.join(1)
			c.send("72\n")
			ts.advance(35 * time.Second) // the draw of 30 s goes on until 70 s
			file.sync = func() error { return nil }
			c.send("73\n")
			ts.advance(36 * time.Second)
			if received := c.received.take(); strings.Count(received, "winning") != 2 || !strings.Contains(received, `"Index":2,`) {
				t.Errorf("received %q", received)
			}
		})
	}
}

func TestBroadcastBlocks(t *testing.T) {
	set := func(s *server) {
		s.lottery.chain.limit = 2
		s.lottery.roundInterval = time.Second
		s.lottery.broadcastInterval = 10 * time.Second
	}
	runServerWith(t, set, func(ts *testServer) {
		c := ts.join(1)
		for range 3 {
			c.send("72\n")
			ts.advance(time.Second)
		}
		c.received.take()
		ts.advance(7 * time.Second)
		received := c.received.take()
		if n := strings.Count(received, `"Index"`); n != 2 || !strings.HasPrefix(received, "\n[{\"Index\":2,") {
			t.Errorf("received %q", received)
		}
	})
}

// A session says the same however its bytes are cut.
func TestCutAnywhere(t *testing.T) {
	const text = "\r\n 100 \r\n\n72\n73"
	for cut := range len(text) {
		runServer(t, func(ts *testServer) {
			c := ts.connect()
			for _, part := range []string{text[:cut], text[cut:]} {
				c.send(part)
			}
			c.halfClose() // the last line counts without its end
			received := c.received.take()
			c.address, c.stake = addressPattern.FindString(received), 100
			want := balancePrompt + balancePrompt + c.greets(1, 0, 30*time.Second) + noBPM(1, 0, 30*time.Second) +
				c.proposes(1, 72, 100, 30*time.Second) + c.stands(1, 72, 100, 30*time.Second)
			if want = strings.ReplaceAll(want, "\n", "\r\n"); received != want {
				t.Errorf("cut at %d: received %q\nwant %q", cut, received, want)
			}
		})
	}
}

func TestNumbers(t *testing.T) {
	long := strings.Repeat("x", 64)
	for _, test := range []struct {
		line           string
		balance, quote string // what is staked, or else what is quoted
		bpm            bool
	}{
		{line: "1", balance: "1", bpm: true},
		{line: "+5", balance: "5", bpm: true},
		{line: "007", balance: "7", bpm: true},
		{line: " \t 42 ", balance: "42", bpm: true},
		{line: "1000000000000", balance: "1000000000000", bpm: true},
		{line: strings.Repeat(" ", 62) + "42", balance: "42", bpm: true}, // 64 bytes
		{line: strings.Repeat("0", 62) + "42", balance: "42", bpm: true},
		{line: "0", quote: `"0"`, bpm: true},
		{line: "-1", quote: `"-1"`, bpm: true},
		{line: "1000000000001", quote: `"1000000000001"`, bpm: true},
		{line: "999999999999999", quote: `"999999999999999"`, bpm: true},
		{line: "-999999999999999", quote: `"-999999999999999"`, bpm: true},
		{line: "1000000000000000", quote: `"1000000000000000"`},
		{line: "-1000000000000000", quote: `"-1000000000000000"`},
		{line: "99999999999999999999", quote: `"99999999999999999999"`},
		{line: "abc", quote: `"abc"`},
		{line: "5.0", quote: `"5.0"`},
		{line: "0x5", quote: `"0x5"`},
		{line: "1e3", quote: `"1e3"`},
		{line: "1_000", quote: `"1_000"`},
		{line: "1 2", quote: `"1 2"`},
		{line: "٣", quote: `"٣"`},
		{line: ` "quoted" `, quote: `"\"quoted\""`},
		{line: "\x1b[2J\x07\x00\xff\xff\t\v\x1b", quote: `"\xff"`},
		{line: long, quote: `"` + long + `"`},
		{line: long + "y", quote: `"` + long + `"`},
		{line: long + "yyy", quote: `"` + long + `"`},
		{line: strings.Repeat("0", 63) + "42", quote: `"` + strings.Repeat("0", 63) + `4"`}, // 65 bytes
		{line: strings.Repeat(" ", 65), quote: `""`},
		{line: strings.Repeat("x", 1000), quote: `"` + long + `"`},
	} {
		t.Run(fmt.Sprintf("%.20q", test.line), func(t *testing.T) {
			runServer(t, func(ts *testServer) {
				c := ts.connect()
				c.want(balancePrompt)
				io.WriteString(c, test.line+"\n")
				if test.balance != "" {
					synctest.Wait()
					if received, want := c.received.take(), " stakes "+test.balance+" tokens\n"; !strings.Contains(received, want) {
						t.Errorf("received %q\nwant %q in it", received, want)
					}
				} else {
					c.wantQuoted(test.quote)
					ts.wantLog("pipe refused: its token balance was " + test.quote + "\n")
					ts.wantValidators(0, 0)
				}
			})
			runServer(t, func(ts *testServer) {
				c := ts.join(100)
				io.WriteString(c, test.line+"\n")
				if test.bpm {
					bpm, _ := strconv.Atoi(strings.TrimSpace(test.line))
					c.want(c.proposes(1, bpm, 100, 30*time.Second))
				} else {
					c.wantQuoted(test.quote)
					ts.wantValidators(0, 0)
					ts.wantLog("validator " + c.address + " dropped: its BPM was " + test.quote + "; it forfeits its 100 tokens\n")
				}
			})
		})
	}
}

// MAX_STAKE is the most that a validator can stake.
func TestMaxStake(t *testing.T) {
	set := func(s *server) { s.maxStake = 500 }
	runServerWith(t, set, func(ts *testServer) {
		ts.join(500)
		c := ts.connect()
		c.send("501\n")
		c.wantClosed(balancePrompt + badBalance(500, `"501"`))
		ts.wantValidators(1, 500)
	})
}

// The numbers of validators and tokens are in the order of the lines, however many join
// at once.
func TestJoinsAreLoggedInOrder(t *testing.T) {
	var logged buffer
	l := newLottery(newBlockchain(t), io.Discard, log.New(&logged, "", 0))
	var joining sync.WaitGroup
	for range 8 {
		joining.Go(func() {
			for range 500 {
				l.join(1, "")
			}
		})
	}
	joining.Wait()
	for i, match := range regexp.MustCompile("validators: (\\d+), tokens: (\\d+)\n").FindAllStringSubmatch(logged.take(), -1) {
		if want := fmt.Sprint(i + 1); match[1] != want || match[2] != want {
			t.Fatalf("line %d says %q", i+1, match[0])
		}
	}
}

// Terminals that need \r\n get it, in the same draw and broadcast in which others get \n.
func TestLineEnds(t *testing.T) {
	runServer(t, func(ts *testServer) {
		winner, other := ts.join(1), ts.join(2)
		var terminals []*testClient
		for _, sent := range []string{"100\r\x00", "100\r\n", "\xff\xfb\x01100\n"} {
			c := ts.connect()
			c.send(sent)
			received := c.received.take()
			c.address, c.stake = addressPattern.FindString(received), 100
			if want := balancePrompt + strings.ReplaceAll(c.greets(1, 0, 30*time.Second), "\n", "\r\n"); received != want {
				t.Errorf("after %q received %q\nwant %q", sent, received, want)
			}
			terminals = append(terminals, c)
		}
		winner.send("72\n")
		winner.received.take()
		ts.advance(time.Minute)
		chain := ts.chain()
		winner.want(winner.won(1) + chain)
		other.want(winner.wins(1) + chain)
		for _, c := range terminals {
			c.want(strings.ReplaceAll(winner.wins(1)+chain, "\n", "\r\n"))
		}
	})
}

// A bad BPM takes the stake and the block with it, and only that validator's.
func TestForfeit(t *testing.T) {
	runServer(t, func(ts *testServer) {
		bad, good := ts.join(maxStake), ts.join(1)
		bad.send("72\n")
		good.send("73\n")
		bad.send("oops\n")
		bad.wantClosed(bad.proposes(1, 72, maxStake, 30*time.Second) + bad.forfeits(`"oops"`))
		ts.wantValidators(1, 1)
		ts.advance(30 * time.Second)
		good.want(good.proposes(1, 73, maxStake+1, 30*time.Second) + good.won(1))
	})
}

// What the client sends after a bad line is thrown away, for a moment, so that
// it receives the reason; then the connection is closed whatever it does.
func TestLastLineIsHeard(t *testing.T) {
	runServer(t, func(ts *testServer) {
		c := ts.join(100)
		c.send("oops\n")
		for range 1000 {
			c.send(strings.Repeat("72\n", 30))
		}
		c.wantClosed(c.forfeits(`"oops"`))
		ts.advance(4 * time.Second)
		if _, err := io.WriteString(c, "72\n"); err == nil {
			t.Error("the connection still takes lines")
		}
	})
}

func TestNoBalance(t *testing.T) {
	runServer(t, func(ts *testServer) {
		c := ts.connect()
		c.want(balancePrompt)
		ts.advance(10*time.Minute - time.Second)
		c.send("\n1") // no more time for that
		c.want(balancePrompt)
		ts.advance(999 * time.Millisecond)
		c.want("")
		ts.advance(time.Millisecond)
		c.wantClosed("\nno token balance within 10m0s; the connection is closed, join again\n")
		ts.wantLog("pipe refused: no token balance within 10m0s\n")

		staked := ts.join(100) // from then on there is no limit
		ts.advance(24 * time.Hour)
		staked.received.take()
		staked.send("72\n")
		staked.want(staked.proposes(1, 72, 100, 30*time.Second))
	})
}

// A client that hangs up before it has staked leaves no validator.
func TestHangUpBeforeBalance(t *testing.T) {
	runServer(t, func(ts *testServer) {
		for _, test := range []struct{ sent, received string }{
			{"", balancePrompt},
			{"\n", balancePrompt + balancePrompt},
			{" ", balancePrompt + balancePrompt},
		} {
			ts.log.take()
			c := ts.connect()
			c.send(test.sent)
			c.halfClose()
			ts.advance(time.Second)
			c.wantClosed(test.received)
			if logged := ts.log.take(); logged != "" {
				t.Errorf("logged %q", logged)
			}
		}
		ts.wantValidators(0, 0)
	})
}

func TestHalfClose(t *testing.T) {
	runServer(t, func(ts *testServer) {
		quiet := ts.join(100)
		quiet.halfClose()
		quiet.want("")
		ts.wantValidators(1, 100)
		ts.advance(30 * time.Second) // no winner, and all the same it is gone
		quiet.wantClosed("")
		ts.wantValidators(0, 0)

		c := ts.join(100)
		c.send("7")
		c.halfClose()
		c.want(c.proposes(1, 7, 100, 30*time.Second))
		ts.wantLog("validator " + c.address + " disconnects; its stake counts until the next draw\n")
		ts.advance(30 * time.Second) // a draw, and then a broadcast, which it does not receive
		c.wantClosed(strings.TrimSuffix(c.won(100), bpmPrompt))
		ts.wantValidators(0, 0)
		if logged := ts.log.take(); strings.Count(logged, "\n") != 1 || !strings.Contains(logged, " wins ") {
			t.Errorf("logged %q, want the winner alone", logged)
		}
	})
}

// A stake, a proposal and a hang-up are one step for whoever announces: a result is queued
// before it or after its reply.
func TestOneStep(t *testing.T) {
	for name, step := range map[string]func(ctx context.Context, s *server, c *client){
		"stake":   func(_ context.Context, s *server, c *client) { s.stake(c, []byte("1")) },
		"propose": func(_ context.Context, s *server, c *client) { s.propose(c, []byte("72")) },
		"ask":     func(_ context.Context, s *server, c *client) { s.propose(c, nil) },
		"leave":   func(ctx context.Context, s *server, c *client) { s.leave(ctx, c, lineconn.ErrInterrupted) },
	} {
		t.Run(name, func(t *testing.T) {
			peer, conn := tcptest.Pipe()
			peer.Close()
			l := testLottery(t)
			s := newServer(l, 1, l.log)
			c := &client{Conn: lineconn.New(conn)}
			c.validator = s.lottery.join(1, "")
			ctx, stop := context.WithCancel(t.Context())
			s.lottery.mu.Lock() // and so the step waits in the middle
			var stepping sync.WaitGroup
			stepping.Go(func() { step(ctx, s, c) })
			for end := time.Now().Add(10 * time.Second); c.mu.TryLock(); runtime.Gosched() {
				c.mu.Unlock()
				if time.Now().After(end) {
					t.Error("the client's mutex is not held")
					break
				}
			}
			s.lottery.mu.Unlock()
			stop()
			stepping.Wait()
		})
	}
}

// A broadcast before the draw ends with the prompt, as for all others.
func TestHalfCloseBroadcast(t *testing.T) {
	set := func(s *server) { s.lottery.broadcastInterval = 20 * time.Second }
	runServerWith(t, set, func(ts *testServer) {
		c := ts.join(100)
		c.halfClose()
		ts.advance(20 * time.Second)
		c.want(ts.chain())
		ts.advance(10 * time.Second)
		c.wantClosed("")
	})
}

// The block of a validator that hangs up can still win.
func TestHangUp(t *testing.T) {
	runServer(t, func(ts *testServer) {
		gone, stays := ts.join(100), ts.join(1)
		gone.send("72\n")
		gone.Close()
		synctest.Wait()
		ts.wantValidators(2, 101)
		ts.advance(30 * time.Second)
		stays.want(gone.wins(100))
		ts.wantValidators(1, 1)
		ts.advance(time.Minute)
		if n := len(ts.clients); n != 1 {
			t.Errorf("%d sessions, want 1", n)
		}
	})
}

// refused returns how many clients are being refused since the server is full.
func (ts *testServer) refused() int {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	return ts.refusals
}

func TestFull(t *testing.T) {
	set := func(s *server) { s.maxValidators = 2 }
	runServerWith(t, set, func(ts *testServer) {
		staked, unstaked := ts.join(100), ts.connect()
		unstaked.want(balancePrompt)
		ts.connect().wantClosed(full)
		ts.wantLog("pipe refused: server full\n")
		unstaked.Close()
		synctest.Wait()
		second := ts.join(200)
		ts.connect().wantClosed(full)

		// A stake that waits for the draw takes a place.
		second.Close()
		synctest.Wait()
		ts.connect().wantClosed(full)
		ts.advance(30 * time.Second)

		// A forfeited one does not, but its connection does until it is closed.
		third := ts.join(300)
		third.send("oops\n")
		ts.advance(time.Second - 1)
		ts.connect().wantClosed(full)
		ts.advance(1)
		fourth := ts.join(400)
		fourth.send("oops\n")
		fourth.Close()
		synctest.Wait()
		ts.join(500)

		// A hundred at a time are told why, each until its connection is closed; others are
		// disconnected without a word.
		ts.advance(time.Second)
		for range maxRefusals {
			closes := ts.connect()
			closes.halfClose()
			closes.wantClosed(full)
			ts.connect().wantClosed(full)
		}
		if n := ts.refused(); n != 100 {
			t.Errorf("%d refusals, want 100", n)
		}
		ts.connect().wantClosed("")
		staked.send("\n")
		staked.want(noBPM(1, 0, 28*time.Second))
		ts.advance(time.Second)
		if n := ts.refused(); n != 0 {
			t.Errorf("%d refusals when their connections are closed, want 0", n)
		}
	})
}

// From one address no more than MAX_PER_ADDRESS are connected, those that hang up and stake
// until the draw included, and others are refused as if the server were full.
func TestMaxPerAddress(t *testing.T) {
	set := func(s *server) { s.maxValidators, s.maxPerAddress = 4, 2 }
	runServerWith(t, set, func(ts *testServer) {
		staked, unstaked := ts.join(100), ts.connect()
		unstaked.want(balancePrompt)
		ts.log.take()
		ts.connect().wantClosed(tooMany)
		ts.wantLog("pipe refused: too many connections from its address\n")
		unstaked.Close()
		synctest.Wait()
		second := ts.join(200)
		second.send("72\n")
		second.Close()
		synctest.Wait()
		ts.connect().wantClosed(tooMany)
		ts.advance(29500*time.Millisecond - 1)
		ts.connect().wantClosed(tooMany)
		ts.advance(1)
		staked.want(second.wins(200))
		third := ts.join(300)
		third.send("oops\n")
		third.wantClosed(third.forfeits(`"oops"`))
		ts.connect().wantClosed(tooMany)
		third.Close()
		synctest.Wait()
		fourth := ts.join(400)

		// Other addresses have places of their own. With the last one, the server is full.
		first := ts.connectFrom("192.0.2.1:5000")
		first.readTo(balancePrompt)
		ts.connect().wantClosed(tooMany)
		ts.connectFrom("[2001:db8:0:1::1]:5000").readTo(balancePrompt)
		ts.log.take()
		ts.connect().wantClosed(full)
		ts.wantLog("pipe refused: server full\n")
		first.Close()
		synctest.Wait()
		ts.connect().wantClosed(tooMany)

		// The refused of both kinds are a hundred at most.
		ts.advance(time.Second)
		for range maxRefusals / 2 {
			ts.connect().wantClosed(tooMany)
		}
		last := ts.connectFrom("[2001:db8:0:1:2::1]:5000")
		last.readTo(balancePrompt)
		for range maxRefusals / 2 {
			ts.connect().wantClosed(full)
		}
		if n := ts.refused(); n != maxRefusals {
			t.Errorf("%d refusals, want %d", n, maxRefusals)
		}
		ts.connect().wantClosed("") // of the full server
		last.Close()
		synctest.Wait()
		ts.connect().wantClosed("") // too many
		fourth.Close()
		ts.advance(time.Minute)
		if want := map[netip.Prefix]int{{}: 1, netip.MustParsePrefix("2001:db8:0:1::/64"): 1}; !maps.Equal(ts.networks, want) || ts.refused() != 0 {
			t.Errorf("%v are connected, want %v; %d refusals", ts.networks, want, ts.refused())
		}
	})
	runServer(t, func(ts *testServer) { // no limit
		for range 100 {
			ts.connect().want(balancePrompt)
		}
		if len(ts.networks) != 0 {
			t.Errorf("without a limit there are %v", ts.networks)
		}
	})
}

func TestNetworkOf(t *testing.T) {
	for address, want := range map[string]string{
		"127.0.0.1:5000":              "127.0.0.1/32",
		"[::ffff:192.0.2.1]:5000":     "192.0.2.1/32",
		"[::1]:5000":                  "::/64",
		"[2001:db8:1:2:3:4:5:6]:5000": "2001:db8:1:2::/64",
		"[2001:db8:1:2:ffff::]:1":     "2001:db8:1:2::/64",
		"[2001:db8:1:3::]:1":          "2001:db8:1:3::/64",
		"[fe80::1:2%eth0]:5000":       "fe80::/64",
		"255.255.255.255:0":           "255.255.255.255/32",
	} {
		tcp, err := net.ResolveTCPAddr("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		if got := networkOf(tcp).String(); got != want {
			t.Errorf("the network of %v is %s, want %s", address, got, want)
		}
	}
}

// However often clients come and go, no more are connected than MAX_VALIDATORS, and who
// has closed already is gone at once.
func TestComeAndGo(t *testing.T) {
	set := func(s *server) { s.maxValidators = 1 }
	runServerWith(t, set, func(ts *testServer) {
		start := time.Now()
		for _, sent := range []string{"", "\n", "abc\n", "\x03"} {
			for range 100 {
				c := ts.connect()
				c.send(sent)
				c.Close()
				synctest.Wait()
				if len(ts.clients) != 0 {
					t.Fatalf("after %q and a close %d are connected", sent, len(ts.clients))
				}
			}
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("it took %v", d)
		}
	})
}

// A client that the system gives up is dropped, while its block stays in.
func TestGivenUp(t *testing.T) {
	const why = " dropped: it has stopped reading or is no longer there"
	runServer(t, func(ts *testServer) { // by then it has read something now and then
		c := ts.joinStalled()
		c.send("72\n")
		ts.log.take()
		for range 3 {
			ts.advance(tcptest.UserTimeout - time.Second)
			c.Read(make([]byte, 1))
		}
		ts.wantValidators(1, 1)
		ts.log.take()
		ts.advance(tcptest.UserTimeout)
		ts.wantLog(why + "; its stake counts until the next draw\n")
		ts.wantValidators(1, 1)
		ts.advance(30 * time.Second)
		ts.wantValidators(0, 0)
	})
	runServer(t, func(ts *testServer) { // after it has half-closed
		c := ts.joinStalled()
		c.halfClose()
		ts.wantLog(" disconnects; its stake counts until the next draw\n")
		ts.announce(new(validator), 0)
		ts.advance(30 * time.Second)
		ts.wantValidators(0, 0)
		ts.advance(tcptest.UserTimeout)
		if len(ts.clients) != 0 {
			t.Errorf("%d clients are left", len(ts.clients))
		}
	})
}

// A client that takes a byte now and then gets each byte once.
func TestSlowReader(t *testing.T) {
	runServer(t, func(ts *testServer) {
		c := ts.joinStalled()
		winner := &testClient{address: strings.Repeat("a", 64), stake: 5}
		ts.announce(&validator{address: winner.address, stake: 5}, 7)
		want := winner.wins(7)
		received := make([]byte, len(want))
		for i := range received {
			ts.advance(15 * time.Second)
			io.ReadFull(c, received[i:i+1])
		}
		if string(received) != want {
			t.Errorf("received %q, want %q", received, want)
		}
	})
}

// A client that has half-closed and then closes is gone after the draw.
func TestWriteToClosed(t *testing.T) {
	runServer(t, func(ts *testServer) {
		c := ts.joinStalled()
		c.halfClose()
		for range 3 {
			ts.announce(new(validator), 0)
		}
		c.Close()
		synctest.Wait()
		ts.wantValidators(1, 1)
		ts.advance(30 * time.Second)
		ts.wantValidators(0, 0)
		if len(ts.clients) != 0 {
			t.Errorf("%d clients are left", len(ts.clients))
		}
	})
}

// Draws wait for a client that does not read, but only so many.
func TestBehind(t *testing.T) {
	set := func(s *server) { s.lottery.roundInterval = 10 * time.Millisecond }
	runServerWith(t, set, func(ts *testServer) {
		c, stalled := ts.join(1), ts.joinStalled()
		stalled.send("72\n")
		ts.advance(10 * time.Millisecond)
		ts.wantValidators(2, 2)
		logged := ""
		for range 64 { // and one waits already
			c.send("72\n")
			ts.advance(10 * time.Millisecond)
			logged += ts.log.take()
		}
		if !strings.Contains(logged, " dropped: it is 64 messages behind; its stake counts until the next draw\n") || strings.Count(logged, " dropped: ") != 1 {
			t.Errorf("logged %q", logged)
		}
		c.send("72\n")
		ts.advance(10 * time.Millisecond)
		ts.wantValidators(1, 1)
	})
	runServer(t, func(ts *testServer) { // also one that has half-closed
		c := ts.joinStalled()
		c.halfClose()
		ts.wantLog(" disconnects; its stake counts until the next draw\n")
		for range 2 + lineconn.MaxQueue {
			ts.announce(new(validator), 0)
		}
		ts.advance(30 * time.Second)
		ts.wantLog(" dropped: it is 64 messages behind\n")
		ts.wantValidators(0, 0)
	})
}

// Broadcasts alone drop nobody: who takes nothing gets one of them, and then the next.
func TestOneBroadcastAtATime(t *testing.T) {
	runServer(t, func(ts *testServer) {
		c := ts.joinStalled()
		for range 2 + lineconn.MaxQueue {
			ts.broadcast(ts.lottery.chain.latest())
			synctest.Wait()
		}
		ts.wantValidators(1, 1)
		go io.Copy(&c.received, c.Conn)
		c.want(ts.chain())
		ts.broadcast(ts.lottery.chain.latest())
		c.want(ts.chain())
	})
}

// A busyConn is a connection to which writes that do not wait take their time while it is busy.
type busyConn struct {
	*tcptest.Conn
	busy sync.Mutex
}

func (c *busyConn) SyscallConn() (syscall.RawConn, error) { return busyRawConn{&c.busy}, nil }

type busyRawConn struct{ busy *sync.Mutex }

func (busyRawConn) Control(func(uintptr)) error   { return nil }
func (busyRawConn) Read(func(uintptr) bool) error { return nil }
func (c busyRawConn) Write(func(uintptr) bool) error {
	for !c.busy.TryLock() { // Lock would stop the clock
		time.Sleep(time.Millisecond)
	}
	c.busy.Unlock()
	return nil
}

// A draw does not get ahead of its announcement: announce returns when everybody has been
// written to, as far as that goes at once.
func TestAnnounceFlushes(t *testing.T) {
	runServer(t, func(ts *testServer) {
		mine, its := tcptest.Pipe()
		conn := &busyConn{Conn: its}
		ts.Cleanup(func() { mine.Close() })
		ts.listener.Accepts <- net.Conn(conn)
		go io.Copy(io.Discard, mine)
		io.WriteString(mine, "1\n")
		synctest.Wait()
		ts.wantValidators(1, 1)
		conn.busy.Lock()
		announced := time.Duration(0)
		start := time.Now()
		go func() {
			ts.announce(new(validator), 0)
			announced = time.Since(start)
		}()
		ts.advance(10 * time.Millisecond)
		conn.busy.Unlock()
		ts.advance(10 * time.Millisecond)
		if announced < 10*time.Millisecond {
			t.Errorf("announced after %v, while a write went on for 10ms", announced)
		}
	})
}

// Each winner of a thousand rounds is received exactly once by each validator,
// while they all propose as fast as they can.
func TestEachWinnerIsHeardOnce(t *testing.T) {
	const rounds, clients = 1000, 20
	runServer(t, func(ts *testServer) {
		var all []*testClient
		for range clients {
			all = append(all, ts.join(1+rand.IntN(1000)))
		}
		for ts.lottery.round.index <= rounds {
			var sending sync.WaitGroup
			for _, c := range all {
				sending.Go(func() {
					for range 20 {
						io.WriteString(c, "72\n73\n")
					}
				})
			}
			for range lineconn.MaxQueue / 2 {
				ts.lottery.pickWinner(time.Now(), ts.server)
			}
			sending.Wait()
			time.Sleep(time.Millisecond) // before any falls behind
			synctest.Wait()
		}
		chain := blocks(t, ts.lottery.chain)
		won := regexp.MustCompile("winning validator: ([0-9a-f]{64}) ")
		for i, c := range all {
			received := won.FindAllStringSubmatch(c.received.take(), -1)
			if len(received) != len(chain)-1 {
				t.Fatalf("client %d received %d winners, want %d", i, len(received), len(chain)-1)
			}
			for n, match := range received {
				if match[1] != chain[n+1].Validator {
					t.Fatalf("client %d received winner %s, want %s", i, match[1], chain[n+1].Validator)
				}
			}
		}
	})
}

// Thousands of clients that take each message late, even just in time not to be given up,
// hold up neither the others nor the next draw.
func TestLateClientsHoldUpNobody(t *testing.T) {
	const clients = 2000
	set := func(s *server) {
		s.maxValidators = clients + 1
		s.lottery.broadcastInterval = time.Hour
	}
	runServerWith(t, set, func(ts *testServer) {
		var late atomic.Int64
		ts.Cleanup(func() { ts.advance(time.Duration(late.Load())) }) // the clients end, also after a failure
		for range clients {
			ts.joinLate(&late)
		}
		last := ts.join(1)
		for _, d := range []time.Duration{1100 * time.Microsecond, 9 * time.Second, 20 * time.Second} {
			late.Store(int64(d))
			for range 2 {
				last.send("72\n")
				last.received.take()
				ts.advance(29400 * time.Millisecond)
				last.want("")
				ts.advance(100 * time.Millisecond) // to the tick
				last.want(last.won(1))
				ts.advance(500 * time.Millisecond)
			}
			ts.wantValidators(clients+1, int64(clients)+1)
		}
	})
}

// A failing Accept is tried again, later and later, and then all is as before.
func TestAcceptFails(t *testing.T) {
	runServer(t, func(ts *testServer) {
		staked, begun := ts.join(100), time.Now().Add(-500*time.Millisecond)
		drawIn := func() time.Duration { return 30*time.Second - time.Since(begun) }
		fail := func(delay string) {
			t.Helper()
			ts.log.take()
			ts.listener.Accepts <- errors.New("too many open files")
			synctest.Wait()
			ts.wantLog("cannot accept a connection, trying again in " + delay + ": too many open files\n")
			staked.send("\n") // those that are connected notice nothing
			staked.want(noBPM(1, 0, drawIn()))
		}
		waited := time.Duration(0)
		for _, delay := range []string{"5ms", "10ms", "20ms", "40ms", "80ms", "160ms", "320ms", "640ms", "1s", "1s"} {
			start := time.Now()
			fail(delay)
			if d := time.Since(start); d != waited {
				t.Errorf("waited %v, want %v", d, waited)
			}
			waited, _ = time.ParseDuration(delay)
		}
		ts.join(200)
		fail("5ms")
	})
}

func TestStop(t *testing.T) {
	runServer(t, func(ts *testServer) {
		unstaked, staked, halfClosed, stalled := ts.connect(), ts.join(100), ts.join(200), ts.connectStalled()
		unstaked.want(balancePrompt)
		staked.send("7") // half a line
		halfClosed.halfClose()
		start := time.Now()
		ts.stop()
		unstaked.wantClosed(shuttingDown)
		staked.wantClosed(shuttingDown)
		halfClosed.wantClosed(shuttingDown)
		if d := time.Since(start); d > 2*time.Second {
			t.Errorf("stopped after %v, want at most 2s", d)
		}
		if _, err := stalled.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("reading: %v, want EOF", err)
		}
	})
}

// Everyone is told of a stop at once, also while a block is being written. A disk that
// does not answer holds up the end for some seconds at most.
func TestStopWhileSyncing(t *testing.T) {
	for _, test := range []struct {
		takes time.Duration // the fsync
		want  time.Duration // the stop
		err   error
	}{
		{3 * time.Second, 2500 * time.Millisecond, nil}, // it began half a second before
		{time.Hour, stopLimit, errNoAnswer},
	} {
		set := func(s *server) {
			name, _ := newChainFile(t, 1)
			chain := open(t, name)
			*s.lottery.chain = *chain
			s.lottery.chain.file = &hookedFile{chain.file, func() error { time.Sleep(test.takes); return nil }}
		}
		runServerWith(t, set, func(ts *testServer) {
			c := ts.join(1)
			c.send("72\n")
			ts.advance(30 * time.Second)
			c.received.take()
			start := time.Now()
			go func() {
				synctest.Wait()
				c.wantClosed(shuttingDown)
				if d := time.Since(start); d != 0 {
					t.Errorf("told after %v", d)
				}
			}()
			ts.stop()
			if d := time.Since(start); d != test.want || ts.err != test.err {
				t.Errorf("stopped after %v, %v, want %v, %v", d, ts.err, test.want, test.err)
			}
			ts.advance(test.takes)
			c.want("") // it was not announced
		})
	}
}

// Nothing follows the last line, also if it is not taken at once.
func TestLastLineIsTheLast(t *testing.T) {
	runServer(t, func(ts *testServer) {
		c := ts.joinStalled()
		c.send("x\n")
		ts.announce(new(validator), 0)
		received, err := io.ReadAll(c)
		if want := c.forfeits(`"x"`); string(received) != want || err != nil {
			t.Errorf("received %q, %v, want %q", received, err, want)
		}
	})
}

// The last line of a half-closed client comes after what is being written to it.
func TestStopWhileWriting(t *testing.T) {
	runServer(t, func(ts *testServer) {
		c := ts.joinStalled()
		c.halfClose()
		synctest.Wait()
		ts.broadcast(ts.lottery.chain.latest())
		synctest.Wait()
		go ts.stop()
		synctest.Wait()
		received, err := io.ReadAll(c)
		want := ts.chain() + shuttingDown
		if string(received) != want || err != nil {
			t.Errorf("received %q, %v, want %q", received, err, want)
		}
	})
}

// wantBounded checks that there are no more connections than allowed.
func (ts *testServer) wantBounded() {
	ts.Helper()
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if len(ts.clients) > ts.maxValidators || ts.refusals > maxRefusals {
		ts.Errorf("%d clients and %d refusals", len(ts.clients), ts.refusals)
	}
}

// terminalSafe reports whether the text may reach a terminal or the log: whether
// it is made of what Go's %q leaves as it is, and line ends.
func terminalSafe(text string) bool {
	text = strings.ReplaceAll(text, "\r\n", "\n")
	return utf8.ValidString(text) && !strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) })
}

// Whatever clients do, nobody else notices and nothing of them is left behind.
func TestHostileClients(t *testing.T) {
	const broadcastEvery = 7 * time.Second
	for name, attack := range map[string]func(ts *testServer){
		"says nothing": func(ts *testServer) {
			for range 100 {
				ts.connect()
			}
		},
		"never reads": func(ts *testServer) {
			ts.connectStalled()
			ts.joinStalled().send("72\n")
			ts.joinStalled()
		},
		"never reads and half-closes": func(ts *testServer) {
			ts.joinStalled().halfClose()
			c := ts.joinStalled()
			c.send("72\n")
			c.halfClose()
		},
		"reads a byte a second": func(ts *testServer) {
			c := ts.joinStalled()
			c.send("72\n")
			go func() {
				for one := make([]byte, 1); ; time.Sleep(time.Second) {
					if _, err := c.Read(one); err != nil {
						return
					}
				}
			}()
			ts.Cleanup(func() { ts.advance(time.Second) })
		},
		"sends 100,000 lines and reads nothing": func(ts *testServer) {
			ts.joinStalled().flood("72\n")
		},
		"sends blank lines and reads nothing": func(ts *testServer) {
			ts.connectStalled().flood("\n")
			ts.joinStalled().flood("\n")
		},
		"asks for timing marks and reads nothing": func(ts *testServer) {
			ts.connectStalled().flood(doMark)
			ts.joinStalled().flood(doMark)
			ts.joinStalled().flood("7" + doMark + "2\n")
		},
		"sends a megabyte without a line end": func(ts *testServer) {
			io.WriteString(ts.connect(), strings.Repeat("1", 1_000_000))
			io.WriteString(ts.join(1), strings.Repeat("x", 1_000_000))
		},
		"sends what means nothing": func(ts *testServer) {
			c := ts.join(1)
			io.WriteString(c, strings.Repeat("\x00\b\x1b[A\xff\xf1", 10_000))
			c.Close()
		},
		"sends every byte value": func(ts *testServer) {
			for b := range 256 {
				for _, c := range []*testClient{ts.connect(), ts.join(1)} {
					c.Write([]byte{byte(b), '\n'})
					synctest.Wait()
					if received := c.received.take(); !terminalSafe(received) {
						ts.Errorf("after byte %#x: received %q", b, received)
					}
					c.Close()
				}
				ts.advance(time.Second)
			}
		},
		"closes in the middle of anything": func(ts *testServer) {
			const text = "\n100\n72\n73\nno"
			for cut := range len(text) + 1 {
				closes, halfCloses, stalls := ts.connect(), ts.connect(), ts.connectStalled()
				io.WriteString(closes, text[:cut])
				closes.Close()
				io.WriteString(halfCloses, text[:cut])
				halfCloses.halfClose()
				stalls.SetWriteDeadline(time.Now().Add(time.Millisecond))
				io.WriteString(stalls, text[:cut])
				stalls.halfClose()
			}
		},
		"joins, proposes and hangs up": func(ts *testServer) {
			for range 10 * ts.maxValidators {
				c := ts.connect()
				io.WriteString(c, "1\n72\n")
				c.Close()
			}
			synctest.Wait()
			if n := len(ts.clients); n > ts.maxValidators {
				ts.Errorf("%d clients, want at most %d", n, ts.maxValidators)
			}
		},
		"joins, proposes and is disqualified": func(ts *testServer) {
			for range 10 * ts.maxValidators {
				c := ts.connect()
				io.WriteString(c, "1\n72\nx\n")
				c.Close()
			}
			synctest.Wait()
			if n := len(ts.lottery.round.tempBlocks); n > ts.maxValidators {
				ts.Errorf("%d candidates, want at most %d", n, ts.maxValidators)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			set := func(s *server) {
				s.maxValidators = 120
				s.lottery.broadcastInterval = broadcastEvery
				for s.lottery.chain.head.Index < 1000 {
					appendBlock(t, s.lottery.chain)
				}
				s.lottery.round.index = 1001
			}
			runServerWith(t, set, func(ts *testServer) {
				bystander := ts.join(1000)
				attack(ts)
				rounds := 5
				if name == "says nothing" {
					rounds = 21 // until after balanceLimit
				}
				for round := range rounds {
					bystander.send("72\n")
					want, _, _ := strings.Cut(bystander.proposes(ts.lottery.round.index, 72, 1000, 0), "1000 tokens")
					if received := bystander.received.take(); !strings.Contains(received, want) {
						t.Fatalf("round %d: the bystander received %.1000q, want %q", round, received, want)
					}
					for range 30 {
						ts.advance(time.Second)
						ts.wantBounded()
					}
					if received := bystander.received.take(); strings.Count(received, "winning validator: ") != 1 || strings.Count(received, "\n[{") < 4 {
						t.Fatalf("round %d: the bystander received %.200q", round, received)
					}
				}
				left := 1
				if name == "reads a byte a second" {
					left = 2
				}
				if len(ts.clients) != left || len(ts.lottery.validators) != left || ts.refusals != 0 {
					t.Errorf("%d clients, %d validators and %d refusals are left, want %d", len(ts.clients), len(ts.lottery.validators), ts.refusals, left)
				}
				if logged := ts.log.take(); !terminalSafe(logged) {
					t.Errorf("logged %q", logged)
				}
			})
		})
	}
}

// A stop takes at most five seconds however many are connected, whatever they do.
func TestStopWithThousands(t *testing.T) {
	set := func(s *server) { s.maxValidators = 3000 }
	runServerWith(t, set, func(ts *testServer) {
		var all []*testClient
		for i := range ts.maxValidators {
			switch i % 3 {
			case 0:
				all = append(all, ts.connect())
			case 1:
				c := ts.connect()
				io.WriteString(c, "100\n72\n")
				all = append(all, c)
			case 2:
				ts.connectStalled()
			}
		}
		ts.advance(time.Second)
		start := time.Now()
		ts.stop()
		if d := time.Since(start); d > 5*time.Second {
			t.Errorf("the stop took %v", d)
		}
		for _, c := range all {
			synctest.Wait()
			if received := c.received.take(); !strings.HasSuffix(received, shuttingDown) {
				t.Fatalf("received %q", received)
			}
		}
	})
}

// What is typed is what was meant, at the stake and after it, however it is cut: it is the
// same session as that of the lines in want.
func TestTyped(t *testing.T) {
	for _, test := range []struct{ sent, want string }{
		{"\xff\xfb\x1f\xff\xfb\x20\xff\xfb\x18\xff\xfb\x27\xff\xfd\x01\xff\xfb\x03\xff\xfd\x03100\r\n72\r\n", "100\r\n72\r\n"}, // PuTTY
		{"1\xff\xfb\x010\xff\xfc\xff0\xff\xfd\n\n\xff\xfe\xff7\xff\xf12\n", "100\r\n72\r"},                                     // options that look like something else
		{"\x7f100\r\x0073\b2\r\x00", "100\r72\r"},                                                                              // telnet in character mode
		{"101\xff\xf70\x1b[D\r\x1b[A72\r", "100\r72\r"},
		{"99\x15100\n70\x1772\x1bOP\n", "100\n72\n"},
		{"100\n72\x04oops\n", "100\n72"},
		{"100\n72\nx\x03oops\n", "100\n72\n\x03"},
	} {
		want, wantLogged := transcript(t, []byte(test.want))
		for cut := range len(test.sent) {
			received, logged := transcript(t, []byte(test.sent[:cut]), []byte(test.sent[cut:]))
			if received != want || logged != wantLogged {
				t.Errorf("%q cut at %d: received %q\nlogged %q\nas %q: received %q\nlogged %q", test.sent, cut, received, logged, test.want, want, wantLogged)
			}
		}
	}
}

// The LF or NUL of a line end belongs to it also when a draw comes between.
func TestLineEndAroundDraw(t *testing.T) {
	for _, rest := range []string{"\n", "\x00"} {
		runServer(t, func(ts *testServer) {
			c := ts.join(100)
			c.send("72\r")
			c.want(strings.ReplaceAll(c.proposes(1, 72, 100, 30*time.Second), "\n", "\r\n"))
			ts.advance(30 * time.Second)
			c.want(strings.ReplaceAll(c.won(100), "\n", "\r\n"))
			c.send(rest)
			c.want("")
			c.send("73" + rest)
			if received := c.received.take(); (received != "") != (rest == "\n") {
				t.Errorf("after 73 and %q received %q", rest, received)
			}
		})
	}
}

// Ctrl-C closes the connection at once; stake and block stay for the draw.
func TestInterrupt(t *testing.T) {
	for _, sent := range []string{"7\x03", "7\xff\xf4\xff\xfd\x06", "7\xff\xf3"} { // Ctrl-C, telnet's, Break
		runServer(t, func(ts *testServer) {
			c, other := ts.join(100), ts.join(1)
			c.send("72\n")
			c.received.take()
			c.send(sent)
			c.wantClosed("")
			ts.wantValidators(2, 101)
			ts.wantLog("validator " + c.address + " disconnects; its stake counts until the next draw\n")
			ts.advance(30 * time.Second)
			other.want(c.wins(100))
			c.want("")
			ts.wantValidators(1, 1)
		})
	}
}

// FuzzSession says that whatever a client sends, it receives the same however that is
// cut, and nothing that controls a terminal.
func FuzzSession(f *testing.F) {
	f.Add([]byte("100\n72\n\n73\r\noops\n72\n"), uint16(5))
	f.Add([]byte(" +5 \r\n-999999999999999"), uint16(20))
	f.Add([]byte("\x1b[2J\xff\xff\x00\n"), uint16(2))
	f.Add([]byte("1\n"+strings.Repeat("0", 64)+"\r\n"+strings.Repeat("0", 65)+"\n"), uint16(67))
	f.Add([]byte("\xff\xfb\x1f100\n\xff\xfa\x18\x00x\xff\xf072\n7\xff\xf4\xff\xfd\x06"), uint16(9))
	f.Add([]byte("100\r\x0073\x7f2\r7\x04"), uint16(4))
	f.Add([]byte("100\n7\xff\xed"+doMark+"2\n\n"+doMark+"\x01\x0072\n"), uint16(9))
	f.Fuzz(func(t *testing.T, sent []byte, cut uint16) {
		at := min(int(cut), len(sent))
		want, wantLogged := transcript(t, sent)
		received, logged := transcript(t, sent[:at], sent[at:])
		if received != want || logged != wantLogged {
			t.Errorf("%q cut at %d: received %q\nlogged %q\nuncut: received %q\nlogged %q", sent, cut, received, logged, want, wantLogged)
		}
		if !terminalSafe(strings.ReplaceAll(received, mark, "")) || !terminalSafe(logged) {
			t.Errorf("received %q\nlogged %q", received, logged)
		}
	})
}

// transcript is what a client receives, and what is logged, from its connecting to
// the draw after it has sent the parts and closed its sending half.
func transcript(t *testing.T, parts ...[]byte) (received, logged string) {
	runServer(t, func(ts *testServer) {
		c := ts.connect()
		for _, part := range parts {
			c.Write(part)
			synctest.Wait()
		}
		c.halfClose()
		ts.advance(30 * time.Second)
		received, logged = c.received.peek(), ts.log.take()
		c.wantClosed(received)
	})
	return addressPattern.ReplaceAllString(received, "ADDRESS"), addressPattern.ReplaceAllString(logged, "ADDRESS")
}
