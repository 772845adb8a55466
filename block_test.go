package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// golden is a block whose hash jq and sha256sum have found.
var golden = Block{
	Index:     1,
	Timestamp: "2009-02-13T23:31:30.5Z",
	BPM:       72,
	Hash:      "d25c95c254cdb31ea32bb6b7ad4886c322f7ff45be5e05308661078059f258b6",
	PrevHash:  strings.Repeat("a", 64),
	Validator: strings.Repeat("b", 64),
}

func TestHashIsStable(t *testing.T) {
	if hash := calculateBlockHash(golden); hash != golden.Hash {
		t.Errorf("the hash of the golden block is %s, want %s", hash, golden.Hash)
	}
}

// Anybody can check a block with common tools.
func TestHashWithCommonTools(t *testing.T) {
	for _, tool := range []string{"jq", "sha256sum"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(err)
		}
	}
	block := generateBlock(golden, -7, golden.Validator, time.Now())
	cmd := exec.Command("sh", "-c", `jq -cj '.Hash=""' | sha256sum`)
	cmd.Stdin = bytes.NewReader(block.appendJSON(nil))
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if hash := strings.Fields(string(out))[0]; hash != block.Hash {
		t.Errorf("jq and sha256sum say %s, want %s", hash, block.Hash)
	}
}

// Every field counts, and none can be taken for another.
func TestHashCoversEveryField(t *testing.T) {
	hashes := make(map[string]Block)
	for _, block := range []Block{
		{}, {Index: 1}, {BPM: 1}, {Index: 11}, {BPM: 11}, {Index: 1, BPM: 1}, {Index: 1, BPM: -1},
		{Timestamp: "1"}, {PrevHash: "1"}, {Validator: "1"},
		{BPM: 1114112}, {BPM: 1114113}, // the same to the tutorial
	} {
		hash := calculateBlockHash(block)
		if other, taken := hashes[hash]; taken {
			t.Errorf("%v and %v have the same hash", block, other)
		}
		hashes[hash] = block
		block.Hash = "x"
		if calculateBlockHash(block) != hash {
			t.Errorf("the Hash of %v counts in its hash", block)
		}
	}
}

func TestJSONIsThatOfEncodingJSON(t *testing.T) {
	random := rand.New(rand.NewPCG(7, 8))
	block := nothing
	for range 1000 {
		block = generateBlock(block, int(random.Int64()), golden.Validator, time.Unix(random.Int64N(1<<33), random.Int64N(1e9)))
		want, err := json.Marshal(block)
		if err != nil {
			t.Fatal(err)
		}
		if got := block.appendJSON(nil); !bytes.Equal(got, want) {
			t.Fatalf("JSON is  %s\nwant     %s", got, want)
		}
	}
}

