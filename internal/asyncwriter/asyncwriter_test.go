package asyncwriter

import (
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A reader takes what is written once it is open.
type reader struct {
	open chan struct{}
	text strings.Builder
}

func (r *reader) Write(p []byte) (int, error) {
	<-r.open
	return r.text.Write(p)
}

// readers returns a Writer of blocks and that of their log, each with its reader.
func readers() (blocks, log *Writer, blockReader, logReader *reader) {
	blockReader, logReader = &reader{open: make(chan struct{})}, &reader{open: make(chan struct{})}
	log = &Writer{Dst: logReader, What: "lines left out"}
	blocks = &Writer{Dst: blockReader, What: "blocks left out", Log: log}
	return blocks, log, blockReader, logReader
}

// A disk takes what it has room for.
type disk struct {
	mu    sync.Mutex // guards the following
	room  int        // bytes
	fault error      // for what it has no room for
	text  strings.Builder
	tries int
}

func (d *disk) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tries++
	n := min(d.room, len(p))
	d.room -= n
	d.text.Write(p[:n])
	if n < len(p) {
		return n, d.fault
	}
	return n, nil
}

// set sets the room, in addition to what there is, and the fault.
func (d *disk) set(room int, fault error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.room += room
	d.fault = fault
}

// written returns what is on the disk.
func (d *disk) written() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text.String()
}

// tried returns how many writes there were since it was last called.
func (d *disk) tried() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	defer func() { d.tries = 0 }()
	return d.tries
}

const unlimited = 1 << 40

var (
	full   = &fs.PathError{Op: "write", Path: "/dev/stdout", Err: syscall.ENOSPC}
	notNow = &fs.PathError{Op: "write", Path: "/dev/stdout", Err: syscall.EAGAIN}
)

// want checks what was written. The lines about what was left out are wanted without their
// times.
func want(t *testing.T, got, want string) {
	t.Helper()
	const layout = "2006/01/02 15:04:05 "
	for _, what := range []string{"lines left out: ", "blocks left out: "} {
		parts := strings.Split(got, what)
		for i, part := range parts[:len(parts)-1] {
			start := max(0, len(part)-len(layout))
			if _, err := time.Parse(layout, part[start:]); err != nil {
				t.Errorf("before %q: %v", what, err)
			}
			parts[i] = part[:start]
		}
		got = strings.Join(parts, what)
	}
	if got != want {
		t.Errorf("written %d bytes: %.50q … %q, want %d: %.50q … %q", len(got), got, got[max(len(got)-100, 0):],
			len(want), want, want[max(len(want)-100, 0):])
	}
}

// Write returns at once, and all is written whole and in order.
func TestWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, _, r, log := readers()
		line := []byte("line 0\n")
		var wanted strings.Builder
		for i := range 10 {
			line[5] = '0' + byte(i) // what is written may change afterwards
			wanted.Write(line)
			if n, err := w.Write(line); n != len(line) || err != nil {
				t.Errorf("Write: %d, %v", n, err)
			}
		}
		close(r.open)
		synctest.Wait()
		io.WriteString(w, "later\n")
		io.WriteString(w, "last\n")
		synctest.Wait()
		want(t, r.text.String(), wanted.String()+"later\nlast\n")
		close(log.open)
		synctest.Wait()
		want(t, log.text.String(), "")
	})
}

// Once 1 MiB waits, writes are left out until the queue is empty, also if there is room
// again. Their number takes their place.
func TestBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, w, _, r := readers()
		first := strings.Repeat("x", 1<<20-1)
		io.WriteString(w, first)
		io.WriteString(w, "y")
		if n, err := io.WriteString(w, "left out"); n != len("left out") || err != nil {
			t.Errorf("Write: %d, %v", n, err)
		}
		r.open <- struct{}{}
		synctest.Wait()
		io.WriteString(w, "left out, since y waits")
		r.open <- struct{}{}
		synctest.Wait()
		io.WriteString(w, "z")
		close(r.open)
		synctest.Wait()
		io.WriteString(w, "all is as ever")
		synctest.Wait()
		want(t, r.text.String(), first+"ylines left out: 2; it was not read\nzall is as ever")
	})
}

