// Package lineconn is a TCP connection to somebody who types lines. It reads the lines
// that were meant, writes replies and messages through one queue, and closes so that the
// last line arrives.
package lineconn

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"proof-of-stake/internal/telnet"
)

const (
	// MaxLine is the longest line in bytes, its end not counted.
	MaxLine = 64

	// MaxQueue bounds the messages in the queue of a slow client, and also the replies. While
	// so many replies are queued, no line is taken from the input.
	MaxQueue = 64

	// After Ctrl-C the client has so long to take what is being written.
	interruptLimit = 100 * time.Millisecond

	// After the last line, what the client still sends is read and thrown away until it
	// has sent nothing for maxSilence, or for maxDrain in all.
	maxSilence = time.Second
	maxDrain   = 3 * time.Second
)

var (
	ErrInterrupted = errors.New("it was interrupted by Ctrl-C")

	// The client is too slow, and the connection was reset.
	ErrQueueFull = fmt.Errorf("it is %d messages behind", MaxQueue)
	ErrTimeout   = errors.New("it has stopped reading or is no longer there")
)

// A LineError is a line that is too long, or otherwise not what was asked for, in at most
// MaxLine bytes.
type LineError string

func (e LineError) Error() string { return fmt.Sprintf("got %q", string(e)) }

// A TCPConn is what a Conn needs of a net.TCPConn.
type TCPConn interface {
	net.Conn
	CloseWrite() error
	SetLinger(sec int) error
}

// A Conn is a connection to a client that sends lines. One goroutine, the reader, calls
// ReadLine, Write and Close; the other methods are for all goroutines.
//
// Replies and messages are written through one queue, in order. Write and Enqueue only add to
// it. Whoever flushes it, which is the reader before it waits for the client, or anybody who
// calls Flush, writes what the system takes at once, and so never waits; a goroutine is
// started for the rest. When everything is written, no goroutine but the reader is left.
// ergo's irc/socket.go is the model.
type Conn struct {
	conn TCPConn
	raw  syscall.RawConn // of conn; nil if it has none, as in tests

	mu       sync.Mutex // guards the following; held but for Read, and for writes that wait
	filter   telnet.Filter
	ended    bool  // the client has ended its input
	closing  bool  // nothing can be enqueued any more
	next     uint8 // input[next:received] has been received, but not yet filtered
	received uint8
	input    [MaxLine + len("\r\n")]byte // the lines that ReadLine returns are parts of it
	queue    []*Message
	writing  *Message      // whose rest a goroutine writes; nil if none does
	written  chan struct{} // closed when the goroutine has written it; nil with writing
	err      error         // why the connection was reset
}

// New returns a Conn for the connection.
func New(conn TCPConn) *Conn {
	c := &Conn{conn: conn}
	if socket, ok := conn.(syscall.Conn); ok {
		c.raw, _ = socket.SyscallConn()
	}
	return c
}

// RemoteAddr returns the client's address.
func (c *Conn) RemoteAddr() net.Addr { return c.conn.RemoteAddr() }

// SetReadDeadline sets the time after which ReadLine fails with os.ErrDeadlineExceeded.
func (c *Conn) SetReadDeadline(t time.Time) { c.conn.SetReadDeadline(t) }

// A Message is text for any number of connections, which share its bytes.
type Message struct {
	text    [][]byte // in pieces
	crlf    [][]byte // the same with \r\n; nil for replies, which have the line ends of their client
	replies uint8    // how many replies of one connection it is; 0 if it is for all

	// Droppable messages are left out for a client whose queue is full, or to which another
	// one is queued or being written.
	Droppable bool
}

// NewMessage returns a message whose text is the pieces, which must not change any more.
// Their line ends are \n.
func NewMessage(pieces ...[]byte) *Message {
	m := &Message{text: pieces, crlf: make([][]byte, len(pieces))}
	for i, piece := range pieces {
		m.crlf[i] = crlf(piece)
	}
	return m
}

