package main

import (
	"bufio"
	"bytes"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// bareServer is the smallest server that does the same input and output: what the
// machine can do, for comparison. It reads with one goroutine a connection and
// writes to all with one goroutine a processor. The line D has it announce a
// draw, C broadcast BARE_CHAIN bytes.
func bareServer() {
	listener, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("listening on %v; join with: nc localhost 0", listener.Addr())
	c := &testClient{address: strings.Repeat("a", 64), stake: 100}
	welcome := []byte(c.greets(1, 0, time.Hour))
	reply := []byte(c.stands(1, 72, 6400, time.Hour))
	announcement := []byte(c.wins(100))
	size, _ := strconv.Atoi(os.Getenv("BARE_CHAIN"))
	chain := bytes.Repeat([]byte("x"), size)

	var mu sync.Mutex
	var conns []net.Conn
	writeAll := func(text []byte) {
		mu.Lock()
		all := slices.Clone(conns)
		mu.Unlock()
		var next atomic.Int64
		for range runtime.GOMAXPROCS(0) {
			go func() {
				for i := next.Add(1); i <= int64(len(all)); i = next.Add(1) {
					all[i-1].Write(text)
				}
			}()
		}
	}
	serve := func(conn net.Conn) {
		conn.Write([]byte(balancePrompt))
		joined := false
		buf := make([]byte, 64)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			for _, b := range buf[:n] {
				switch {
				case b == 'D':
					writeAll(announcement)
				case b == 'C':
					writeAll(chain)
				case b == '\n' && joined:
					conn.Write(reply)
				case b == '\n':
					joined = true
					conn.Write(welcome)
					mu.Lock()
					conns = append(conns, conn)
					mu.Unlock()
				}
			}
		}
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go serve(conn)
	}
}

// compare measures the bare server and the program, five times in turn, and
// reports the medians of the program's figures and of their ratios to the bare
// server's. An iteration of the benchmark is all of that.
func compare(b *testing.B, measure func(server string) map[string]float64) {
	if _, err := os.Stat("/proc/self/schedstat"); err != nil {
		b.Skip(err)
	}
	figures := make(map[string][]float64)
	for b.Loop() {
		for range 5 {
			bare, ours := measure("bare"), measure("the program")
			for unit, figure := range ours {
				figures[unit] = append(figures[unit], figure)
				figures[unit+"/bare"] = append(figures[unit+"/bare"], figure/bare[unit])
			}
		}
	}
	for unit, all := range figures {
		slices.Sort(all)
		b.ReportMetric(all[len(all)/2], unit)
	}
	b.ReportMetric(0, "ns/op") // which says nothing here
}

// startServer starts either server. Of two settings the later counts.
func startServer(b *testing.B, server string, env ...string) *process {
	return start(b, append([]string{"TEST_BINARY_IS=" + server, "CHAIN_FILE=", "BROADCAST_INTERVAL=1h"}, env...)...)
}

// kill ends the process and the connections to it.
func (p *process) kill(conns ...[]net.Conn) {
	for _, conn := range slices.Concat(conns...) {
		conn.Close()
	}
	p.Process.Kill()
	p.Wait()
}

// joinAll has so many validators join, one after the other.
func joinAll(b *testing.B, p *process, validators int) (conns []net.Conn) {
	for range validators {
		conn, err := net.Dial("tcp", p.address)
		if err != nil {
			b.Fatal(err)
		}
		readBytes(b, conn, len(balancePrompt))
		io.WriteString(conn, "100\n")
		readReply(b, conn)
		conns = append(conns, conn)
	}
	return conns
}

// readBytes reads and forgets so many bytes.
func readBytes(b *testing.B, conn net.Conn, count int) {
	buf := make([]byte, min(count, 64<<10))
	for count > 0 {
		n, err := conn.Read(buf[:min(count, len(buf))])
		if count -= n; err != nil {
			b.Error(err)
			return
		}
	}
}

