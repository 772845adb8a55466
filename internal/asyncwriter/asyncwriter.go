// Package asyncwriter has an io.Writer that never waits for whoever reads what is
// written: a terminal that Ctrl-S has stopped, a pager, a full pipe.
package asyncwriter

import (
	"errors"
	"io"
	"sync"
	"time"
)

const (
	maxQueue   = 1 << 20 // bytes that wait to be written
	maxNotices = 4 << 10 // bytes in addition, for what Notices writes
)

// ErrNotRead is the reason for a write that was left out because the queue was full.
var ErrNotRead = errors.New("it was not read")

// A Writer queues what is written and returns at once. A goroutine writes the queue and
// ends when it is empty. A Write that would take the queue beyond 1 MiB is left out, and
// so are all after it until the queue has been written.
type Writer struct {
	dst     io.Writer
	leftOut func(writes int, reason error)

	mu      sync.Mutex    // guards the following; never held during a write
	queue   [][]byte      // the first one is being written
	size    int           // bytes in queue
	spare   []byte        // what was last written, whose memory the next write takes
	full    bool          // a write did not fit; all are left out until the queue is empty
	writing bool          // writeQueue runs
	written chan struct{} // made by Flush, closed when writeQueue ends
	omitted int           // writes left out since leftOut was last called
	err     error         // of the last write that failed since then
}

// New returns a Writer to dst. As soon as writes go through again after some were left
// out, or have failed, leftOut is called with their number and the last error, ErrNotRead
// if there was none.
func New(dst io.Writer, leftOut func(writes int, reason error)) *Writer {
	return &Writer{dst: dst, leftOut: leftOut}
}

// Write never waits and never fails.
func (w *Writer) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.full = w.size+len(p) > maxQueue || w.full && len(w.queue) > 0
	if w.full {
		w.omitted++
	} else {
		w.enqueueLocked(p)
	}
	return len(p), nil
}

// Notices returns a writer to the same queue that has room for 4 KiB when the queue is
// full. It is meant for what leftOut has to say.
func (w *Writer) Notices() io.Writer { return notices{w} }

type notices struct{ *Writer }

func (w notices) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.size+len(p) <= maxQueue+maxNotices {
		w.enqueueLocked(p)
	}
	return len(p), nil
}

// enqueueLocked queues a write. w.mu must be held.
func (w *Writer) enqueueLocked(p []byte) {
	w.queue = append(w.queue, append(w.spare[:0], p...))
	w.spare = nil
	w.size += len(p)
	if !w.writing {
		w.writing = true
		go w.writeQueue()
	}
}

// writeQueue writes until the queue is empty.
func (w *Writer) writeQueue() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.queue) > 0 {
		next := w.queue[0]
		w.mu.Unlock()
		_, err := w.dst.Write(next)
		w.mu.Lock()
		w.queue = w.queue[1:]
		w.spare = next
		w.size -= len(next)
		if err != nil {
			w.omitted++
			w.err = err
		} else if len(w.queue) == 0 {
			w.full = false // although what leftOut writes may be queued now
			w.reportLocked()
		}
	}
	w.writing = false
	if w.written != nil {
		close(w.written)
		w.written = nil
	}
}

// reportLocked calls leftOut if something has been left out since the last time. w.mu
// must be held; it is released meanwhile.
func (w *Writer) reportLocked() {
	omitted, err := w.omitted, w.err
	w.omitted, w.err = 0, nil
	if omitted == 0 {
		return
	}
	if err == nil {
		err = ErrNotRead
	}
	w.mu.Unlock()
	defer w.mu.Lock()
	w.leftOut(omitted, err)
}

// Flush waits until everything is written, but not after the deadline, and reports what
// is left out for good. What leftOut writes then it waits for too.
func (w *Writer) Flush(deadline time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waitLocked(deadline)
	w.omitted += len(w.queue)
	w.reportLocked()
	w.waitLocked(deadline)
}

// waitLocked waits until everything is written, but not after the deadline. w.mu must be
// held; it is released meanwhile.
func (w *Writer) waitLocked(deadline time.Time) {
	if !w.writing {
		return
	}
	written := make(chan struct{})
	w.written = written
	w.mu.Unlock()
	defer w.mu.Lock()
	select {
	case <-written:
	case <-time.After(time.Until(deadline)):
	}
}
