package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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
	c := &testClient{testServer: ts, Conn: mine, closed: make(chan struct{})}
	ts.Cleanup(func() { mine.Close() })
	ts.listener.Accepts <- net.Conn(its)
	return c
}

// joinStalled returns a client with one token that reads nothing more.
func (ts *testServer) joinStalled() *testClient {
	ts.Helper()
	c := ts.connectStalled()
	io.ReadFull(c, make([]byte, len("Enter token balance:")))
	c.send("1\n")
	io.ReadFull(c, make([]byte, len("validator ")+64+len(" stakes 1 tokens\n"+rule+"\n\nEnter a new BPM:")))
	synctest.Wait()
	return c
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

const rule = "Each round, enter a whole number to propose a block; anything else forfeits the tokens."

var welcome = regexp.MustCompile(`^Enter token balance:validator ([0-9a-f]{64}) stakes ([0-9]+) tokens\n` + rule + `\n\nEnter a new BPM:`)

// join returns a client that stakes so many tokens and has received the reply.
func (ts *testServer) join(stake int) *testClient {
	ts.Helper()
	c := ts.connect()
	c.send(fmt.Sprintf("%d\n", stake))
	received := c.received.take()
	match := welcome.FindStringSubmatch(received)
	if match == nil || match[0] != received || match[2] != fmt.Sprint(stake) {
		ts.Fatalf("received %q after staking %d", received, stake)
	}
	c.address, c.stake = match[1], stake
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

// halfClose closes the client's sending half.
func (c *testClient) halfClose() {
	c.Conn.(*tcptest.Conn).CloseWrite()
	synctest.Wait()
}

// wins is what all others receive if the client wins a draw of so many tokens.
func (c *testClient) wins(tokens int) string {
	return fmt.Sprintf("\nwinning validator: %s with %d of %d tokens\n\nEnter a new BPM:", c.address, c.stake, tokens)
}

// won is what the client itself receives then.
func (c *testClient) won(tokens int) string {
	return fmt.Sprintf("\nwinning validator: %s (you) with %d of %d tokens\n\nEnter a new BPM:", c.address, c.stake, tokens)
}

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

func TestSession(t *testing.T) {
	runServer(t, func(ts *testServer) {
		c := ts.connect()
		c.want("Enter token balance:")
		c.send("\n")
		c.want("Enter token balance:")
		c.send(" \t\n")
		c.want("Enter token balance:")
		c.send("100\n")
		received := c.received.take()
		if !regexp.MustCompile(`^validator [0-9a-f]{64} stakes 100 tokens\n` + rule + `\n\nEnter a new BPM:$`).MatchString(received) {
			t.Fatalf("received %q", received)
		}
		c.address, c.stake = strings.Fields(received)[1], 100
		ts.wantLog("validator " + c.address + " joins from pipe with 100 tokens; validators: 1, tokens: 100\n")
		c.send("\n")
		c.want("\nEnter a new BPM:")

		ts.advance(12100 * time.Millisecond) // 12.6 s of the round have passed
		c.send("72\n")
		c.want("block 1 proposed with BPM 72: 100 of 100 tokens so far, draw in 17s\n\nEnter a new BPM:")
		ts.advance(5 * time.Second)
		c.send("73\n")
		c.want("block 1 already proposed with BPM 72: 100 of 100 tokens so far, draw in 12s\n\nEnter a new BPM:")
		ts.advance(12 * time.Second)
		c.want("")
		ts.stdout.take() // the genesis block
		ts.advance(time.Second)
		c.want(c.won(100))
		ts.wantLog("block 1: validator " + c.address + " wins with 100 tokens; candidates: 1, tokens: 100\n")
		if dump := ts.stdout.take(); !strings.HasPrefix(dump, "(main.Block) {\n Index: (int) 1,\n") || !strings.Contains(dump, " BPM: (int) 72,\n") {
			t.Errorf("printed %s", dump)
		}
	})
}

// A validator that proposes nothing receives the winner and the chain too; a client that
// has not staked receives neither.
func TestEverybodyHears(t *testing.T) {
	runServer(t, func(ts *testServer) {
		proposer, listener, unstaked := ts.join(5), ts.join(7), ts.connect()
		unstaked.want("Enter token balance:")
		proposer.send("72\n")
		proposer.received.take()
		ts.advance(30 * time.Second)
		proposer.want(proposer.won(5))
		listener.want(proposer.wins(5))

		proposer.send("73\n")
		proposer.want("block 2 proposed with BPM 73: 5 of 5 tokens so far, draw in 30s\n\nEnter a new BPM:")
		ts.advance(29 * time.Second)
		proposer.want("")
		ts.advance(time.Second) // a draw and a broadcast at once: the draw first, the broadcast with its block
		chain := "\n[" + string(ts.lottery.chain.latest()) + "]\n\nEnter a new BPM:"
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
			address := regexp.MustCompile("[0-9a-f]{64}").FindString(received)
			want := "Enter token balance:Enter token balance:validator " + address + " stakes 100 tokens\n" + rule + "\n\nEnter a new BPM:" +
				"\nEnter a new BPM:block 1 proposed with BPM 72: 100 of 100 tokens so far, draw in 30s\n\nEnter a new BPM:block 1 already proposed with BPM 72: 100 of 100 tokens so far, draw in 30s\n\nEnter a new BPM:"
			if want = strings.ReplaceAll(want, "\n", "\r\n"); received != want {
				t.Errorf("cut at %d: received %q\nwant %q", cut, received, want)
			}
		})
	}
}

func TestNumbers(t *testing.T) {
	const badBalance = "token balance must be a whole number from 1 to 1000000000000, got %s\n"
	const badBPM = "BPM must be a whole number of at most 15 digits, got %s: 100 staked tokens forfeited\n"
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
		{line: "\x1b[2J\x07\x00\xff\xff\t\v\x1b", quote: `"\a\xff"`},
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
				c.want("Enter token balance:")
				io.WriteString(c, test.line+"\n")
				if test.balance != "" {
					received := c.received.take()
					synctest.Wait()
					if received += c.received.take(); !strings.Contains(received, " stakes "+test.balance+" tokens\n") {
						t.Errorf("received %q", received)
					}
				} else {
					c.wantClosed(fmt.Sprintf(badBalance, test.quote))
					ts.wantLog("pipe refused: its token balance was " + test.quote + "\n")
					ts.wantValidators(0, 0)
				}
			})
			runServer(t, func(ts *testServer) {
				c := ts.join(100)
				io.WriteString(c, test.line+"\n")
				if test.bpm {
					bpm, _ := strconv.Atoi(strings.TrimSpace(test.line))
					c.want(fmt.Sprintf("block 1 proposed with BPM %d: 100 of 100 tokens so far, draw in 30s\n\nEnter a new BPM:", bpm))
				} else {
					c.wantClosed(fmt.Sprintf(badBPM, test.quote))
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
		c.wantClosed("Enter token balance:token balance must be a whole number from 1 to 500, got \"501\"\n")
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
			if received := c.received.take(); strings.Count(received, "\r\n") != 3 || strings.Count(received, "\n") != 3 {
				t.Errorf("after %q received %q", sent, received)
			}
			terminals = append(terminals, c)
		}
		winner.send("72\n")
		winner.received.take()
		ts.advance(time.Minute)
		chain := "\n[" + string(ts.lottery.chain.latest()) + "]\n\nEnter a new BPM:"
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
		bad.wantClosed("block 1 proposed with BPM 72: 1000000000000 of 1000000000000 tokens so far, draw in 30s\n\nEnter a new BPM:" +
			"BPM must be a whole number of at most 15 digits, got \"oops\": 1000000000000 staked tokens forfeited\n")
		ts.wantValidators(1, 1)
		ts.advance(30 * time.Second)
		good.want("block 1 proposed with BPM 73: 1 of 1000000000001 tokens so far, draw in 30s\n\nEnter a new BPM:" + good.won(1))
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
		c.wantClosed("BPM must be a whole number of at most 15 digits, got \"oops\": 100 staked tokens forfeited\n")
		ts.advance(4 * time.Second)
		if _, err := io.WriteString(c, "72\n"); err == nil {
			t.Error("the connection still takes lines")
		}
	})
}