func TestValidateBlock(t *testing.T) {
	genesis := generateBlock(nothing, 0, "", time.Now())
	block := generateBlock(genesis, 72, golden.Validator, time.Now())
	if err := validateBlock(genesis, nothing); err != nil {
		t.Errorf("genesis block: %v", err)
	}
	if err := validateBlock(block, genesis); err != nil {
		t.Errorf("block 1: %v", err)
	}
	rehash := func(b *Block) { b.Hash = calculateBlockHash(*b) }
	for name, test := range map[string]struct {
		spoil func(b *Block)
		want  string
	}{
		"same index":      {func(b *Block) { b.Index = 0; rehash(b) }, "its Index is 0, want 1"},
		"index after":     {func(b *Block) { b.Index = 2; rehash(b) }, "its Index is 2, want 1"},
		"link":            {func(b *Block) { b.PrevHash = golden.Hash; rehash(b) }, "its PrevHash is"},
		"no link":         {func(b *Block) { b.PrevHash = ""; rehash(b) }, "its PrevHash is"},
		"hash":            {func(b *Block) { b.Hash = golden.Hash }, "its Hash is"},
		"no hash":         {func(b *Block) { b.Hash = "" }, "its Hash is"},
		"upper-case hash": {func(b *Block) { b.Hash = strings.ToUpper(b.Hash) }, "its Hash is"},
		"time":            {func(b *Block) { b.Timestamp = golden.Timestamp }, "its Hash is"},
		"BPM":             {func(b *Block) { b.BPM++ }, "its Hash is"},
		"validator":       {func(b *Block) { b.Validator = golden.Hash }, "its Hash is"},
	} {
		spoilt := block
		test.spoil(&spoilt)
		if err := validateBlock(spoilt, genesis); err == nil || !strings.HasPrefix(err.Error(), test.want) {
			t.Errorf("%s: %v, want %s", name, err, test.want)
		}
	}
	for name, spoil := range map[string]func(b *Block){
		"BPM":       func(b *Block) { b.BPM = 1; rehash(b) },
		"validator": func(b *Block) { b.Validator = golden.Validator; rehash(b) },
	} {
		spoilt := genesis
		spoil(&spoilt)
		if err := validateBlock(spoilt, nothing); err == nil || !strings.HasPrefix(err.Error(), "the genesis block has") {
			t.Errorf("genesis %s: %v", name, err)
		}
	}
}

// newBlockchain returns a chain in memory.
func newBlockchain(t testing.TB) *Blockchain {
	c, err := openBlockchain("", log.New(io.Discard, "", 0))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// blocks returns the blocks of a chain after checking all of them.
func blocks(t *testing.T, c *Blockchain) (all []Block) {
	t.Helper()
	text := "[" + string(bytes.Join(c.latest(0), nil)) + "]"
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		t.Fatalf("%v in %.300s", err, text)
	}
	last := nothing
	for _, block := range all {
		if err := validateBlock(block, last); err != nil {
			t.Fatalf("block %d: %v", block.Index, err)
		}
		last = block
	}
	if last != c.head {
		t.Fatalf("the head is %v, want the last block, %v", c.head, last)
	}
	return all
}

func TestAppendRefuses(t *testing.T) {
	c := newBlockchain(t)
	genesis := c.head
	block := generateBlock(genesis, 72, golden.Validator, time.Now())
	if err := c.append(block); err != nil {
		t.Fatal(err)
	}
	if err := c.append(block); err == nil || !strings.Contains(err.Error(), "block 1: its Index is 1, want 2") {
		t.Errorf("appending twice: %v", err)
	}
	if got := blocks(t, c); len(got) != 2 || got[0] != genesis || got[1] != block {
		t.Errorf("the chain is %v", got)
	}
}

// latest gives every count of blocks, over the bounds of chunks too, and
// what it gave stays the same when the chain grows.
func TestLatest(t *testing.T) {
	c := newBlockchain(t)
	var early []string // the text at the time
	var pieces [][][]byte
	long := strings.Repeat("v", 10_000) // so that few blocks fill a chunk
	for len(c.chunks) < 3 {
		if c.head.Index%50 == 0 {
			pieces = append(pieces, c.latest(0))
			early = append(early, string(bytes.Join(c.latest(0), nil)))
		}
		if err := c.append(generateBlock(c.head, c.head.Index, long, time.Now())); err != nil {
			t.Fatal(err)
		}
	}
	for i := range early {
		if text := string(bytes.Join(pieces[i], nil)); text != early[i] {
			t.Fatalf("the chain of %d blocks has changed", i*50+1)
		}
	}
	all := blocks(t, c)
	counts := []int{0, 1, 2, len(all) - 1, len(all), len(all) + 1}
	whole := 0 // blocks in the latest chunks
	for _, chunk := range slices.Backward(c.chunks) {
		whole += bytes.Count(chunk, []byte("{"))
		counts = append(counts, whole-1, whole, whole+1)
	}
	for _, count := range counts {
		pieces := c.latest(count)
		text := string(bytes.Join(pieces, nil))
		first := len(all) - count
		if count == 0 || count > len(all) {
			first = 0
		}
		if !strings.HasPrefix(text, fmt.Sprintf(`{"Index":%d,`, first)) || strings.Count(text, `{"Index":`) != len(all)-first || !strings.HasSuffix(text, `"}`) {
			t.Fatalf("latest(%d) begins with %.20s and has %d blocks", count, text, strings.Count(text, `{"Index":`))
		}
	}
}