// crlf returns text with \r\n for each \n; if there is none it is text itself.
func crlf(text []byte) []byte {
	if bytes.IndexByte(text, '\n') < 0 {
		return text
	}
	return bytes.ReplaceAll(text, []byte("\n"), []byte("\r\n"))
}

// ReadLine returns the next line without its end and the blanks around it; it is valid
// until the next call. The last line needs no end. The error is io.EOF if the client has
// ended its input, ErrInterrupted, a LineError if the line is longer than MaxLine, the
// reason why the connection was reset, or what Read returns.
func (c *Conn) ReadLine() ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	line := c.input[c.next:c.next]
	for !c.ended {
		for c.repliesLocked() >= MaxQueue {
			c.flushLocked()
			c.waitLocked()
		}
		text, rest, end := c.filter.Next(line, c.input[c.next:c.received], MaxLine)
		c.next = c.received - uint8(len(rest))
		switch end {
		case telnet.LineEnd:
			return bytes.TrimSpace(text), nil
		case telnet.TooLong:
			text = bytes.TrimSpace(text)
			return nil, LineError(text[:min(len(text), MaxLine)])
		case telnet.Interrupt:
			c.conn.SetWriteDeadline(time.Now().Add(interruptLimit))
			return nil, ErrInterrupted
		case telnet.TimingMark:
			c.replyLocked([]byte(telnet.WontTimingMark))
			line = text
			continue
		case telnet.EndOfInput:
			c.ended = true
			line = text
			continue
		}
		line = c.input[:copy(c.input[:], text)] // to the front, to make room
		c.flushLocked()
		c.mu.Unlock()
		n, err := c.conn.Read(c.input[len(line):])
		c.mu.Lock()
		c.next = uint8(len(line))
		c.received = c.next + uint8(n)
		c.ended = err == io.EOF
		if isTimeout(err) {
			c.failLocked(ErrTimeout)
		}
		if c.err != nil {
			return nil, c.err
		}
		if err != nil && !c.ended {
			return nil, err
		}
	}
	if len(line) > 0 {
		return bytes.TrimSpace(line), nil
	}
	c.flushLocked()
	return nil, io.EOF
}

// replyPool has messages for replies, since few connections have any at the same time.
var replyPool = sync.Pool{New: func() any { return &Message{text: make([][]byte, 1)} }}

// Write queues a reply to the line that ReadLine has returned, or the first prompt. Its line
// ends are \n. It is written by the next ReadLine that waits for the client, or earlier.
// Write never waits and never fails.
func (c *Conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.replyLocked(p)
	return len(p), nil
}

// replyLocked adds the reply to the last message of the queue, if that consists of replies,
// or else queues one. c.mu must be held.
func (c *Conn) replyLocked(text []byte) {
	if c.err != nil {
		return
	}
	if c.filter.CRLF() {
		text = crlf(text)
	}
	last := len(c.queue) - 1
	if last < 0 || c.queue[last].replies == 0 {
		c.queue = append(c.queue, replyPool.Get().(*Message))
		last++
	}
	m := c.queue[last]
	m.text[0] = append(m.text[0], text...)
	m.replies++
}

// repliesLocked returns how many replies wait in the queue. c.mu must be held.
func (c *Conn) repliesLocked() (replies int) {
	for _, m := range c.queue {
		replies += int(m.replies)
	}
	return replies
}

// Enqueue queues a message. It is written by the next Flush, or earlier. Enqueue never
// waits. If the queue is full the connection is reset.
func (c *Conn) Enqueue(m *Message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	queued := 0
	droppable := c.writing != nil && c.writing.Droppable // whether such a message is queued or being written
	for _, waiting := range c.queue {
		if waiting.replies == 0 {
			queued++
		}
		droppable = droppable || waiting.Droppable
	}
	full := queued == MaxQueue
	if c.closing || c.err != nil || (m.Droppable && (full || droppable)) {
		return
	}
	if full {
		c.failLocked(ErrQueueFull)
		return
	}
	c.queue = append(c.queue, m)
}

// Flush writes what is queued, as far as the system takes it at once. The rest is written by
// a goroutine.
func (c *Conn) Flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flushLocked()
}