func TestNoBalance(t *testing.T) {
	runServer(t, func(ts *testServer) {
		c := ts.connect()
		c.want("Enter token balance:")
		ts.advance(10*time.Minute - time.Second)
		c.send("\n1") // no more time for that
		c.want("Enter token balance:")
		ts.advance(999 * time.Millisecond)
		c.want("")
		ts.advance(time.Millisecond)
		c.wantClosed("\nno token balance within 10m0s\n")
		ts.wantLog("pipe refused: no token balance within 10m0s\n")

		staked := ts.join(100) // from then on there is no limit
		ts.advance(24 * time.Hour)
		staked.received.take()
		staked.send("72\n")
		staked.want("block 1 proposed with BPM 72: 100 of 100 tokens so far, draw in 30s\n\nEnter a new BPM:")
	})
}

// A client that hangs up before it has staked leaves no validator.
func TestHangUpBeforeBalance(t *testing.T) {
	runServer(t, func(ts *testServer) {
		for _, sent := range []string{"", "\n", " "} {
			c := ts.connect()
			c.send(sent)
			c.halfClose()
			c.received.take()
			c.wantClosed("")
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
		c.want("block 1 proposed with BPM 7: 100 of 100 tokens so far, draw in 30s\n\nEnter a new BPM:")
		ts.wantLog("validator " + c.address + " disconnects; its stake counts until the next draw\n")
		ts.advance(30 * time.Second) // a draw, and then a broadcast, which it does not receive
		c.wantClosed("\nwinning validator: " + c.address + " (you) with 100 of 100 tokens\n")
		ts.wantValidators(0, 0)
	})
}

// A stake, a proposal and a hang-up are one step for whoever announces: a result is queued
// before it or after its reply.
func TestOneStep(t *testing.T) {
	for name, step := range map[string]func(ctx context.Context, s *server, c *client){
		"stake":   func(_ context.Context, s *server, c *client) { s.stake(c, []byte("1")) },
		"propose": func(_ context.Context, s *server, c *client) { s.propose(c, []byte("72")) },
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
		c.want("\n[" + string(ts.lottery.chain.latest()) + "]\n\nEnter a new BPM:")
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
	const full = "server full, try again later\n"
	set := func(s *server) { s.maxValidators = 2 }
	runServerWith(t, set, func(ts *testServer) {
		staked, unstaked := ts.join(100), ts.connect()
		unstaked.want("Enter token balance:")
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
		staked.want("\nEnter a new BPM:")
		ts.advance(time.Second)
		if n := ts.refused(); n != 0 {
			t.Errorf("%d refusals when their connections are closed, want 0", n)
		}
	})
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
		winner := strings.Repeat("a", 64)
		ts.announce(&validator{address: winner, stake: 5}, 7)
		want := "\nwinning validator: " + winner + " with 5 of 7 tokens\n\nEnter a new BPM:"
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
			logged = ts.log.take()
		}
		if !strings.Contains(logged, " dropped: it is 64 messages behind; its stake counts until the next draw\n") {
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
		ts.stop()
		ts.advance(time.Duration(late.Load())) // the clients end
	})
}

