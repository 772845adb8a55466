package asyncwriter

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A reader takes what is written once it is open.
type reader struct {
	open chan struct{}
	err  error // of each Write
	text strings.Builder
}

func (r *reader) Write(p []byte) (int, error) {
	<-r.open
	if r.err != nil {
		return 0, r.err
	}
	return r.text.Write(p)
}

// run runs f in a bubble of virtual time. report has what leftOut was called with.
func run(t *testing.T, f func(w *Writer, r *reader, report *strings.Builder)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r, report := &reader{open: make(chan struct{})}, new(strings.Builder)
		f(New(r, func(writes int, reason error) { fmt.Fprintf(report, "%d: %v\n", writes, reason) }), r, report)
	})
}

// Write returns at once, and all is written whole and in order.
func TestWrite(t *testing.T) {
	run(t, func(w *Writer, r *reader, report *strings.Builder) {
		line := []byte("line 0\n")
		var want strings.Builder
		for i := range 10 {
			line[5] = '0' + byte(i) // what is written may change afterwards
			want.Write(line)
			if n, err := w.Write(line); n != len(line) || err != nil {
				t.Errorf("Write: %d, %v", n, err)
			}
		}
		close(r.open)
		synctest.Wait()
		io.WriteString(w, "later\n")
		io.WriteString(w, "last\n")
		synctest.Wait()
		if got := r.text.String(); got != want.String()+"later\nlast\n" || report.Len() > 0 {
			t.Errorf("written: %q; left out: %q", got, report)
		}
	})
}

// Beyond 1 MiB writes are left out, and so are all after them until the queue is empty.
func TestBound(t *testing.T) {
	run(t, func(w *Writer, r *reader, report *strings.Builder) {
		full := strings.Repeat("x", 1<<20-1)
		io.WriteString(w, full)
		io.WriteString(w, "y")
		for range 3 {
			io.WriteString(w, "left out")
		}
		if report.Len() > 0 {
			t.Errorf("reported %q while nothing is read", report)
		}
		close(r.open)
		synctest.Wait()
		if report.String() != "3: it was not read\n" {
			t.Errorf("reported %q", report)
		}
		io.WriteString(w, "z")
		synctest.Wait()
		if r.text.String() != full+"yz" || report.String() != "3: it was not read\n" {
			t.Errorf("%d bytes are written, reported %q", r.text.Len(), report)
		}
	})
	run(t, func(w *Writer, r *reader, report *strings.Builder) { // one byte too much
		io.WriteString(w, strings.Repeat("x", 1<<20))
		io.WriteString(w, "y")
		r.open <- struct{}{}
		synctest.Wait()
		if r.text.Len() != 1<<20 || report.String() != "1: it was not read\n" {
			t.Errorf("%d bytes are written, reported %q", r.text.Len(), report)
		}
	})
	run(t, func(w *Writer, r *reader, report *strings.Builder) { // also if there is room again
		io.WriteString(w, "first")
		io.WriteString(w, strings.Repeat("x", 1<<20))
		r.open <- struct{}{}
		synctest.Wait()
		io.WriteString(w, "second")
		io.WriteString(w, "third")
		close(r.open)
		synctest.Wait()
		if r.text.String() != "firstsecondthird" || report.String() != "1: it was not read\n" {
			t.Errorf("written: %.100q, reported %q", r.text.String(), report)
		}
	})
	run(t, func(w *Writer, r *reader, report *strings.Builder) { // nothing overtakes what was left out
		io.WriteString(w, "first")
		io.WriteString(w, "second")
		io.WriteString(w, strings.Repeat("x", 1<<20))
		r.open <- struct{}{}
		synctest.Wait()
		io.WriteString(w, "third")
		close(r.open)
		synctest.Wait()
		if r.text.String() != "firstsecond" || report.String() != "2: it was not read\n" {
			t.Errorf("written: %.100q, reported %q", r.text.String(), report)
		}
	})
}

// Notices have 4 KiB when the queue is full.
func TestNotices(t *testing.T) {
	run(t, func(w *Writer, r *reader, report *strings.Builder) {
		io.WriteString(w, strings.Repeat("x", 1<<20))
		notice := strings.Repeat("n", 2<<10)
		for _, notice := range []string{notice, notice, "left out"} {
			if n, err := io.WriteString(w.Notices(), notice); n != len(notice) || err != nil {
				t.Errorf("Write: %d, %v", n, err)
			}
		}
		close(r.open)
		synctest.Wait()
		if !strings.HasSuffix(r.text.String(), "x"+notice+notice) {
			t.Errorf("%d bytes are written, want %d", r.text.Len(), 1<<20+2*len(notice))
		}
	})
}

