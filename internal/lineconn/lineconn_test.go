package lineconn

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"proof-of-stake/internal/tcptest"
)

// A client is the other end of a Conn.
type client struct {
	*testing.T
	*Conn
	peer, its *tcptest.Conn
}

// run runs f in a bubble of virtual time with a client that has just connected.
func run(t *testing.T, f func(c *client)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		peer, its := tcptest.Pipe()
		defer synctest.Wait()
		defer its.Close()
		defer peer.Close()
		f(&client{t, New(its), peer, its})
	})
}

// echo has a reader reply to each line with the line in brackets, until the line "close",
// which is the last, or an error. The channel receives the error and is closed when the
// connection is.
func (c *client) echo() <-chan error {
	done := make(chan error, 1)
	go func() {
		defer close(done)
		for {
			line, err := c.ReadLine()
			if err != nil {
				done <- err
				c.Conn.Close("")
				return
			}
			if string(line) == "close" {
				c.Conn.Close("closed")
				return
			}
			fmt.Fprintf(c.Conn, "[%s]", line)
		}
	}()
	return done
}

// send sends text, as far as it is read.
func (c *client) send(text string) {
	c.peer.SetWriteDeadline(time.Now().Add(time.Nanosecond))
	io.WriteString(c.peer, text)
	synctest.Wait()
}

// want is what the client receives if it reads everything that is written now.
func (c *client) want(text string) {
	c.Helper()
	if received := c.receive(); received != text {
		c.Fatalf("received %q, want %q", received, text)
	}
}

func (c *client) receive() string {
	var received []byte
	for {
		p := make([]byte, 4096)
		c.peer.SetReadDeadline(time.Now().Add(time.Nanosecond))
		n, err := c.peer.Read(p)
		received = append(received, p[:n]...)
		if err != nil {
			return string(received)
		}
		synctest.Wait()
	}
}

// droppable returns a message that may be left out.
func droppable(pieces ...[]byte) *Message {
	m := NewMessage(pieces...)
	m.Droppable = true
	return m
}

// announce enqueues a message and has it written.
func (c *client) announce(text string) {
	c.Enqueue(NewMessage([]byte(text)))
	c.Flush()
	synctest.Wait()
}

func TestReadLine(t *testing.T) {
	long := strings.Repeat("x", 64)
	for _, test := range []struct {
		sent  string
		lines string // joined with |
		err   error
	}{
		{"", "", io.EOF},
		{"a\nb\n", "a|b", io.EOF},
		{"a\n\n", "a|", io.EOF},
		{"a\nb", "a|b", io.EOF}, // the last line needs no end
		{"a\n \n ", "a||", io.EOF},
		{"\t a b \n", "a b", io.EOF},
		{long + "\n" + long, long + "|" + long, io.EOF},
		{long + long + "\n", "", LineError(long)},
		{"a\n " + long + "\nb\n", "a", LineError(long)},
		{long[2:] + "  z\n", "", LineError(long[2:] + "  ")},
		{strings.Repeat(" ", MaxLine+1), "", LineError("")},
		{"a\nb\x03c\n", "a", ErrInterrupted},
		{"a\nb\x04c\nd\n", "a|b", io.EOF},
		{"a\n\x04b\n", "a", io.EOF},
		{"a\rb\r\nc\r\x00d", "a|b|c|d", io.EOF},
		{"7\x7f8\b9\n", "9", io.EOF},
		{"\x7f", "", io.EOF},
	} {
		for cut := range len(test.sent) + 1 {
			run(t, func(c *client) {
				go func() {
					io.WriteString(c.peer, test.sent[:cut])
					io.WriteString(c.peer, test.sent[cut:])
					c.peer.CloseWrite()
				}()
				var lines []string
				line, err := c.ReadLine()
				for ; err == nil; line, err = c.ReadLine() {
					lines = append(lines, string(line))
				}
				if got := strings.Join(lines, "|"); got != test.lines || err != test.err {
					t.Errorf("%q cut at %d: read %q, %v, want %q, %v", test.sent, cut, got, err, test.lines, test.err)
				}
				if _, again := c.ReadLine(); test.err == io.EOF && again != io.EOF {
					t.Errorf("%q cut at %d: after the end: %v", test.sent, cut, again)
				}
			})
		}
	}
}