// newChainFile returns the name of a new file with a chain of so many blocks,
// and its bytes.
func newChainFile(t testing.TB, blocks int) (name string, text []byte) {
	t.Helper()
	name = filepath.Join(t.TempDir(), "chain.jsonl")
	c := open(t, name)
	for c.head.Index < blocks-1 {
		appendBlock(t, c)
	}
	return name, readFile(t, name)
}

func open(t testing.TB, name string) *Blockchain {
	t.Helper()
	c, err := openBlockchain(name, log.New(io.Discard, "", 0))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeChain(c) })
	return c
}

// closeChain lets the chain's file go, as the end of the program does.
func closeChain(c *Blockchain) {
	if file, ok := c.file.(io.Closer); ok {
		file.Close()
	}
}

func appendBlock(t testing.TB, c *Blockchain) {
	t.Helper()
	if err := c.append(generateBlock(c.head, 72, golden.Validator, time.Now())); err != nil {
		t.Fatal(err)
	}
}

func readFile(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func writeFile(t testing.TB, name string, text []byte) {
	t.Helper()
	if err := os.WriteFile(name, text, 0o644); err != nil {
		t.Fatal(err)
	}
}

// The file is the blocks that are broadcast, one a line, and read again it is
// the same chain.
func TestFileIsTheChain(t *testing.T) {
	name, _ := newChainFile(t, 1)
	c := open(t, name)
	for range 10 {
		appendBlock(t, c)
		objects := bytes.Split(readFile(t, name), []byte("\n"))
		if want := bytes.Join(objects[:len(objects)-1], []byte(",")); !bytes.Equal(bytes.Join(c.latest(0), nil), want) || len(objects[len(objects)-1]) != 0 {
			t.Fatalf("the file has %s, the chain %s", want, c.latest(0))
		}
		again := open(t, name)
		if fmt.Sprint(blocks(t, again)) != fmt.Sprint(blocks(t, c)) || again.size != c.size {
			t.Fatalf("the chain read again is %v", again)
		}
	}
}

// Cut off anywhere, as by a crash, the chain goes on from its last whole line.
func TestFileCutOff(t *testing.T) {
	name, text := newChainFile(t, 3)
	for cut := range len(text) + 1 {
		writeFile(t, name, text[:cut])
		whole := text[:bytes.LastIndexByte(text[:cut], '\n')+1]
		var logged bytes.Buffer
		c, err := openBlockchain(name, log.New(&logged, "", 0))
		if err != nil {
			t.Fatalf("cut at %d: %v", cut, err)
		}
		warning := ""
		if torn := cut - len(whole); torn > 0 {
			warning = fmt.Sprintf("dropped the last %d bytes of %s, a line without its end\n", torn, name)
		}
		if logged.String() != warning {
			t.Fatalf("cut at %d: logged %q, want %q", cut, &logged, warning)
		}
		appendBlock(t, c)
		got := readFile(t, name)
		want := max(bytes.Count(whole, []byte("\n")), 1) + 1 // there is always a genesis block
		if !bytes.HasPrefix(got, whole) || len(blocks(t, c)) != want || bytes.Count(got, []byte("\n")) != want {
			t.Fatalf("cut at %d: the file has %s, want %d blocks", cut, got, want)
		}
		closeChain(c)
	}
	// However long what was cut off is, and whatever is in it.
	for _, torn := range [][]byte{make([]byte, 1<<20), bytes.Repeat([]byte("x"), 64<<10), text[:100]} {
		writeFile(t, name, append(bytes.Clone(text), torn...))
		if c := open(t, name); c.size != int64(len(text)) || !bytes.Equal(readFile(t, name), text) {
			t.Fatalf("with %d bytes after it the chain has %d bytes, want %d", len(torn), c.size, len(text))
		}
	}
}

// A file with any byte changed is refused, with the number of the line, and left as it is.
func TestFileDamaged(t *testing.T) {
	name, text := newChainFile(t, 3)
	refused := func(damaged []byte, line int) {
		t.Helper()
		writeFile(t, name, damaged)
		c, err := openBlockchain(name, log.New(io.Discard, "", 0))
		if err == nil {
			closeChain(c)
			t.Fatalf("accepted: %q", damaged)
		}
		if want := fmt.Sprintf("%s, line %d: ", name, line); !strings.HasPrefix(err.Error(), want) {
			t.Fatalf("%v, want %s", err, want)
		}
		if got := readFile(t, name); !bytes.Equal(got, damaged) {
			t.Fatalf("the file was changed to %q", got)
		}
	}
	for i := range text[:len(text)-1] {
		for _, with := range []byte{text[i] ^ 1, text[i] ^ 0x20, text[i] ^ 0x80, '\n', 0} {
			if with == text[i] {
				continue
			}
			damaged := bytes.Clone(text)
			damaged[i] = with
			refused(damaged, 1+bytes.Count(text[:i], []byte("\n")))
		}
	}

	lines := bytes.SplitAfter(text, []byte("\n"))[:3]
	join := func(lines ...[]byte) []byte { return bytes.Join(lines, nil) }
	refused(join(lines[0], lines[2]), 2)
	refused(join(lines[1], lines[2]), 1)
	refused(join(lines[0], lines[0]), 2)
	refused(join(lines[0], []byte("\n"), lines[1]), 2)
	refused(join(text, []byte("\n")), 4)
	refused(join(text, []byte(" \n")), 4)
	refused(join(lines[0], bytes.Repeat([]byte("x"), 1<<20), []byte("\n")), 2)
	refused(join(lines[0], make([]byte, 64<<10), lines[1]), 2)

	// The hash of these is right, but they are not what the server would write.
	object := string(bytes.TrimSpace(lines[0]))
	timestamp := object[strings.Index(object, `"Timestamp"`):strings.Index(object, `,"BPM"`)]
	for _, other := range []string{
		strings.Replace(object, ",", ", ", 1),
		object + " ",
		object + "\r",
		" " + object,
		strings.Replace(object, "Index", "index", 1),
		strings.Replace(object, `"BPM":0`, `"BPM":-0`, 1),
		strings.Replace(object, `"BPM":0`, `"BPM":00`, 1),
		strings.Replace(object, `"Index":0`, `"Index":+0`, 1),
		strings.Replace(object, `"BPM":0`, `"BPM":0,"More":1`, 1),
		strings.Replace(object, `"Index":0,`+timestamp, timestamp+`,"Index":0`, 1),
		strings.Replace(object, "}", `,"Validator":""}`, 1),
		object + object,
	} {
		refused([]byte(other+"\n"), 1)
	}
	genesis, err := parseBlock(object)
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range []string{"\x1b[2J", `\u0041`, "é", `"`, "<"} {
		first := Block{Timestamp: other}
		first.Hash = calculateBlockHash(first)
		refused(append(first.appendJSON(nil), '\n'), 1)
		second := generateBlock(genesis, 0, other, time.Now())
		refused(join(lines[0], second.appendJSON(nil), []byte("\n")), 2)
	}
}

// A hookedFile does something else in Sync.
type hookedFile struct {
	chainFile
	sync func() error
}

func (f *hookedFile) Sync() error { return f.sync() }

// A failingFile fails where it is told to.
type failingFile struct {
	*os.File
	write, sync, truncate error
	written               int // of what a failing write is given
}

func (f *failingFile) Write(p []byte) (int, error) {
	if f.write != nil {
		n, _ := f.File.Write(p[:f.written])
		return n, f.write
	}
	return f.File.Write(p)
}

func (f *failingFile) Sync() error {
	if f.sync != nil {
		return f.sync
	}
	return f.File.Sync()
}

func (f *failingFile) Truncate(size int64) error {
	if f.truncate != nil {
		return f.truncate
	}
	return f.File.Truncate(size)
}

// After a write that fails everything is as before it, and the next one works.
func TestWriteFails(t *testing.T) {
	full := errors.New("no space left on device")
	for name, fails := range map[string]failingFile{
		"write":       {write: full},
		"short write": {write: full, written: 100},
		"whole write": {write: full, written: 250},
		"fsync":       {sync: full},
	} {
		t.Run(name, func(t *testing.T) {
			file, before := newChainFile(t, 2)
			c := open(t, file)
			fails.File = c.file.(*os.File)
			c.file = &fails
			old := *c
			for range 3 {
				err := c.append(generateBlock(c.head, 72, golden.Validator, time.Now()))
				if !errors.Is(err, full) || errors.Is(err, errChainLost) {
					t.Fatalf("append: %v, want %v alone", err, full)
				}
				if c.head != old.head || c.size != old.size || len(blocks(t, c)) != 2 || !bytes.Equal(readFile(t, file), before) {
					t.Fatalf("after a failed append the chain is %v and the file %s", c.head, readFile(t, file))
				}
			}
			fails = failingFile{File: fails.File}
			appendBlock(t, c)
			if again := open(t, file); again.head != c.head || len(blocks(t, again)) != 3 {
				t.Errorf("the chain read again ends with %v, want %v", again.head, c.head)
			}

			fails = failingFile{File: fails.File, write: full, written: 100, truncate: errors.New("input/output error")}
			err := c.append(generateBlock(c.head, 72, golden.Validator, time.Now()))
			if !errors.Is(err, errChainLost) || !errors.Is(err, full) || !errors.Is(err, fails.truncate) {
				t.Errorf("append: %v, want all three errors", err)
			}
		})
	}
}

// A file that something else has touched is left as it is.
func TestFileIsLost(t *testing.T) {
	for name, test := range map[string]struct {
		touch func(t *testing.T, file string, text []byte)
		want  string
	}{
		"deleted": {func(t *testing.T, file string, text []byte) { os.Remove(file) }, "no such file"},
		"replaced by a copy": {func(t *testing.T, file string, text []byte) {
			writeFile(t, file+"~", text)
			os.Rename(file+"~", file)
		}, "was replaced by another file"},
		"written to": {func(t *testing.T, file string, text []byte) { writeFile(t, file, append(text, text...)) }, "something else has written to it"},
		"cut":        {func(t *testing.T, file string, text []byte) { os.Truncate(file, 10) }, "something else has written to it"},
	} {
		t.Run(name, func(t *testing.T) {
			file, text := newChainFile(t, 2)
			c := open(t, file)
			test.touch(t, file, text)
			touched, _ := os.ReadFile(file)
			err := c.append(generateBlock(c.head, 72, golden.Validator, time.Now()))
			if !errors.Is(err, errChainLost) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("append: %v, want %s", err, test.want)
			}
			if left, _ := os.ReadFile(file); !bytes.Equal(left, touched) || len(blocks(t, c)) != 2 {
				t.Errorf("the file has %q, want %q as before", left, touched)
			}
		})
	}
}