// While the notice of what was left out is being written, writes are queued again.
func TestWriteDuringNotice(t *testing.T) {
	run(t, func(w *Writer, r *reader, report *strings.Builder) {
		w.leftOut = func(writes int, _ error) { fmt.Fprintf(w.Notices(), "%d left out;", writes) }
		io.WriteString(w, "first;")
		io.WriteString(w, strings.Repeat("x", 1<<20))
		r.open <- struct{}{}
		synctest.Wait()
		io.WriteString(w, "second;")
		close(r.open)
		synctest.Wait()
		if r.text.String() != "first;1 left out;second;" {
			t.Errorf("written: %.100q", r.text.String())
		}
	})
}

// Writes that fail are counted, and reported when one goes through.
func TestWriteFails(t *testing.T) {
	run(t, func(w *Writer, r *reader, report *strings.Builder) {
		close(r.open)
		r.err = errors.New("broken pipe")
		io.WriteString(w, "a")
		io.WriteString(w, "b")
		synctest.Wait()
		if report.Len() > 0 {
			t.Errorf("reported %q while no write goes through", report)
		}
		r.err = nil
		io.WriteString(w, "c")
		synctest.Wait()
		if r.text.String() != "c" || report.String() != "2: broken pipe\n" {
			t.Errorf("written: %q, reported %q", r.text.String(), report)
		}
	})
}

// After one that fails, writes are queued as before.
func TestWriteAfterFailure(t *testing.T) {
	run(t, func(w *Writer, r *reader, report *strings.Builder) {
		r.err = errors.New("no space left on device")
		io.WriteString(w, "a")
		io.WriteString(w, "b")
		r.open <- struct{}{}
		synctest.Wait()
		r.err = nil
		io.WriteString(w, "c") // b is still being written
		close(r.open)
		synctest.Wait()
		if r.text.String() != "bc" || report.String() != "1: no space left on device\n" {
			t.Errorf("written: %q, reported %q", r.text.String(), report)
		}
	})
}

// A write that is larger than the bound is left out, and nothing else.
func TestTooLarge(t *testing.T) {
	run(t, func(w *Writer, r *reader, report *strings.Builder) {
		close(r.open)
		w.Write(make([]byte, 1<<20+1))
		io.WriteString(w, "a")
		synctest.Wait()
		if r.text.String() != "a" || report.String() != "1: it was not read\n" {
			t.Errorf("written: %.100q, reported %q", r.text.String(), report)
		}
	})
}

// Flush waits for the reader, but not after the deadline, and reports what is left.
func TestFlush(t *testing.T) {
	run(t, func(w *Writer, r *reader, report *strings.Builder) {
		start := time.Now()
		w.Flush(start.Add(time.Hour)) // there is nothing to wait for
		io.WriteString(w, "a")
		time.AfterFunc(time.Minute, func() { r.open <- struct{}{} })
		w.Flush(start.Add(time.Hour))
		if d := time.Since(start); d != time.Minute || r.text.String() != "a" || report.Len() > 0 {
			t.Errorf("after %v: written %q, reported %q", d, r.text.String(), report)
		}
		io.WriteString(w, "-")
		r.open <- struct{}{}
		synctest.Wait() // nobody waits for that one
		io.WriteString(w, "b")
		io.WriteString(w, "c")
		w.Flush(start.Add(time.Hour))
		if d := time.Since(start); d != time.Hour || report.String() != "2: it was not read\n" {
			t.Errorf("after %v: reported %q", d, report)
		}
		close(r.open)
	})
	run(t, func(w *Writer, r *reader, report *strings.Builder) { // what leftOut says is waited for too
		close(r.open)
		w.leftOut = func(writes int, _ error) { fmt.Fprintf(w.Notices(), "%d left out", writes) }
		io.WriteString(w, strings.Repeat("x", 1<<20+1))
		w.Flush(time.Now().Add(time.Hour))
		if r.text.String() != "1 left out" {
			t.Errorf("written: %.100q", r.text.String())
		}
	})
	run(t, func(w *Writer, r *reader, report *strings.Builder) { // but is not reported itself if it fails
		close(r.open)
		r.err = errors.New("no space left on device")
		w.leftOut = func(writes int, err error) {
			fmt.Fprintf(report, "%d: %v\n", writes, err)
			io.WriteString(w.Notices(), "a notice")
		}
		io.WriteString(w, "a")
		w.Flush(time.Now().Add(time.Hour))
		if report.String() != "1: no space left on device\n" {
			t.Errorf("reported %q", report)
		}
	})
}