// propose sends a BPM line, and reads the reply and returns its size.
func propose(b *testing.B, conn net.Conn) int {
	io.WriteString(conn, "72\n")
	return readReply(b, conn)
}

// readReply reads what is said next, to its prompt, and returns its size.
func readReply(b *testing.B, conn net.Conn) int {
	buf := make([]byte, 512)
	n := 0
	for !bytes.HasSuffix(buf[:n], []byte(bpmPrompt)) {
		more, err := conn.Read(buf[n:])
		if n += more; err != nil || n == len(buf) {
			b.Errorf("received %q, %v, want %q at its end", buf[:n], err, bpmPrompt)
			break
		}
	}
	return n
}

// drawLine has either server draw: at once, or at the next tick.
var drawLine = map[string]string{"bare": "D", "the program": "72\n"}

// drawReplies are what comes of it.
var drawReplies = map[string][]string{"bare": {"winning validator: "}, "the program": {"proposed with BPM 72", "winning validator: "}}

// mostValidators returns as many validators as there may be descriptors for, up to 10,000.
func mostValidators(b *testing.B) int {
	limit, err := exec.Command("sh", "-c", "ulimit -Hn").Output()
	if err != nil {
		b.Skip(err)
	}
	if n, err := strconv.Atoi(strings.TrimSpace(string(limit))); err == nil && n < 10_100 {
		return n - 100
	}
	return 10_000
}

// BenchmarkDraw announces draws to as many validators as there may be descriptors for,
// up to 10,000. It measures the memory a validator, the time from the first that receives
// the winner to the last, the processor time of one announcement, and the time to join.
func BenchmarkDraw(b *testing.B) {
	validators := mostValidators(b)
	const draws = 10
	compare(b, func(server string) map[string]float64 {
		p := startServer(b, server, "ROUND_INTERVAL=1s", "MAX_VALIDATORS=10001")
		empty := p.memory("VmRSS")
		start := time.Now()
		conns := joinAll(b, p, validators)
		joining := time.Since(start)

		drawer := joinAll(b, p, 1)[0]
		drawn := bufio.NewReader(drawer)
		first, last := time.Now().Add(time.Hour), time.Time{}
		var mu sync.Mutex
		receive := func(conn net.Conn) {
			readReply(b, conn)
			now := time.Now()
			mu.Lock()
			defer mu.Unlock()
			if now.Before(first) {
				first = now
			}
			if now.After(last) {
				last = now
			}
		}
		var spreads []time.Duration
		var before time.Duration
		for draw := range 1 + draws {
			if draw == 1 { // the first one is for warming up
				before = p.cpu()
			}
			first, last = time.Now().Add(time.Hour), time.Time{}
			var receiving sync.WaitGroup
			for _, conn := range conns {
				receiving.Go(func() { receive(conn) })
			}
			io.WriteString(drawer, drawLine[server])
			wantNext(b, drawn, drawReplies[server]...)
			receiving.Wait()
			spreads = append(spreads, last.Sub(first))
		}
		cpu := p.cpu() - before
		slices.Sort(spreads)
		memory := p.memory("VmRSS") - empty
		p.kill(conns, []net.Conn{drawer})
		return map[string]float64{
			"B/validator":      float64(memory) / float64(validators),
			"ms-spread":        float64(spreads[draws/2]) / 1e6,
			"µs-cpu/validator": float64(cpu) / 1e3 / float64(draws*validators),
			"µs/join":          float64(joining) / 1e3 / float64(validators),
		}
	})
	b.ReportMetric(float64(validators), "validators")
}