func TestFileCannotBeUsed(t *testing.T) {
	dir := t.TempDir()
	names := []string{dir, filepath.Join(dir, "none", "chain.jsonl"), os.DevNull}
	if fifo := filepath.Join(dir, "fifo"); exec.Command("mkfifo", fifo).Run() == nil {
		names = append(names, fifo) // reading it would never end
	}
	for _, name := range names {
		c, err := openBlockchain(name, log.New(io.Discard, "", 0))
		if err == nil {
			closeChain(c)
			t.Errorf("%s was taken for a chain", name)
		} else if !strings.Contains(err.Error(), name) {
			t.Errorf("%v does not name %s", err, name)
		}
	}
}

// Whatever is in the file, opening it either gives the chain of its whole lines
// or refuses and leaves it as it is.
func FuzzOpen(f *testing.F) {
	name, text := newChainFile(f, 3)
	f.Add(text)
	f.Add(text[:len(text)-1])
	f.Add(text[:200])
	f.Add(bytes.Replace(text, []byte(`"BPM":72`), []byte(`"BPM":73`), 1))
	f.Add([]byte("\n"))
	f.Add(make([]byte, 1000))
	f.Fuzz(func(t *testing.T, text []byte) {
		writeFile(t, name, text)
		c, err := openBlockchain(name, log.New(io.Discard, "", 0))
		got := readFile(t, name)
		if err != nil {
			if !bytes.Equal(got, text) {
				t.Fatalf("refused with %v and changed to %q", err, got)
			}
			return
		}
		defer closeChain(c)
		whole := text[:bytes.LastIndexByte(text, '\n')+1]
		if len(whole) > 0 && !bytes.Equal(got, whole) || len(blocks(t, c)) != bytes.Count(got, []byte("\n")) {
			t.Fatalf("taken for %q", got)
		}
	})
}