// The read deadline ends ReadLine and nothing else.
func TestSetReadDeadline(t *testing.T) {
	run(t, func(c *client) {
		start := time.Now()
		c.SetReadDeadline(start.Add(time.Minute))
		if _, err := c.ReadLine(); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != time.Minute {
			t.Errorf("ReadLine: %v after %v", err, time.Since(start))
		}
		if err := c.Err(); err != nil {
			t.Errorf("the connection was reset: %v", err)
		}
	})
}

// When ReadLine returns io.EOF the replies are written: the reader may then wait for other things.
func TestRepliesBeforeEOF(t *testing.T) {
	run(t, func(c *client) {
		go func() {
			for line, err := c.ReadLine(); err == nil; line, err = c.ReadLine() {
				fmt.Fprintf(c.Conn, "[%s]", line)
			}
		}()
		c.send("a\nb\x04")
		c.want("[a][b]")
	})
}

// The replies to lines that are read at once are written at once.
func TestRepliesAreJoined(t *testing.T) {
	run(t, func(c *client) {
		c.echo()
		c.send("a\nb\nc\n")
		p := make([]byte, 100)
		if n, err := c.peer.Read(p); err != nil || string(p[:n]) != "[a][b][c]" {
			t.Errorf("received %q at once, %v", p[:n], err)
		}
	})
}

// Lines are read while something is written to the client, until 64 replies wait.
func TestReadsWhileWriting(t *testing.T) {
	run(t, func(c *client) {
		done := c.echo()
		c.announce("<a long text>")
		want := "<a long text>"
		for i := range 64 {
			c.send(fmt.Sprintf("%d\n", i))
			want += fmt.Sprintf("[%d]", i)
			if i%10 == 0 {
				c.announce("<>") // which does not count
				want += "<>"
			}
		}
		sent := make(chan error)
		go func() {
			c.peer.SetWriteDeadline(time.Now().Add(time.Minute))
			_, err := io.WriteString(c.peer, "65\n")
			sent <- err
		}()
		synctest.Wait()
		select {
		case <-sent:
			t.Error("a line was read while 64 replies wait")
		default:
		}
		c.want(want + "[65]")
		if err := <-sent; err != nil {
			t.Error(err)
		}
		c.peer.CloseWrite()
		<-done
	})
	run(t, func(c *client) { // also if the lines come at once
		handled := 0
		go func() {
			for {
				if _, err := c.ReadLine(); err != nil {
					return
				}
				handled++
				c.Write([]byte("[]"))
			}
		}()
		synctest.Wait()
		c.announce("<a long text>")
		c.peer.SetWriteDeadline(time.Now().Add(time.Second))
		n, _ := io.WriteString(c.peer, strings.Repeat("\n", 1000))
		synctest.Wait()
		if handled != 64 || n > 64+len(c.input) {
			t.Errorf("%d lines were handled and %d read while nothing is taken, want 64 and what is read ahead", handled, n)
		}
		c.want("<a long text>" + strings.Repeat("[]", n))
	})
	run(t, func(c *client) { // also if no other write makes room
		c.echo()
		c.send(strings.Repeat("\n", 66))
		c.want(strings.Repeat("[]", 66))
	})
	run(t, func(c *client) { // and again as soon as the replies are taken, whatever is behind them
		c.echo()
		c.announce("<1>")
		want := "<1>"
		for i := range 64 {
			c.send(fmt.Sprintf("%d\n", i))
			want += fmt.Sprintf("[%d]", i)
		}
		c.announce("<2>")
		go io.WriteString(c.peer, "64\n65\n")
		synctest.Wait()
		received := make([]byte, len(want))
		if _, err := io.ReadFull(c.peer, received); err != nil || string(received) != want {
			t.Errorf("received %q, %v, want %q", received, err, want)
		}
		c.peer.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := io.WriteString(c.peer, "66\n"); err != nil {
			t.Errorf("a line is not read although no reply waits: %v", err)
		}
		c.want("<2>[64][65][66]")
	})
}

