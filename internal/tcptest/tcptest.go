// Package tcptest has connections in memory for tests in virtual time. Each half of one
// can be closed, as with TCP, but like net.Pipe it has no buffer.
package tcptest

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// UserTimeout is how long a Write waits while the other end takes nothing, as Linux does
// with TCP_USER_TIMEOUT.
const UserTimeout = 45 * time.Second

// A Conn is one end of a connection: two pipes, one each way.
type Conn struct {
	net.Conn          // to read from
	out      net.Conn // to write to
	peer     *Conn
	reset    atomic.Bool

	mu       sync.Mutex // guards the following
	deadline time.Time  // of writes
	taken    time.Time  // when this end last read something
}

// Pipe returns both ends of a connection.
func Pipe() (client, server *Conn) {
	a, b := net.Pipe()
	c, d := net.Pipe()
	client, server = &Conn{Conn: a, out: d}, &Conn{Conn: c, out: b}
	client.peer, server.peer = server, client
	return client, server
}

func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.taken = time.Now()
	return n, err
}

// Write fails with ETIMEDOUT after UserTimeout.
func (c *Conn) Write(p []byte) (written int, err error) {
	for start := time.Now(); ; {
		c.peer.mu.Lock()
		end := c.peer.taken
		c.peer.mu.Unlock()
		if end.Before(start) {
			end = start
		}
		end = end.Add(UserTimeout)
		c.mu.Lock()
		deadline := c.deadline
		if deadline.IsZero() || deadline.After(end) {
			deadline = end
		}
		c.out.SetWriteDeadline(deadline)
		c.mu.Unlock()
		if !time.Now().Before(end) {
			return written, syscall.ETIMEDOUT
		}
		n, err := c.out.Write(p[written:])
		written += n
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return written, err
		}
		c.mu.Lock()
		passed := !c.deadline.IsZero() && !time.Now().Before(c.deadline)
		c.mu.Unlock()
		if passed {
			return written, err
		}
	}
}

func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	return c.out.SetWriteDeadline(t)
}

func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

func (c *Conn) CloseWrite() error { return c.out.Close() }
func (c *Conn) Close() error      { return errors.Join(c.Conn.Close(), c.out.Close()) }

func (c *Conn) SetLinger(sec int) error {
	c.reset.Store(sec == 0)
	return nil
}

// WasReset reports whether a Close of this end discards what was not taken.
func (c *Conn) WasReset() bool { return c.reset.Load() }

// A Listener accepts what is sent to Accepts: net.Conns, or errors.
type Listener struct {
	Accepts chan any
	closed  chan struct{}
	close   sync.Once
}

// NewListener returns an open Listener.
func NewListener() *Listener {
	return &Listener{Accepts: make(chan any), closed: make(chan struct{})}
}

func (l *Listener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	case a := <-l.Accepts:
		if err, ok := a.(error); ok {
			return nil, err
		}
		return a.(net.Conn), nil
	}
}

func (l *Listener) Close() error {
	l.close.Do(func() { close(l.closed) })
	return nil
}

func (l *Listener) Addr() net.Addr { return &net.TCPAddr{} }
