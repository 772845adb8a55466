package lineconn

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What is accepted has the options of the listening socket.
func TestOptionsAreInherited(t *testing.T) {
	_, its := accept(t, Timeout)
	raw, err := its.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		for _, option := range []struct {
			name             string
			level, opt, want int
		}{
			{"TCP_USER_TIMEOUT", syscall.IPPROTO_TCP, 18, 45_000},
			{"SO_KEEPALIVE", syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
			{"TCP_KEEPIDLE", syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, 15},
			{"TCP_KEEPINTVL", syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL, 5},
			{"SO_SNDBUF", syscall.SOL_SOCKET, syscall.SO_SNDBUF, 512 << 10},
			{"SO_PROTOCOL", syscall.SOL_SOCKET, 38, syscall.IPPROTO_TCP}, // and not MPTCP
		} {
			got, err := syscall.GetsockoptInt(int(fd), option.level, option.opt)
			if err != nil || got != option.want {
				t.Errorf("%s is %d, %v, want %d", option.name, got, err, option.want)
			}
		}
	})
}

// A client that stops reading is given up by the system, which keeps nothing for it. One
// that reads slowly but steadily is not.
func TestGivenUp(t *testing.T) {
	const timeout = time.Second
	message := NewMessage(bytes.Repeat([]byte("x"), 4<<20))
	for _, test := range []struct {
		name  string
		reads bool
	}{{"stops", false}, {"reads slowly", true}} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			peer, its := accept(t, timeout)
			peer.SetReadBuffer(16 << 10)
			c := New(its)
			ended := make(chan error)
			go func() {
				_, err := c.ReadLine()
				ended <- err
				c.Close("")
				close(ended)
			}()
			c.Enqueue(message)
			c.Flush()
			limit := time.After(4 * timeout)
			for reading := test.reads; reading; {
				io.ReadFull(peer, make([]byte, 32<<10))
				select {
				case err := <-ended:
					t.Fatalf("a slow client was given up: %v", err)
				case <-limit:
					reading = false
				case <-time.After(timeout / 10):
				}
			}
			start := time.Now() // it has stopped now
			if err := <-ended; err != ErrTimeout && err != io.EOF {
				t.Errorf("ReadLine: %v", err)
			}
			t.Logf("given up after %v", time.Since(start))
			<-ended
			if err := c.Err(); err != ErrTimeout {
				t.Errorf("the connection was reset because of %v, want %v", err, ErrTimeout)
			}
			table, err := os.ReadFile("/proc/net/tcp")
			if err != nil {
				t.Skip(err)
			}
			port := its.LocalAddr().(*net.TCPAddr).Port
			if left := regexp.MustCompile(fmt.Sprintf(`(?m)^ *\d+: [0-9A-F]{8}:%04X .*`, port)).FindAll(table, -1); len(left) > 0 {
				t.Errorf("the system keeps %s", left)
			}
		})
	}
}

// The last line arrives also if the client reads nothing for a while after the close.
func TestLastLineWaits(t *testing.T) {
	t.Parallel()
	peer, its := accept(t, Timeout)
	peer.SetReadBuffer(32 << 10)
	c := New(its)
	c.Enqueue(NewMessage(bytes.Repeat([]byte("x"), 200<<10)))
	c.Flush()
	c.Close("end\n")
	<-time.After(13 * time.Second)
	received, err := io.ReadAll(peer)
	if err != nil || len(received) != 200<<10+len("end\n") || !bytes.HasSuffix(received, []byte("end\n")) {
		t.Errorf("received %d bytes, %v", len(received), err)
	}
}

// An option that the system refuses is an error.
func TestOptionIsRefused(t *testing.T) {
	listener, err := Listen("tcp", "127.0.0.1:0", -time.Second)
	if err == nil {
		listener.Close()
	}
	if !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), "setsockopt") {
		t.Errorf("with a negative timeout: %v, want %v", err, syscall.EINVAL)
	}
}