// Replies and messages are written in the order in which they were queued, however the client
// sends and takes.
func TestOrder(t *testing.T) {
	for seed := range uint64(300) {
		run(t, func(c *client) {
			random := rand.New(rand.NewPCG(seed, 0))
			var want strings.Builder
			enqueue := func() {
				text := fmt.Sprintf("<%d>", want.Len())
				c.Enqueue(NewMessage([]byte(text)))
				want.WriteString(text)
				if random.IntN(2) == 0 {
					c.Flush()
				}
			}
			go func() {
				for {
					line, err := c.ReadLine()
					if err != nil {
						return
					}
					for range random.IntN(3) {
						enqueue()
					}
					fmt.Fprintf(io.MultiWriter(c.Conn, &want), "[%s]", line)
				}
			}()
			received := ""
			for i := range 30 {
				switch random.IntN(3) {
				case 0:
					text := ""
					for j := range random.IntN(4) {
						text += fmt.Sprintf("%d.%d\n", i, j)
					}
					c.send(text)
				case 1:
					enqueue()
					synctest.Wait()
				case 2:
					received += c.receive()
				}
			}
			c.Flush()
			if received += c.receive(); received != want.String() {
				t.Fatalf("seed %d: received %s\nwant %s", seed, received, &want)
			}
		})
	}
}

// 64 messages wait for a client beside the one that is being written. At the next it is
// reset, but a droppable message is left out.
func TestQueueIsBounded(t *testing.T) {
	run(t, func(c *client) {
		done := c.echo()
		for range 1 + MaxQueue {
			c.announce("<>")
		}
		c.send("a\n") // a reply does not count
		c.Enqueue(droppable([]byte("dropped")))
		if err := c.Err(); err != nil {
			t.Fatal(err)
		}
		c.announce("<>")
		if err := c.Err(); err != ErrQueueFull || !c.its.WasReset() {
			t.Errorf("after %d messages: %v, reset: %v", 2+MaxQueue, err, c.its.WasReset())
		}
		if err := <-done; err != ErrQueueFull {
			t.Errorf("ReadLine: %v", err)
		}
		<-done
		c.announce("<>") // in vain
	})
	run(t, func(c *client) { // as many again when the first were taken
		c.echo()
		for range 3 {
			for range 1 + MaxQueue {
				c.announce("<>")
			}
			c.want(strings.Repeat("<>", 1+MaxQueue))
		}
		if err := c.Err(); err != nil {
			t.Error(err)
		}
	})
}

// Of the droppable messages one is queued or being written.
func TestDroppable(t *testing.T) {
	run(t, func(c *client) {
		c.echo()
		enqueue := func(text string) {
			c.Enqueue(droppable([]byte(text), []byte(text)))
			c.Flush()
			synctest.Wait()
		}
		enqueue("one")
		enqueue("two")
		c.announce("<>")
		enqueue("three")
		c.want("oneone<>")
		enqueue("four")
		c.want("fourfour")
		c.announce("<>") // is being written
		enqueue("five")  // waits
		enqueue("six")
		c.want("<>fivefive")
	})
}

// A message's text is shared, but for pieces with a line end if the client needs \r\n.
func TestMessageIsShared(t *testing.T) {
	chain := []byte("[]")
	m := NewMessage([]byte("\n"), chain, []byte("\n\n"))
	if &m.text[1][0] != &chain[0] || &m.crlf[1][0] != &chain[0] {
		t.Error("a piece without a line end was copied")
	}
	if got := string(bytes.Join(m.crlf, nil)); got != "\r\n[]\r\n\r\n" {
		t.Errorf("with \\r\\n it is %q", got)
	}
}