// A failing Accept is tried again, later and later, and then all is as before.
func TestAcceptFails(t *testing.T) {
	runServer(t, func(ts *testServer) {
		staked := ts.join(100)
		fail := func(delay string) {
			t.Helper()
			ts.log.take()
			ts.listener.Accepts <- errors.New("too many open files")
			synctest.Wait()
			ts.wantLog("cannot accept a connection, trying again in " + delay + ": too many open files\n")
			staked.send("\n") // those that are connected notice nothing
			staked.want("\nEnter a new BPM:")
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
		unstaked.want("Enter token balance:")
		staked.send("7") // half a line
		halfClosed.halfClose()
		start := time.Now()
		ts.stop()
		unstaked.wantClosed("\nserver shutting down\n")
		staked.wantClosed("\nserver shutting down\n")
		halfClosed.wantClosed("\nserver shutting down\n")
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
				c.wantClosed("\nserver shutting down\n")
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
		if want := "BPM must be a whole number of at most 15 digits, got \"x\": 1 staked tokens forfeited\n"; string(received) != want || err != nil {
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
		want := fmt.Sprintf("\n[%s]\n%s\nserver shutting down\n", ts.lottery.chain.latest(), bpmPrompt)
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
		},
		"sends a megabyte without a line end": func(ts *testServer) {
			io.WriteString(ts.connect(), strings.Repeat("1", 1_000_000))
			io.WriteString(ts.join(1), strings.Repeat("\x01", 1_000_000))
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
					want := fmt.Sprintf("block %d proposed with BPM 72: 1000 of ", ts.lottery.round.index)
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
			if received := c.received.take(); !strings.HasSuffix(received, "\nserver shutting down\n") {
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
			c.want("block 1 proposed with BPM 72: 100 of 100 tokens so far, draw in 30s\r\n\r\nEnter a new BPM:")
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
	f.Fuzz(func(t *testing.T, sent []byte, cut uint16) {
		at := min(int(cut), len(sent))
		want, wantLogged := transcript(t, sent)
		received, logged := transcript(t, sent[:at], sent[at:])
		if received != want || logged != wantLogged {
			t.Errorf("%q cut at %d: received %q\nlogged %q\nuncut: received %q\nlogged %q", sent, cut, received, logged, want, wantLogged)
		}
		if !terminalSafe(received) || !terminalSafe(logged) {
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
	address := regexp.MustCompile("[0-9a-f]{64}")
	return address.ReplaceAllString(received, "ADDRESS"), address.ReplaceAllString(logged, "ADDRESS")
}