// BPM lines of 64 validators at once, one line at a time and 32.
func BenchmarkLines(b *testing.B) {
	for _, lines := range []int{1, 32} {
		b.Run(strconv.Itoa(lines), func(b *testing.B) {
			compare(b, func(server string) map[string]float64 {
				p := startServer(b, server, "ROUND_INTERVAL=1h")
				conns := joinAll(b, p, 64)
				text := []byte(strings.Repeat("72\n", lines))
				var count atomic.Int64
				var talking sync.WaitGroup
				size := 0
				for range 2 { // the reply to the first line is another
					for _, conn := range conns {
						size = propose(b, conn)
					}
				}
				start := time.Now()
				for _, conn := range conns {
					talking.Go(func() {
						for time.Since(start) < 2*time.Second {
							conn.Write(text)
							readBytes(b, conn, lines*size)
							count.Add(int64(lines))
						}
					})
				}
				talking.Wait()
				rate := float64(count.Load()) / time.Since(start).Seconds()
				p.kill(conns)
				return map[string]float64{"lines/s": rate}
			})
		})
	}
}

// The first BPM lines of 4,000 validators at once, each a proposal; five times
// with a new server, since one is over so soon.
func BenchmarkFirstProposals(b *testing.B) {
	const validators, servers = 4000, 5
	compare(b, func(server string) map[string]float64 {
		var took time.Duration
		for range servers {
			p := startServer(b, server, "ROUND_INTERVAL=1h")
			conns := joinAll(b, p, validators)
			var proposing sync.WaitGroup
			begin := make(chan struct{})
			for _, conn := range conns {
				proposing.Go(func() {
					<-begin
					propose(b, conn)
				})
			}
			start := time.Now()
			close(begin)
			proposing.Wait()
			took += time.Since(start)
			p.kill(conns)
		}
		return map[string]float64{"lines/s": servers * validators / took.Seconds()}
	})
}

// One validator talks while a draw is announced to as many others as in BenchmarkDraw:
// the longest that it waits for a reply, the median of twenty draws.
func BenchmarkWorstReply(b *testing.B) {
	validators := mostValidators(b)
	compare(b, func(server string) map[string]float64 {
		file := filepath.Join(b.TempDir(), "chain.jsonl")
		p := startServer(b, server, "ROUND_INTERVAL=500ms", "CHAIN_FILE="+file, "MAX_VALIDATORS=10002")
		conns := joinAll(b, p, validators)
		for _, conn := range conns {
			go io.Copy(io.Discard, conn)
		}
		talker, drawer := joinAll(b, p, 1)[0], joinAll(b, p, 1)[0]
		drawn := bufio.NewReader(drawer)
		var worst []time.Duration
		for range 20 {
			over := make(chan struct{})
			io.WriteString(drawer, drawLine[server])
			go func() {
				defer close(over)
				for heard := ""; !strings.Contains(heard, "winning validator: "); { // after its reply, or before it
					var err error
					if heard, err = readMessage(drawn); err != nil {
						b.Errorf("received %q, %v", heard, err)
						return
					}
				}
				time.Sleep(300 * time.Millisecond) // it is announced to the others meanwhile
			}()
			longest := time.Duration(0)
			for waiting := true; waiting; {
				start := time.Now()
				propose(b, talker)
				longest = max(longest, time.Since(start))
				select {
				case <-over:
					waiting = false
				default:
				}
			}
			worst = append(worst, longest)
		}
		slices.Sort(worst)
		p.kill(conns, []net.Conn{talker, drawer})
		return map[string]float64{"ms-worst": float64(worst[len(worst)/2]) / 1e6}
	})
}