// A client that has sent a CR or a telnet command gets \r\n from the reply to that line on.
// Write returns how many bytes it was given, whatever it makes of them.
func TestLineEnds(t *testing.T) {
	for _, sent := range []string{"b\r", "\xff\xf1b\n", "b\xff\xfb\x01\n"} {
		run(t, func(c *client) {
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					line, err := c.ReadLine()
					if err != nil {
						c.Conn.Close("\nend\n")
						return
					}
					if n, err := fmt.Fprintf(c.Conn, "%s\n", line); n != len(line)+1 || err != nil {
						t.Errorf("Write: %d, %v", n, err)
					}
				}
			}()
			c.send("a\na\n" + sent)
			c.want("a\na\nb\r\n")
			c.announce("\n<>\n")
			c.want("\r\n<>\r\n")
			c.send("c\n")
			c.want("c\r\n")
			c.peer.CloseWrite()
			synctest.Wait()
			c.want("\r\nend\r\n")
			<-done
		})
	}
	run(t, func(c *client) { // a prompt after the negotiation
		c.echo()
		c.send("\xff\xfb\x01")
		c.announce("\n<>\n")
		c.want("\r\n<>\r\n")
	})
}

// Close writes what is queued, then the last line and nothing after it, and does not reset.
func TestClose(t *testing.T) {
	run(t, func(c *client) {
		done := c.echo()
		c.announce("<1>")
		c.announce("<2>")
		c.send("a\nclose\nb\n")
		c.announce("<3>")
		received := make([]byte, 100)
		go func() {
			n, _ := io.ReadFull(c.peer, received)
			received = received[:n]
			c.peer.Close()
		}()
		start := time.Now()
		<-done
		synctest.Wait()
		if string(received) != "<1><2>[a]closed" {
			t.Errorf("received %q", received)
		}
		if d := time.Since(start); d != 0 || c.its.WasReset() {
			t.Errorf("closed after %v, reset: %v", d, c.its.WasReset())
		}
		if _, err := c.its.Read(received); err == nil || err == io.EOF {
			t.Errorf("the connection is not closed: %v", err)
		}
	})
	run(t, func(c *client) { // what waits is before it, with the line ends that the line asks for
		go func() {
			c.ReadLine()
			c.Write([]byte("[a]"))
			c.Enqueue(NewMessage([]byte("<\n>")))
			c.Conn.Close("\nend\n")
		}()
		c.send("a\r")
		c.want("[a]<\r\n>\r\nend\r\n")
		c.peer.Close()
	})
}

// After the last line a client that stays is waited for: for a second while it is silent,
// for three in all. One that has closed already is not.
func TestCloseWaits(t *testing.T) {
	for name, test := range map[string]struct {
		client func(c *client)
		want   time.Duration
	}{
		"closes first": {func(c *client) { c.peer.CloseWrite() }, 0},
		"is silent":    {func(c *client) {}, time.Second},
		"sends once": {func(c *client) {
			time.Sleep(900 * time.Millisecond)
			c.send("x")
		}, 1900 * time.Millisecond},
		"sends, and closes": {func(c *client) {
			time.Sleep(900 * time.Millisecond)
			c.send(strings.Repeat("x", 10_000))
			c.peer.CloseWrite()
		}, 900 * time.Millisecond},
		"goes on sending": {func(c *client) {
			for range 10 {
				time.Sleep(700 * time.Millisecond)
				c.send("x")
			}
		}, 3 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, func(c *client) {
				go io.Copy(io.Discard, c.peer)
				start := time.Now()
				var took time.Duration
				var closing sync.WaitGroup
				closing.Go(func() {
					c.Conn.Close("closed")
					took = time.Since(start)
				})
				test.client(c)
				closing.Wait()
				if took.Round(time.Millisecond) != test.want || c.its.WasReset() {
					t.Errorf("closed after %v, reset: %v, want %v", took, c.its.WasReset(), test.want)
				}
			})
		})
	}
}

