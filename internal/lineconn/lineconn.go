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
	"slices"
	"sync"
	"syscall"
	"time"

	"proof-of-stake/internal/telnet"
)

const (
	// MaxLine is the longest line in bytes, its end not counted.
	MaxLine = 64

	// MaxQueue bounds the messages that wait for a slow client, replies not counted.
	MaxQueue = 64

	// maxReplies bounds the replies that wait. While so many do, no line is read.
	maxReplies = 64

	// If a goroutine takes longer than maxWrite to write the queue, the client is behind.
	maxWrite = 10 * time.Millisecond

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
// ReadLine, Write, AvailableBuffer and Close; the other methods are for all goroutines.
//
// Replies and messages are written through one queue, in order. Enqueue only adds to it.
// Whoever calls Flush writes it, unless somebody does already, and so does the reader when
// it has handled the lines that it has read; ergo's irc/socket.go is the model. But the
// reader writes only replies, and if that may take long a goroutine does it, so that lines
// are read however slowly the client takes what is written. When everything is written, no
// goroutine but the reader is left.
type Conn struct {
	conn TCPConn

	// The following belong to the reader.
	replies  *Message // to the lines since the last Read, not queued yet; nil if there are none
	filter   telnet.Filter
	ended    bool  // the client has ended its input
	next     uint8 // input[next:received] is still to be filtered
	received uint8
	input    [MaxLine + len("\r\n")]byte

	mu        sync.Mutex // guards the following; never held during a write
	queue     []*Message
	held      []*Message    // messages that wait until the reader has replied to a line
	messages  uint8         // in queue and held, replies not counted
	waiting   uint8         // replies in queue
	handling  bool          // the reader handles what it has read, so messages are held
	writing   bool          // somebody writes the queue
	crlf      bool          // the client needs \r\n
	droppable bool          // a droppable message is queued or being written
	behind    bool          // a write may take long, since the client may not have taken what was written before
	stopping  bool          // the reader must not wait for the client any more
	closing   bool          // nothing can be enqueued any more
	err       error         // why the connection was reset
	changed   chan struct{} // made by the reader to wait for a change, which closes it
}

// New returns a Conn for the connection.
func New(conn TCPConn) *Conn { return &Conn{conn: conn} }

// RemoteAddr returns the client's address.
func (c *Conn) RemoteAddr() net.Addr { return c.conn.RemoteAddr() }

// SetReadDeadline sets the time after which ReadLine fails with os.ErrDeadlineExceeded.
func (c *Conn) SetReadDeadline(t time.Time) { c.conn.SetReadDeadline(t) }

// A Message is text for any number of connections, which share its bytes.
type Message struct {
	text      [][]byte // in pieces
	crlf      [][]byte // the same with \r\n; nil for replies, which have the line ends of their client
	droppable bool
	replies   uint8 // how many replies of one connection it is; 0 if it is for all
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

// NewDroppableMessage is NewMessage for a message that is left out for a client whose
// queue is full, or to which another such message is queued or being written.
func NewDroppableMessage(pieces ...[]byte) *Message {
	m := NewMessage(pieces...)
	m.droppable = true
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
// reason why the connection was reset, or what Read returns. (If the system gives up the
// client it tells only one of who reads and who writes, so the error may be io.EOF although
// Err will be ErrTimeout.)
func (c *Conn) ReadLine() ([]byte, error) {
	c.flushReplies(false)
	line := c.input[c.next:c.next]
	for !c.ended {
		text, rest, end := c.filter.Next(line, c.input[c.next:c.received], MaxLine)
		c.next = c.received - uint8(len(rest))
		switch end {
		case telnet.LineEnd:
			return bytes.TrimSpace(text), nil
		case telnet.TooLong:
			text = bytes.TrimSpace(text)
			return nil, LineError(text[:min(len(text), MaxLine)])
		case telnet.Interrupt:
			c.interrupt()
			return nil, ErrInterrupted
		case telnet.EndOfInput:
			c.ended = true
			line = text
			continue
		}
		line = c.input[:copy(c.input[:], text)]
		c.flushReplies(true)
		n, err := c.conn.Read(c.input[len(line):])
		c.next = uint8(len(line))
		c.received = c.next + uint8(n)
		if err = c.afterRead(err); err != nil && err != io.EOF {
			return nil, err
		}
		c.ended = err == io.EOF
	}
	if len(line) > 0 {
		return bytes.TrimSpace(line), nil
	}
	c.flushReplies(true)
	return nil, io.EOF
}

// afterRead has messages held from now on. It returns why nothing can be read
// any more, if err is what Read has returned.
func (c *Conn) afterRead(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.handling = true
	err = reason(err)
	if err == ErrTimeout {
		c.err = err // the writer may have been told only that the pipe is broken
		c.failLocked(err)
	}
	if c.err != nil {
		return c.err
	}
	return err
}

// interrupt resets the connection if something is being written, for which Close would
// wait.
func (c *Conn) interrupt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writing {
		c.failLocked(ErrInterrupted)
	}
}

// flushReplies is called when the reader has handled a line: what was held meanwhile is
// queued behind the reply. If the reader will wait for the client now, or if too many
// replies wait, they are written.
func (c *Conn) flushReplies(waits bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.crlf = c.filter.CRLF()
	if !waits && c.held == nil && (c.replies == nil || c.waiting+c.replies.replies < maxReplies) {
		return
	}
	c.queueRepliesLocked()
	if len(c.queue) > 0 && !c.writing {
		if !c.behind {
			c.writeLocked(true)
		}
		if len(c.queue) > 0 {
			c.writing = true
			go c.writeQueue()
		}
	}
	for c.waiting >= maxReplies && !c.stopping && c.err == nil {
		c.waitLocked()
	}
	c.handling = !waits
}

// queueRepliesLocked queues the replies, and behind them the messages that are held until
// then. c.mu must be held.
func (c *Conn) queueRepliesLocked() {
	if c.replies != nil && c.err == nil {
		c.queue = append(c.queue, c.replies)
		c.waiting += c.replies.replies
	}
	c.queue = append(c.queue, c.held...)
	c.replies, c.held, c.handling = nil, nil, false
}

// waitLocked waits for a change of what c.mu guards. c.mu must be held; it is released
// meanwhile.
func (c *Conn) waitLocked() {
	changed := make(chan struct{})
	c.changed = changed
	c.mu.Unlock()
	<-changed
	c.mu.Lock()
}

// wakeLocked ends the reader's wait, if it waits. c.mu must be held.
func (c *Conn) wakeLocked() {
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

// replyPool has messages for replies, since few connections have any at the same time.
var replyPool = sync.Pool{New: func() any { return &Message{text: make([][]byte, 1)} }}

// reply returns the message that the next reply is added to.
func (c *Conn) reply() *Message {
	if c.replies == nil {
		c.replies = replyPool.Get().(*Message)
	}
	return c.replies
}

// AvailableBuffer returns an empty buffer that is meant to be appended to and passed to
// the next Write.
func (c *Conn) AvailableBuffer() []byte {
	text := c.reply().text[0]
	return text[len(text):]
}

// Write replies to the line that ReadLine has returned. Its line ends are \n. It never
// waits and never fails.
func (c *Conn) Write(p []byte) (int, error) {
	text := p
	if c.filter.CRLF() {
		text = crlf(p)
	}
	m := c.reply()
	m.text[0] = append(m.text[0], text...)
	m.replies++
	return len(p), nil
}

// Enqueue queues a message and never waits. It is written by whoever calls Flush, or
// writes already, but not before the reply to a line that the reader handles. If the
// queue is full the connection is reset.
func (c *Conn) Enqueue(m *Message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	full := c.messages == MaxQueue
	switch {
	case c.closing || c.err != nil || m.droppable && (c.droppable || full):
		return
	case full:
		c.failLocked(ErrQueueFull)
		return
	}
	c.messages++
	c.droppable = c.droppable || m.droppable
	if c.handling {
		c.held = append(c.held, m)
	} else {
		c.queue = append(c.queue, m)
	}
}

// Flush writes what is queued, also what is queued meanwhile, unless somebody else writes.
func (c *Conn) Flush() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.writing {
		c.writeLocked(false)
	}
}

// writeQueue writes what is queued for the reader, which has set c.writing until then.
func (c *Conn) writeQueue() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.behind = false
	start := time.Now()
	c.writeLocked(false)
	c.behind = c.behind || time.Since(start) > maxWrite
}

// writeLocked writes the queue, or the replies alone up to the next message. Nobody else
// may be writing, and c.mu must be held; it is released during writes.
func (c *Conn) writeLocked(replies bool) {
	c.writing = true
	for len(c.queue) > 0 && (!replies || c.queue[0].replies > 0) {
		m := c.queue[0]
		c.queue = slices.Delete(c.queue, 0, 1)
		if m.replies > 0 {
			c.waiting -= m.replies
			c.wakeLocked()
		} else {
			c.messages--
		}
		text := m.text
		if c.crlf && m.crlf != nil {
			text = m.crlf
		}
		c.mu.Unlock()
		var err error
		for i := 0; i < len(text) && err == nil; i++ {
			_, err = c.conn.Write(text[i])
		}
		if m.replies > 0 {
			m.replies = 0
			m.text[0] = m.text[0][:0]
			replyPool.Put(m)
		}
		c.mu.Lock()
		if m.droppable {
			c.droppable = false
			c.behind = true
		}
		if err != nil {
			c.failLocked(reason(err))
		}
	}
	c.writing = false
	c.wakeLocked()
}

// reason returns ErrTimeout for an error that says that the system has given up the client:
// a timeout or, if the system knows of one, what has kept its packets from the client.
func reason(err error) error {
	if err == nil {
		return nil // the usual case; to compare with windowsETIMEDOUT allocates
	}
	for _, errno := range [...]syscall.Errno{syscall.ETIMEDOUT, windowsETIMEDOUT, syscall.EHOSTUNREACH, syscall.ENETUNREACH} {
		if errors.Is(err, errno) {
			return ErrTimeout
		}
	}
	return err
}

// windowsETIMEDOUT is WSAETIMEDOUT; package syscall's ETIMEDOUT is another number there.
const windowsETIMEDOUT = syscall.Errno(10060)

// failLocked resets the connection because of the error. Writing what is queued fails from
// now on. c.mu must be held.
func (c *Conn) failLocked(err error) {
	if c.err == nil {
		c.err = err
	}
	c.conn.SetLinger(0)
	c.conn.Close() // and so the writer ends, if there is one, for which the reader may wait
}

// Err returns why the connection was reset, or nil.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Stop has ReadLine fail with os.ErrDeadlineExceeded, also while it waits for the client,
// and resets the connection if something is still to be written after the limit.
func (c *Conn) Stop(limit time.Duration) {
	c.conn.SetWriteDeadline(time.Now().Add(limit))
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closing {
		c.conn.SetReadDeadline(time.Now())
	}
	c.stopping = true
	c.wakeLocked()
}

// Close writes what is queued and the last line, and closes the connection without a
// reset, so that the system goes on delivering both. A connection that is closed while the
// client sends is reset, so what still comes is read and thrown away for a while, in the
// way of net/http's closeWriteAndWait. It does not wait if the client has closed first.
func (c *Conn) Close(lastLine string) {
	c.mu.Lock()
	c.crlf = c.filter.CRLF()
	c.queueRepliesLocked() // with what is held, which comes before the last line
	if lastLine != "" {
		io.WriteString(c, lastLine)
		c.queueRepliesLocked()
	}
	c.closing = true
	for c.writing {
		c.waitLocked()
	}
	c.writeLocked(false)
	failed := c.err != nil
	c.mu.Unlock()
	if failed {
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
	beforeClose(c.conn)
	c.conn.Close()
}
