//go:build unix

package lineconn

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"
)

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

// What tryWrite does not write it returns, and changes neither.
func TestTryWriteReturnsTheRest(t *testing.T) {
	peer, its := accept(t, Timeout)
	text := bytes.Repeat([]byte("0123456789"), 1<<20)
	pieces := [][]byte{text[:1], text[1:1000], text[1000 : len(text)-3], text[len(text)-3:]}
	rest, err := tryWrite(its, pieces)
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
		_, err = tryWrite(its, pieces)
	}
	if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		t.Errorf("of a connection that was reset: %v", err)
	}
	its.Close()
	if _, err := tryWrite(its, pieces); !errors.Is(err, net.ErrClosed) {
		t.Errorf("of a closed connection: %v", err)
	}
}