// Stop ends every wait of the reader: at once, or that for the client to take replies after the
// limit.
func TestStop(t *testing.T) {
	for name, test := range map[string]struct {
		before        func(c *client)
		ended, closed time.Duration
		reset         bool
	}{
		"reading":                    {func(c *client) {}, 0, time.Second, false}, // the client is silent for a second
		"while a message is written": {func(c *client) { c.announce("<>") }, 0, 2 * time.Second, true},
		"while a reply is written":   {func(c *client) { c.send("a\n") }, 0, 2 * time.Second, true},
		"waiting for room": {func(c *client) {
			c.announce("<>")
			c.send(strings.Repeat("\n", 200))
		}, 2 * time.Second, 2 * time.Second, true},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, func(c *client) {
				done := c.echo()
				test.before(c)
				start := time.Now()
				c.Stop(2 * time.Second)
				if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) != test.ended {
					t.Errorf("ReadLine: %v after %v, want %v", err, time.Since(start), test.ended)
				}
				<-done
				if d := time.Since(start); d != test.closed || c.its.WasReset() != test.reset {
					t.Errorf("closed after %v, reset: %v, want %v, %v", d, c.its.WasReset(), test.closed, test.reset)
				}
			})
		})
	}
}

// A timedOut connection is one that the system has given up.
type timedOut struct{ *tcptest.Conn }

func (*timedOut) Read([]byte) (int, error) { return 0, syscall.ETIMEDOUT }

// A writeCounter counts the writes to a connection.
type writeCounter struct {
	*tcptest.Conn
	writes int
}

func (c *writeCounter) Write(p []byte) (int, error) {
	c.writes++
	return c.Conn.Write(p)
}

// Whatever ends the connection is why it was reset, also to the reader.
func TestReset(t *testing.T) {
	run(t, func(c *client) { // the reader waits for room
		done := c.echo()
		c.announce("<>")
		c.send(strings.Repeat("\n", 200))
		for range 1 + MaxQueue {
			c.announce("<>")
		}
		if err := <-done; err != ErrQueueFull || c.Err() != ErrQueueFull || !c.its.WasReset() {
			t.Errorf("ReadLine: %v, Err: %v, reset: %v", err, c.Err(), c.its.WasReset())
		}
	})
	run(t, func(c *client) { // the client takes nothing
		conn := &writeCounter{Conn: c.its}
		c.Conn.conn = conn
		done := c.echo()
		c.announce("<>")
		c.announce("<>")
		if err := <-done; err != ErrTimeout || c.Err() != ErrTimeout {
			t.Errorf("ReadLine: %v, Err: %v", err, c.Err())
		}
		<-done
		if conn.writes != 1 {
			t.Errorf("%d writes, want 1: what is queued is thrown away", conn.writes)
		}
	})
	for _, earlier := range []error{nil, syscall.EPIPE} { // what the writer heard
		run(t, func(c *client) { // the system tells the reader alone that it gives up the client
			c.Conn.conn = &timedOut{c.its}
			c.mu.Lock()
			if earlier != nil {
				c.failLocked(earlier)
			}
			c.mu.Unlock()
			if _, err := c.ReadLine(); err != ErrTimeout || c.Err() != ErrTimeout || !c.its.WasReset() {
				t.Errorf("after %v: ReadLine: %v, Err: %v, reset: %v", earlier, err, c.Err(), c.its.WasReset())
			}
		})
	}
	for _, err := range []error{syscall.ETIMEDOUT, syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.Errno(10060)} {
		if !isTimeout(&net.OpError{Op: "read", Err: os.NewSyscallError("read", err)}) {
			t.Errorf("%v is no timeout", err)
		}
	}
	for _, err := range []error{nil, syscall.ECONNRESET} {
		if isTimeout(err) {
			t.Errorf("%v is a timeout", err)
		}
	}
}

