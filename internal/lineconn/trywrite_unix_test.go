//go:build unix

package lineconn

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"weak"
)

// accept returns both ends of a connection to a listener of Listen.
func accept(t *testing.T, timeout time.Duration) (peer, its *net.TCPConn) {
	t.Helper()
	listener, err := Listen("tcp", "127.0.0.1:0", timeout)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	dialed, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialed.Close() })
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { accepted.Close() })
	return dialed.(*net.TCPConn), accepted.(*net.TCPConn)
}

// Messages to a client that reads nothing are queued at once, and all of them are received
// in order when it does, in whatever pieces they are.
func TestFlushDoesNotWait(t *testing.T) {
	peer, its := accept(t, Timeout)
	c := New(its)
	var want bytes.Buffer
	for i := range 1 + MaxQueue {
		text := bytes.Repeat(fmt.Appendf(nil, "%d.", i), 50_000/len(fmt.Sprint(i)+"."))
		c.Enqueue(NewMessage(text[:i], nil, text[i:len(text)/2], text[len(text)/2:]))
		c.Flush()
		want.Write(text)
	}
	if err := c.Err(); err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	if c.writing == nil || len(c.queue) == 0 {
		t.Error("the system has taken everything; the test needs longer messages")
	}
	c.mu.Unlock()
	var closing sync.WaitGroup
	closing.Go(func() { c.Close("end") })
	want.WriteString("end")
	peer.SetReadDeadline(time.Now().Add(time.Minute))
	received, err := io.ReadAll(peer)
	if err != nil || !bytes.Equal(received, want.Bytes()) {
		t.Errorf("received %d bytes, %v, want %d", len(received), err, want.Len())
	}
	peer.Close()
	closing.Wait()
}

// acceptBusy returns both ends of a connection whose client has not read all of a long
// message that is being written to it.
func acceptBusy(t *testing.T) (peer *net.TCPConn, c *Conn, long []byte) {
	t.Helper()
	peer, its := accept(t, Timeout)
	peer.SetReadBuffer(16 << 10)
	peer.SetReadDeadline(time.Now().Add(time.Minute))
	c, long = New(its), bytes.Repeat([]byte("0123456789"), 1<<20)
	c.Enqueue(NewMessage(long))
	c.Flush()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writing == nil {
		t.Fatal("the system has taken everything; the test needs a longer message")
	}
	return peer, c, long
}

// Lines are read while their client reads nothing of a long message. The replies follow it, and
// then the last line, if the client takes them in the time that Stop leaves it.
func TestRepliesBehindALongMessage(t *testing.T) {
	peer, c, long := acceptBusy(t)
	var lines, want bytes.Buffer
	want.Write(long)
	for i := range MaxQueue {
		fmt.Fprintln(&lines, i)
	}
	peer.Write(lines.Bytes())
	for i := range MaxQueue {
		line, err := c.ReadLine()
		if err != nil || string(line) != fmt.Sprint(i) {
			t.Fatalf("line %d: read %q, %v", i, line, err)
		}
		fmt.Fprintf(io.MultiWriter(c, &want), "[%s]", line)
		if i%10 == 0 {
			c.Enqueue(NewMessage([]byte("<>")))
			c.Flush()
			want.WriteString("<>")
		}
	}
	c.Stop(time.Minute)
	want.WriteString("end")
	var closing sync.WaitGroup
	closing.Go(func() {
		if _, err := c.ReadLine(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("ReadLine: %v, want %v", err, os.ErrDeadlineExceeded)
		}
		c.Close("end")
	})
	received, err := io.ReadAll(peer)
	if err != nil || !bytes.Equal(received, want.Bytes()) {
		t.Errorf("received %d bytes, %v, want %d", len(received), err, want.Len())
	}
	peer.Close()
	closing.Wait()
}

// After Ctrl-C and after Stop a client that does not take what is being written is reset at
// the limit; the system would wait until Timeout.
func TestResetAtLimit(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(peer io.Writer, c *Conn)
		err  error // of ReadLine
	}{
		{"Ctrl-C", func(peer io.Writer, _ *Conn) { io.WriteString(peer, "\x03") }, ErrInterrupted},
		{"Stop", func(_ io.Writer, c *Conn) { c.Stop(10 * time.Millisecond) }, os.ErrDeadlineExceeded},
	} {
		t.Run(test.name, func(t *testing.T) {
			peer, c, _ := acceptBusy(t)
			test.end(peer, c)
			if _, err := c.ReadLine(); !errors.Is(err, test.err) {
				t.Errorf("ReadLine: %v, want %v", err, test.err)
			}
			c.Close("end")
			if err := c.Err(); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the connection was reset because of %v, want %v", err, os.ErrDeadlineExceeded)
			}
			if received, err := io.ReadAll(peer); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("received %d bytes, %v, want %v", len(received), err, syscall.ECONNRESET)
			}
		})
	}
}