// What is larger than the bound is written if nothing waits.
func TestTooLarge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, w, _, r := readers()
		large := strings.Repeat("x", 1<<20+1)
		io.WriteString(w, large)
		io.WriteString(w, "left out")
		close(r.open)
		synctest.Wait()
		want(t, r.text.String(), large+"lines left out: 1; it was not read\n")
	})
}

// The log says what was left out of the blocks also if it is full itself.
func TestBothFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		blocks, log, blockReader, logReader := readers()
		xs := strings.Repeat("x", 1<<20)
		for range 3 {
			io.WriteString(blocks, xs)
			io.WriteString(log, xs)
		}
		close(blockReader.open)
		synctest.Wait()
		io.WriteString(log, "left out")
		close(logReader.open)
		synctest.Wait()
		io.WriteString(blocks, "all is as ever")
		synctest.Wait()
		want(t, blockReader.text.String(), xs+"all is as ever")
		want(t, logReader.text.String(), xs+"blocks left out: 2; it was not read\nlines left out: 3; it was not read\n")
	})
}

// However a write is cut short, and for whatever fault, it is finished before the next.
func TestCut(t *testing.T) {
	const lines = "first\nsecond\n"
	for cut := range len(lines) {
		for again := range len(lines) - cut {
			for _, fault := range []error{full, notNow, nil} {
				synctest.Test(t, func(t *testing.T) {
					d := &disk{room: cut, fault: fault}
					w := &Writer{Dst: d, What: "lines left out"}
					io.WriteString(w, "first\n")
					io.WriteString(w, "second\n")
					for _, room := range []int{again, unlimited} {
						time.Sleep(time.Second)
						synctest.Wait()
						d.set(room, fault)
					}
					w.Flush(time.Now().Add(time.Second))
					want(t, d.written(), lines)
				})
			}
		}
	}
}

// Whatever is written and however little of it is taken at a time, what is read is what a
// slow and obvious model of the disk and the queue reads.
func TestModel(t *testing.T) {
	cuts, notices := 0, 0
	for seed := range uint64(15) {
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 0))
			d := &disk{fault: full}
			w := &Writer{Dst: d, What: "lines left out"}

			const midnight = "2000/01/01 00:00:00 "
			var waiting []string
			var read strings.Builder
			room, omitted, fault, reason := 0, 0, error(full), "it was not read"
			model := func() {
				for len(waiting) > 0 {
					n := min(room, len(waiting[0]))
					read.WriteString(waiting[0][:n])
					waiting[0] = waiting[0][n:]
					room -= n
					if waiting[0] != "" {
						if n > 0 {
							cuts++
						}
						if fault == full {
							reason = full.Error()
						}
						return
					}
					waiting = waiting[1:]
					if len(waiting) == 0 {
						if omitted > 0 {
							notices++
							waiting = []string{fmt.Sprintf("%slines left out: %d; %s\n", midnight, omitted, reason)}
						}
						omitted, reason = 0, "it was not read"
					}
				}
			}

			for i := range 100 {
				switch random.IntN(4) {
				default:
					line := fmt.Sprintf("%d:%s\n", i, strings.Repeat("x", 1+random.IntN(300_000)))
					io.WriteString(w, line)
					waits := 0
					for _, line := range waiting {
						waits += len(line)
					}
					if omitted > 0 || waits >= 1<<20 {
						omitted++
					} else {
						waiting = append(waiting, line)
					}
				case 0:
					more := []int{1, random.IntN(100), random.IntN(300_000), 1 << 20}[random.IntN(4)]
					fault = []error{full, notNow}[random.IntN(2)]
					d.set(more, fault)
					room += more
				}
				time.Sleep(200 * time.Millisecond)
				synctest.Wait()
				model()
				if n := len(d.written()); n != read.Len() {
					t.Fatalf("seed %d, step %d: %d bytes are written, want %d", seed, i, n, read.Len())
				}
			}
			d.set(unlimited, nil)
			room = unlimited
			w.Flush(time.Now().Add(time.Second))
			model()
			want(t, d.written(), strings.ReplaceAll(read.String(), midnight, ""))
		})
	}
	if cuts < 100 || notices < 20 {
		t.Errorf("%d writes were cut short and %d notices written", cuts, notices)
	}
}

