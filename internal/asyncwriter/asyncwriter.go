// Package asyncwriter has an io.Writer that never waits for whoever takes what is
// written: a terminal that Ctrl-S has stopped, a pager, a full pipe, a full disk.
package asyncwriter

import (
	"bytes"
	"cmp"
	"errors"
	"io"
	"log"
	"sync"
	"syscall"
	"time"
)

const maxQueue = 1 << 20 // bytes

var errNotRead = errors.New("it was not read")

// A Writer queues what is written and returns at once. A goroutine writes the queue and
// ends when it is empty. What is not taken, whatever the fault, is tried again until it
// is, so no write is ever torn. Once 1 MiB waits, writes are left out until the queue is
// empty; then the log says how many.
type Writer struct {
	Dst  io.Writer
	What string  // begins the line in the log that says how many writes were left out
	Log  *Writer // queues that line, however full it is; nil is the Writer itself

	mu      sync.Mutex // guards the following; not held during a write to Dst; locked before that of Log
	queue   [][]byte   // the first one is being written
	size    int        // bytes in queue
	spare   []byte     // what was last written, whose memory the next write takes
	omitted int        // writes left out after those in queue
	err     error      // the last fault since queue was empty
}

// Write never waits and never fails.
func (w *Writer) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.omitted > 0 || w.size >= maxQueue {
		w.omitted++
	} else {
		w.enqueueLocked(p)
	}
	return len(p), nil
}

// enqueueLocked queues a write. w.mu must be held.
func (w *Writer) enqueueLocked(p []byte) {
	w.queue = append(w.queue, append(w.spare[:0], p...))
	w.spare = nil
	w.size += len(p)
	if len(w.queue) == 1 {
		go w.writeQueue()
	}
}

// writeQueue writes until the queue is empty, and logs what was left out after it.
func (w *Writer) writeQueue() {
	w.mu.Lock()
	defer w.mu.Unlock()
	var wait time.Duration
	for len(w.queue) > 0 {
		next := w.queue[0]
		w.mu.Unlock()
		time.Sleep(wait)
		n, err := w.Dst.Write(next)
		w.mu.Lock()
		w.size -= n
		if n == len(next) {
			w.queue = w.queue[1:]
			w.spare = next
			wait = 0
			continue
		}
		w.queue[0] = next[n:]
		wait = min(2*wait+time.Millisecond, 100*time.Millisecond)
		if !errors.Is(err, syscall.EAGAIN) { // no fault: somebody has made a terminal non-blocking
			w.err = err
		}
	}
	w.logLocked(w.omitted)
}

// logLocked logs that so many writes were left out, if any. w.mu must be held.
func (w *Writer) logLocked(omitted int) {
	reason := cmp.Or(w.err, errNotRead)
	w.omitted, w.err = 0, nil
	if omitted == 0 {
		return
	}
	to := w
	if w.Log != nil {
		to = w.Log
		to.mu.Lock()
		defer to.mu.Unlock()
	}
	var line bytes.Buffer
	log.New(&line, "", log.LstdFlags).Printf("%s: %d; %v", w.What, omitted, reason)
	to.enqueueLocked(line.Bytes())
}

// Flush waits until all is written, but not after the deadline, and logs how many writes
// are left out for good.
func (w *Writer) Flush(deadline time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.queue) > 0 && time.Now().Before(deadline) {
		w.mu.Unlock()
		time.Sleep(time.Millisecond)
		w.mu.Lock()
	}
	w.logLocked(w.omitted + len(w.queue))
}