// flushLocked is Flush. c.mu must be held.
func (c *Conn) flushLocked() {
	for c.writing == nil && len(c.queue) > 0 {
		m := c.queue[0]
		c.queue = slices.Delete(c.queue, 0, 1)
		text := m.text
		if m.crlf != nil && c.filter.CRLF() {
			text = m.crlf
		}
		rest, err := tryWrite(c.raw, text)
		switch {
		case err != nil:
			c.writeFailedLocked(err)
		case len(rest) > 0:
			c.writing, c.written = m, make(chan struct{})
			go c.writeRest(rest)
		case m.replies > 0:
			m.replies = 0
			m.text[0] = m.text[0][:0]
			replyPool.Put(m)
		}
	}
}

// writeRest writes the rest of c.writing, and flushes what has been queued meanwhile.
func (c *Conn) writeRest(rest net.Buffers) {
	_, err := rest.WriteTo(c.conn)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.writeFailedLocked(err)
	}
	close(c.written)
	c.writing, c.written = nil, nil
	c.flushLocked()
}

// waitLocked waits until what a goroutine writes, if there is one, is written. c.mu must be
// held; it is released meanwhile.
func (c *Conn) waitLocked() {
	if written := c.written; written != nil {
		c.mu.Unlock()
		<-written
		c.mu.Lock()
	}
}

// timeouts are what the system says when it has given up the client: a timeout (10060 is
// Windows') or, if it knows of one, what has kept its packets from the client.
var timeouts = []error{syscall.ETIMEDOUT, syscall.Errno(10060), syscall.EHOSTUNREACH, syscall.ENETUNREACH}

// isTimeout reports whether err is one of the timeouts.
func isTimeout(err error) bool {
	return slices.ContainsFunc(timeouts, func(timeout error) bool { return errors.Is(err, timeout) })
}

// writeFailedLocked resets the connection, or only throws away what is queued if the client
// has closed it: lines that it sent before are still to be read. c.mu must be held.
func (c *Conn) writeFailedLocked(err error) {
	switch {
	case isTimeout(err):
		c.failLocked(ErrTimeout)
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.failLocked(err)
	default:
		c.queue = nil
	}
}

// failLocked resets the connection because of the error, and throws away what is queued. If
// the system has given up the client, that is the reason, although it says so only once, to
// who reads or to who writes. c.mu must be held.
func (c *Conn) failLocked(err error) {
	if c.err == nil || err == ErrTimeout {
		c.err = err
	}
	c.queue = nil
	c.conn.SetLinger(0)
	c.conn.Close() // and so whoever reads or writes stops
}

// Err returns why the connection was reset, or nil.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Stop has ReadLine fail with os.ErrDeadlineExceeded, and resets the connection if something
// is still to be written after the limit.
func (c *Conn) Stop(limit time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn.SetWriteDeadline(time.Now().Add(limit))
	if !c.closing {
		c.conn.SetReadDeadline(time.Now())
	}
}

// Close writes what is queued and the last line, and closes the connection without a
// reset, so that the system goes on delivering both. A connection that is closed while the
// client sends is reset, so what still comes is read and thrown away for a while, in the
// way of net/http's closeWriteAndWait; not if the client has closed first. A second Close
// does nothing.
func (c *Conn) Close(lastLine string) {
	c.mu.Lock()
	again := c.closing
	c.closing = true
	if lastLine != "" && !again {
		c.replyLocked([]byte(lastLine))
	}
	c.flushLocked()
	for c.writing != nil {
		c.waitLocked()
	}
	failed := c.err != nil
	c.mu.Unlock()
	if again || failed {
		return
	}
	err := c.conn.CloseWrite()
	for end, discarded := time.Now().Add(maxDrain), make([]byte, 512); err == nil; {
		deadline := time.Now().Add(maxSilence)
		if deadline.After(end) {
			deadline = end
		}
		c.conn.SetReadDeadline(deadline)
		_, err = c.conn.Read(discarded)
	}
	c.conn.Close()
}