// The log names the last fault, if there was one since all was written.
func TestReason(t *testing.T) {
	for _, test := range []struct {
		before, meanwhile error
		want              string
	}{
		{nil, full, "write /dev/stdout: no space left on device"},
		{nil, notNow, "it was not read"},
		{full, notNow, "it was not read"},
	} {
		synctest.Test(t, func(t *testing.T) {
			d := &disk{fault: test.before}
			w := &Writer{Dst: d, What: "lines left out"}
			io.WriteString(w, "a\n")
			time.Sleep(time.Second)
			synctest.Wait()
			d.set(2, test.meanwhile)
			time.Sleep(time.Second)
			synctest.Wait()
			large := strings.Repeat("x", 1<<20)
			io.WriteString(w, large)
			io.WriteString(w, "left out")
			time.Sleep(time.Second)
			synctest.Wait()
			d.set(unlimited, nil)
			w.Flush(time.Now().Add(time.Second))
			want(t, d.written(), "a\n"+large+"lines left out: 1; "+test.want+"\n")
		})
	}
}

// What is not taken is tried again at once, then less and less often, but ten times a second.
func TestRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{fault: notNow}
		w := &Writer{Dst: d}
		for range 2 {
			io.WriteString(w, "a")
			time.Sleep(time.Millisecond)
			synctest.Wait()
			if tries := d.tried(); tries != 2 {
				t.Errorf("in the first millisecond it was tried %d times", tries)
			}
			time.Sleep(time.Hour)
			if tries := d.tried(); tries < 10*3600 || tries > 10*3600+10 {
				t.Errorf("in an hour it was tried %d times", tries)
			}
			d.set(1, notNow)
			time.Sleep(100 * time.Millisecond)
			synctest.Wait()
			d.tried()
		}
		want(t, d.written(), "aa")
	})
}

// Flush waits until all is written, but not after the deadline. The log then says what is
// left out for good.
func TestFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		blocks, log, blockReader, logReader := readers()
		close(logReader.open)
		start := time.Now()
		blocks.Flush(start.Add(time.Second)) // there is nothing to wait for
		io.WriteString(blocks, "a")
		time.AfterFunc(time.Second/2, func() { blockReader.open <- struct{}{} })
		blocks.Flush(start.Add(time.Second))
		if d := time.Since(start); d < time.Second/2 || d > time.Second/2+time.Millisecond {
			t.Errorf("what was read after %v is waited for until %v", time.Second/2, d)
		}
		want(t, blockReader.text.String(), "a")

		start = time.Now()
		for range 3 {
			io.WriteString(blocks, strings.Repeat("x", 1<<19))
		}
		blocks.Flush(start.Add(time.Second))
		if d := time.Since(start); d != time.Second {
			t.Errorf("what is not read is waited for until %v", d)
		}
		log.Flush(time.Now().Add(time.Second))
		want(t, logReader.text.String(), "blocks left out: 3; it was not read\n")
		close(blockReader.open)
	})
}

// When the log is read again in the last moment, it still says how many lines it left out.
func TestFlushLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, log, _, r := readers()
		line := strings.Repeat("x", 1<<20)
		io.WriteString(log, line)
		io.WriteString(log, "left out")
		time.AfterFunc(time.Second/2, func() {
			r.open <- struct{}{}
			time.Sleep(time.Second / 4) // and slowly
			r.open <- struct{}{}
		})
		log.Flush(time.Now().Add(time.Second))
		want(t, r.text.String(), line+"lines left out: 1; it was not read\n")
	})
}

// A write of which a part was taken is finished by Flush if that is possible in time. What
// is not is counted, with the fault.
func TestFlushFullDisk(t *testing.T) {
	for _, freed := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			d, logDisk := &disk{room: 3, fault: full}, &disk{room: unlimited}
			log := &Writer{Dst: logDisk, What: "lines left out"}
			blocks := &Writer{Dst: d, What: "blocks left out", Log: log}
			io.WriteString(blocks, "first\n")
			io.WriteString(blocks, "second\n")
			wanted, logged := "fir", "blocks left out: 2; write /dev/stdout: no space left on device\n"
			if freed {
				time.AfterFunc(900*time.Millisecond, func() { d.set(unlimited, nil) })
				wanted, logged = "first\nsecond\n", ""
			}
			blocks.Flush(time.Now().Add(time.Second))
			log.Flush(time.Now().Add(time.Second))
			want(t, d.written(), wanted)
			want(t, logDisk.written(), logged)
			d.set(unlimited, nil) // for the goroutine to end
			time.Sleep(time.Second)
		})
	}
}