// What the system takes at once leaves neither a goroutine nor garbage, and its bytes are not
// changed, since other connections share them.
func TestFlushWritesAtOnce(t *testing.T) {
	peer, its := accept(t, Timeout)
	c := New(its)
	m, reply := NewMessage([]byte("<>")), []byte("[]")
	const runs = 500
	allocations := testing.AllocsPerRun(runs-1, func() { // which runs it once before
		c.Enqueue(m)
		c.Write(reply)
		if replies := c.repliesLocked(); replies != 1 {
			t.Fatalf("%d replies wait, want 1", replies)
		}
		c.Flush()
		if c.writing != nil {
			t.Fatal("the system has not taken everything")
		}
	})
	if allocations > 2 { // since the race detector empties the pools now and then
		t.Errorf("%v allocations for a message and a reply", allocations)
	}
	c.conn.CloseWrite()
	received, err := io.ReadAll(peer)
	if want := strings.Repeat("<>[]", runs); err != nil || string(received) != want {
		t.Errorf("received %d bytes, %v, want %d", len(received), err, len(want))
	}
}

// What tryWrite does not write it returns, and changes neither.
func TestTryWriteReturnsTheRest(t *testing.T) {
	peer, its := accept(t, Timeout)
	text := bytes.Repeat([]byte("0123456789"), 1<<20)
	pieces := [][]byte{text[:1], text[1:1000], text[1000 : len(text)-3], text[len(text)-3:]}
	rest, err := tryWrite(New(its).raw, pieces)
	if err != nil {
		t.Fatal(err)
	}
	left := 0
	for _, piece := range rest {
		left += len(piece)
	}
	if left == 0 || left >= len(text) || !bytes.Equal(bytes.Join(rest, nil), text[len(text)-left:]) || !bytes.Equal(bytes.Join(pieces, nil), text) {
		t.Errorf("of %d bytes %d are left, or they are others", len(text), left)
	}
	if n, err := io.ReadFull(peer, make([]byte, len(text)-left)); err != nil {
		t.Errorf("received %d bytes of the %d that were written: %v", n, len(text)-left, err)
	}
}

// The system says only once why it has given up a client, so tryWrite returns it.
func TestTryWriteReturnsTheError(t *testing.T) {
	peer, its := accept(t, Timeout)
	peer.SetLinger(0)
	peer.Close()
	pieces := [][]byte{[]byte("text")}
	err := error(nil)
	for end := time.Now().Add(time.Minute); err == nil && time.Now().Before(end); { // until the reset is here
		_, err = tryWrite(New(its).raw, pieces)
	}
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("of a connection that was reset: %v", err)
	}
	its.Close()
	if _, err := tryWrite(New(its).raw, pieces); !errors.Is(err, net.ErrClosed) {
		t.Errorf("of a closed connection: %v", err)
	}
}

// What tryWrite reuses keeps no text from the garbage collection.
func TestTryWriteKeepsNoText(t *testing.T) {
	_, its := accept(t, Timeout)
	text := new([1000]byte)
	collected := weak.Make(text)
	tryWrite(New(its).raw, [][]byte{text[:]})
	runtime.GC()
	if collected.Value() != nil {
		t.Error("the text is kept")
	}
}

// What a client has sent before it closed the connection is read, although its replies can no
// longer be written.
func TestLinesBeforeTheCloseAreRead(t *testing.T) {
	peer, its := accept(t, Timeout)
	const lines = 300
	var sent bytes.Buffer
	for i := range lines {
		fmt.Fprintf(&sent, "%d\n", i)
	}
	peer.Write(sent.Bytes()) // in one segment, which has arrived
	peer.Close()
	c := New(its)
	for i := range lines {
		line, err := c.ReadLine()
		if err != nil || string(line) != fmt.Sprint(i) {
			t.Fatalf("line %d: %q, %v", i, line, err)
		}
		c.Write([]byte("a reply"))
		c.Enqueue(NewMessage([]byte("a message")))
		c.Flush()
	}
	if line, err := c.ReadLine(); err == nil {
		t.Errorf("after them: %q", line)
	}
	c.Close("")
}