// newLongChainFile returns the name and the size of a file with a chain of so many
// blocks, written without a sync for each.
func newLongChainFile(b *testing.B, blocks int) (name string, size int) {
	b.Helper()
	name = filepath.Join(b.TempDir(), "chain.jsonl")
	file, err := os.Create(name)
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	w := bufio.NewWriter(file)
	block := generateBlock(nothing, 0, "", time.Unix(0, 0))
	for range blocks {
		n, _ := w.Write(append(block.appendJSON(nil), '\n'))
		size += n
		block = generateBlock(block, 72, golden.Validator, time.Unix(int64(30*block.Index), 123456789))
	}
	if err := w.Flush(); err != nil {
		b.Fatal(err)
	}
	return name, size
}

// Opening a chain, beside what encoding/json and SHA-256 take for its lines.
func BenchmarkOpen(b *testing.B) {
	const count = 100_000
	name, _ := newLongChainFile(b, count)
	lines := bytes.Split(bytes.TrimSpace(readFile(b, name)), []byte("\n"))
	var opening, coding, hashing time.Duration
	n := 0
	for b.Loop() {
		start := time.Now()
		c, err := openBlockchain(name, log.New(io.Discard, "", 0))
		if err != nil {
			b.Fatal(err)
		}
		opening += time.Since(start)
		closeChain(c)

		start = time.Now()
		for _, line := range lines {
			sha256.Sum256(line)
		}
		hashing += time.Since(start)

		start = time.Now()
		for _, line := range lines {
			var block Block
			if err := json.Unmarshal(line, &block); err != nil {
				b.Fatal(err)
			}
			if again, err := json.Marshal(block); err != nil || !bytes.Equal(again, line) {
				b.Fatal(err)
			}
		}
		coding += time.Since(start)
		n += count
	}
	b.ReportMetric(float64(opening)/float64(n), "ns/block")
	b.ReportMetric(float64(opening)/float64(coding+hashing), "json+sha256")
	b.ReportMetric(float64(opening)/float64(hashing), "sha256")
	b.ReportMetric(0, "ns/op")
}

// What a broadcast of the latest 100 blocks takes, beyond writing it, as the
// chain grows.
func BenchmarkLatest(b *testing.B) {
	for _, count := range []int{1000, 10_000, 100_000} {
		b.Run(strconv.Itoa(count), func(b *testing.B) {
			name, _ := newLongChainFile(b, count)
			c := open(b, name)
			b.ReportAllocs()
			for b.Loop() {
				c.latest(100)
			}
		})
	}
}