// Ctrl-C hangs up at once, or after 100 ms if something is being written that the client does
// not take. Otherwise the replies to the lines before it are still written.
func TestInterrupt(t *testing.T) {
	run(t, func(c *client) {
		done := c.echo()
		c.announce("<>")
		start := time.Now()
		c.send("a\nb\x03")
		if err := <-done; err != ErrInterrupted {
			t.Errorf("ReadLine: %v", err)
		}
		<-done
		if d := time.Since(start); d.Round(time.Millisecond) != 100*time.Millisecond || !c.its.WasReset() {
			t.Errorf("closed after %v, reset: %v", d, c.its.WasReset())
		}
	})
	run(t, func(c *client) {
		done := c.echo()
		c.send("a\nb\x03")
		if err := <-done; err != ErrInterrupted {
			t.Errorf("ReadLine: %v", err)
		}
		c.want("[a]")
		c.peer.Close()
		<-done
		if c.its.WasReset() {
			t.Error("the connection was reset")
		}
	})
}

// A Stop does not cut short the wait after a last line.
func TestStopWhileClosing(t *testing.T) {
	run(t, func(c *client) {
		go io.Copy(io.Discard, c.peer)
		start := time.Now()
		time.AfterFunc(100*time.Millisecond, func() { c.Stop(2 * time.Second) })
		c.Conn.Close("end")
		if d := time.Since(start); d != time.Second {
			t.Errorf("closed after %v", d)
		}
	})
}

const doTimingMark = "\xff\xfd\x06"

// A timing mark is answered in its place among the replies, and is nothing in the line, however
// it is cut. From then on line ends are \r\n.
func TestTimingMark(t *testing.T) {
	for sent, want := range map[string]string{
		doTimingMark:                                                 "WONT",
		"a\n" + doTimingMark + "b\n":                                 "a\nWONTb\r\n",
		"a\nb" + doTimingMark + "c\nd\n":                             "a\nWONTbc\r\nd\r\n",
		doTimingMark + doTimingMark + "\nb\r\n":                      "WONTWONT\r\nb\r\n",
		"a\n\x1b" + doTimingMark + "[Ab\n":                           "a\nWONTb\r\n",
		"a\r" + doTimingMark + "\nb\n":                               "a\r\nWONTb\r\n",
		"a\n\xff\xed" + doTimingMark + "b\n":                         "a\nWONTb\r\n", // telnet's Ctrl-Z
		"a" + doTimingMark:                                           "WONTa\r\n",    // the last line
		"a" + doTimingMark + "\x04" + doTimingMark:                   "WONTa\r\n",
		"a\n\xff\xfb\x06\xff\xfe\x06\xff\xfa\xff\xfd\x06\xff\xf0b\n": "a\nb\r\n", // other commands
		"a\n\xff\xff\xfd\x06\n":                                      "a\n\xff\xfd\n",
		strings.Repeat("x", MaxLine) + doTimingMark + "\n":           "WONT" + strings.Repeat("x", MaxLine) + "\r\n",
		strings.Repeat("x", MaxLine) + doTimingMark + "yz\n":         "WONT",
		strings.Repeat(doTimingMark, 300) + "a\n":                    strings.Repeat("WONT", 300) + "a\r\n",
	} {
		for cut := range min(len(sent), 100) + 1 {
			run(t, func(c *client) {
				go func() {
					defer c.Conn.Close("")
					for {
						line, err := c.ReadLine()
						if err != nil {
							return
						}
						fmt.Fprintf(c.Conn, "%s\n", line)
					}
				}()
				go func() {
					io.WriteString(c.peer, sent[:cut])
					io.WriteString(c.peer, sent[cut:])
					c.peer.CloseWrite()
				}()
				synctest.Wait()
				if received := strings.ReplaceAll(c.receive(), "\xff\xfc\x06", "WONT"); received != want {
					t.Errorf("%.100q cut at %d: received %q, want %q", sent, cut, received, want)
				}
			})
		}
	}
}