// One validator proposes a block in each round while 2,000 others read nothing and a chain of
// 12,000 blocks is broadcast to all: how late it hears of a draw, and the most memory that the
// program takes. They are the medians of five runs, which end long before the 45 s after which
// the others are dropped.
//
// A draw's time is the modification time of the chain's file, which the system sets as it writes
// the block. It may be read late, since the next block is proposed only after that. The sync is
// in the lateness, and so is up to one tick of the system's clock, 1 to 10 ms.
func BenchmarkLateDraw(b *testing.B) {
	const validators, draws = 2000, 5
	var late, memory []float64 // of each run
	for b.Loop() {
		for range 5 {
			file, _ := newLongChainFile(b, 12_000)
			p := startServer(b, "the program", "CHAIN_FILE="+file, "BROADCAST_BLOCKS=0", "BROADCAST_INTERVAL=1.5s", "ROUND_INTERVAL=1s")
			conns := joinAll(b, p, validators)
			drawer := joinAll(b, p, 1)[0] // the last one that is written to
			drawn := bufio.NewReaderSize(drawer, 64<<10)
			worst := time.Duration(0)
			for range draws {
				io.WriteString(drawer, "72\n")
				for line := ""; !strings.HasPrefix(line, "winning validator: "); {
					var err error
					if line, err = drawn.ReadString('\n'); err != nil { // readUntil would be too slow for the chain
						b.Fatal(err)
					}
				}
				heard := time.Now()
				info, err := os.Stat(file)
				if err != nil {
					b.Fatal(err)
				}
				worst = max(worst, heard.Sub(info.ModTime()))
			}
			late = append(late, float64(worst)/1e6)
			memory = append(memory, float64(p.memory("VmHWM"))/1e6)
			p.kill(conns, []net.Conn{drawer})
		}
	}
	slices.Sort(late)
	slices.Sort(memory)
	b.ReportMetric(late[len(late)/2], "ms-late")
	b.ReportMetric(memory[len(memory)/2], "MB")
	b.ReportMetric(0, "ns/op")
}

// The whole chain, 10,000 blocks, is broadcast to 200 validators.
func BenchmarkBroadcast(b *testing.B) {
	const validators, broadcasts = 200, 10
	file, size := newLongChainFile(b, 10_000)
	message := size + len("\n[") + len("]\n") - 1 + len(bpmPrompt)
	compare(b, func(server string) map[string]float64 {
		p := startServer(b, server, "CHAIN_FILE="+file, "BROADCAST_BLOCKS=0", "BROADCAST_INTERVAL=200ms", "BARE_CHAIN="+strconv.Itoa(message))
		conns := joinAll(b, p, validators)
		caller := joinAll(b, p, 1)[0]
		go io.Copy(io.Discard, caller)
		var took time.Duration
		before := p.cpu()
		for range broadcasts {
			if server == "bare" {
				io.WriteString(caller, "C")
			}
			var start time.Time
			var once sync.Once
			var receiving sync.WaitGroup
			for _, conn := range conns {
				receiving.Go(func() {
					readBytes(b, conn, 1)
					once.Do(func() { start = time.Now() })
					readBytes(b, conn, message-1)
				})
			}
			receiving.Wait()
			took += time.Since(start)
		}
		cpu := p.cpu() - before
		p.kill(conns, []net.Conn{caller})
		total := float64(broadcasts * validators * message)
		return map[string]float64{"MB/s": total / 1e6 / took.Seconds(), "s-cpu/GB": cpu.Seconds() / total * 1e9}
	})
}

// A chain of a million blocks: the memory that the program takes at most after it has read
// it, if a broadcast carries 100 blocks; if it carries all of them, also to the bytes of the
// file, and while it broadcasts them.
func BenchmarkMemory(b *testing.B) {
	file, size := newLongChainFile(b, 1_000_000)
	for b.Loop() {
		p := startServer(b, "the program", "CHAIN_FILE="+file, "BROADCAST_BLOCKS=100")
		b.ReportMetric(float64(p.memory("VmHWM"))/1e6, "MB-100-blocks")
		p.kill(nil)
		p = startServer(b, "the program", "CHAIN_FILE="+file, "BROADCAST_BLOCKS=0", "BROADCAST_INTERVAL=2s")
		b.ReportMetric(float64(p.memory("VmHWM"))/float64(size), "B/B-read")
		conns := joinAll(b, p, 4)
		var receiving sync.WaitGroup
		for _, conn := range conns {
			receiving.Go(func() { readBytes(b, conn, size) })
		}
		receiving.Wait()
		b.ReportMetric(float64(p.memory("VmHWM"))/float64(size), "B/B-broadcast")
		p.kill(conns)
	}
	b.ReportMetric(0, "ns/op")
}