// Beside a message that is being written, the answers to timing marks are behind it, in their
// place among the replies.
func TestTimingMarkWhileWriting(t *testing.T) {
	run(t, func(c *client) {
		c.echo()
		c.Enqueue(droppable([]byte("<a\nlong "), []byte("text>")))
		c.Flush()
		first := make([]byte, len("<a\nl"))
		io.ReadFull(c.peer, first)
		c.send("1\n2" + doTimingMark + "2\n" + doTimingMark)
		c.announce("<\n>")
		c.send(doTimingMark + "3\n")
		const mark = "\xff\xfc\x06"
		c.want("ong text>[1]" + mark + "[22]" + mark + "<\r\n>" + mark + "[3]")
	})
}

// The answers to timing marks are of the 64 replies that may wait: before one of them is
// taken, the next mark is not read.
func TestTimingMarksAreBounded(t *testing.T) {
	const mark = "\xff\xfc\x06"
	for name, test := range map[string]struct{ sent, replies string }{ // twice
		"marks":           {doTimingMark + doTimingMark, mark + mark},
		"a line between":  {doTimingMark + "1\n", mark + "[1]"},
		"in a line":       {"1" + doTimingMark + "2\n", mark + "[12]"},
		"a line first":    {"1\n" + doTimingMark, "[1]" + mark},
		"marks in a line": {"1" + doTimingMark + doTimingMark, mark + mark},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, func(c *client) {
				c.echo()
				c.announce("<>")
				for range MaxQueue / 2 {
					c.send(test.sent)
					if name == "marks in a line" {
						c.send("\x7f")
					}
				}
				c.mu.Lock()
				replies := c.repliesLocked()
				messages, bytes := len(c.queue), 0
				for _, m := range c.queue {
					bytes += len(m.text[0])
				}
				c.mu.Unlock()
				want := strings.Repeat(test.replies, MaxQueue/2)
				if replies != MaxQueue || messages != 1 || bytes != len(want) {
					t.Errorf("%d replies wait in %d messages of %d bytes, want %d in one of %d", replies, messages, bytes, MaxQueue, len(want))
				}
				sent := make(chan error, 1)
				go func() {
					c.peer.SetWriteDeadline(time.Now().Add(time.Minute))
					_, err := io.WriteString(c.peer, doTimingMark)
					sent <- err
				}()
				synctest.Wait()
				select {
				case <-sent:
					t.Error("a mark was read while 64 replies wait")
				default:
				}
				c.want("<>" + want + mark)
				if err := <-sent; err != nil {
					t.Error(err)
				}
			})
		})
	}
	run(t, func(c *client) { // also if they come at once
		c.echo()
		c.announce("<>")
		c.peer.SetWriteDeadline(time.Now().Add(time.Second))
		n, _ := io.WriteString(c.peer, strings.Repeat(doTimingMark, 100_000))
		synctest.Wait()
		c.mu.Lock()
		if replies := c.repliesLocked(); replies != MaxQueue || len(c.queue) != 1 || len(c.queue[0].text[0]) != MaxQueue*len(mark) {
			t.Errorf("%d replies wait in %d messages", replies, len(c.queue))
		}
		c.mu.Unlock()
		if n > MaxQueue*len(doTimingMark)+len(c.input) {
			t.Errorf("%d bytes were read while nothing is taken", n)
		}
		c.want("<>" + strings.Repeat(mark, n/len(mark)))
	})
}

// What comes after the last line is thrown away, timing marks too.
func TestTimingMarkAfterLastLine(t *testing.T) {
	run(t, func(c *client) {
		done := c.echo()
		c.send("close\n" + doTimingMark)
		c.want("closed")
		c.send(doTimingMark)
		c.want("")
		<-done
	})
}
