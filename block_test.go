package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"
)

// golden is a block with the hash that jq and sha256sum compute for it.
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
	block := beforeGenesis
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

// The error says which block is wrong, why, and with which hashes.
func TestValidateBlock(t *testing.T) {
	genesis := generateBlock(beforeGenesis, 0, "", time.Now())
	block := generateBlock(genesis, 72, golden.Validator, time.Now())
	if err := validateBlock(genesis, beforeGenesis); err != nil {
		t.Errorf("genesis block: %v", err)
	}
	if err := validateBlock(block, genesis); err != nil {
		t.Errorf("block 1: %v", err)
	}
	rehash := func(b *Block) { b.Hash = calculateBlockHash(*b) }
	const noGenesis = "block 0 is no genesis block: that has BPM 0, an empty PrevHash and an empty Validator"
	for name, test := range map[string]struct {
		oldBlock, newBlock Block
		spoil              func(b *Block)
		want               string // HASH stands for the hash of the spoilt block
	}{
		"same index":  {genesis, block, func(b *Block) { b.Index = 0; rehash(b) }, "block 0 stands where block 1 belongs"},
		"index after": {genesis, block, func(b *Block) { b.Index = 2; rehash(b) }, "block 2 stands where block 1 belongs"},
		"link": {genesis, block, func(b *Block) { b.PrevHash = golden.Hash; rehash(b) },
			"block 1 does not follow: its PrevHash is " + golden.Hash + ", the Hash of block 0 is " + genesis.Hash},
		"no link": {genesis, block, func(b *Block) { b.PrevHash = ""; rehash(b) },
			"block 1 does not follow: its PrevHash is empty, the Hash of block 0 is " + genesis.Hash},
		"hash": {genesis, block, func(b *Block) { b.Hash = golden.Hash },
			"block 1 was changed: its contents hash to HASH, its Hash says " + golden.Hash},
		"no hash": {genesis, block, func(b *Block) { b.Hash = "" },
			"block 1 was changed: its contents hash to HASH, its Hash says nothing"},
		"upper-case hash": {genesis, block, func(b *Block) { b.Hash = strings.ToUpper(b.Hash) },
			"block 1 was changed: its contents hash to HASH, its Hash says " + strings.ToUpper(block.Hash)},
		"time": {genesis, block, func(b *Block) { b.Timestamp = golden.Timestamp },
			"block 1 was changed: its contents hash to HASH, its Hash says " + block.Hash},
		"BPM": {genesis, block, func(b *Block) { b.BPM++ },
			"block 1 was changed: its contents hash to HASH, its Hash says " + block.Hash},
		"validator": {genesis, block, func(b *Block) { b.Validator = golden.Hash },
			"block 1 was changed: its contents hash to HASH, its Hash says " + block.Hash},
		"genesis time": {beforeGenesis, genesis, func(b *Block) { b.Timestamp = golden.Timestamp },
			"block 0 was changed: its contents hash to HASH, its Hash says " + genesis.Hash},
		"genesis index":     {beforeGenesis, genesis, func(b *Block) { b.Index = 1; rehash(b) }, "block 1 stands where block 0 belongs"},
		"genesis BPM":       {beforeGenesis, genesis, func(b *Block) { b.BPM = 1; rehash(b) }, noGenesis},
		"genesis link":      {beforeGenesis, genesis, func(b *Block) { b.PrevHash = golden.Hash; rehash(b) }, noGenesis},
		"genesis validator": {beforeGenesis, genesis, func(b *Block) { b.Validator = golden.Validator; rehash(b) }, noGenesis},
	} {
		test.spoil(&test.newBlock)
		want := strings.Replace(test.want, "HASH", calculateBlockHash(test.newBlock), 1)
		if err := validateBlock(test.newBlock, test.oldBlock); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", name, err, want)
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
	last := beforeGenesis
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
	if err := c.append(block); err == nil || err.Error() != "block 1 stands where block 2 belongs" {
		t.Errorf("appending twice: %v", err)
	}
	if got := blocks(t, c); len(got) != 2 || got[0] != genesis || got[1] != block {
		t.Errorf("the chain is %v", got)
	}
}

// latest gives every count of blocks, over the bounds of chunks too, and
// what it gave stays the same when the chain grows.
func TestLatest(t *testing.T) {
	openFast(t)
	c := newBlockchain(t)
	var early []string // the text at the time
	var pieces [][][]byte
	for len(c.chunks) < 5 {
		if c.head.Index%5 == 0 {
			pieces = append(pieces, c.latest(0))
			early = append(early, string(bytes.Join(c.latest(0), nil)))
		}
		if err := c.append(generateBlock(c.head, c.head.Index, golden.Validator, time.Now())); err != nil {
			t.Fatal(err)
		}
	}
	for i := range early {
		if text := string(bytes.Join(pieces[i], nil)); text != early[i] {
			t.Fatalf("the chain of %d blocks has changed", i*5+1)
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

// A chunk takes objects until the next one with its comma would make it grow.
func TestChunks(t *testing.T) {
	openFast(t)
	for size, want := range map[int][]int{29: {20, 20}, 30: {30, 10}, 31: {30, 10}} {
		chunkSize = size
		c := &Blockchain{}
		for range 4 {
			c.add([]byte("123456789"))
		}
		for i, chunk := range c.chunks {
			if len(c.chunks) != len(want) || len(chunk) != want[i] || cap(chunk) != size {
				t.Errorf("chunk %d of %d has %d bytes of %d, want %d", i, len(c.chunks), len(chunk), cap(chunk), want)
			}
		}
	}
}

// The longer the chain, the earlier garbage is collected, unless the operator has set
// GOGC.
func TestGarbage(t *testing.T) {
	original := debug.SetGCPercent(100)
	t.Cleanup(func() { debug.SetGCPercent(original) })
	for _, test := range []struct {
		chunks int // before another one
		gogc   string
		want   int
	}{{0, "", 100}, {7, "", 100}, {15, "", 50}, {159, "", 10}, {15, "100", 77}} {
		t.Setenv("GOGC", test.gogc)
		debug.SetGCPercent(77)
		c := &Blockchain{chunks: make([][]byte, test.chunks)}
		c.add([]byte("x"))
		if got := debug.SetGCPercent(100); got != test.want {
			t.Errorf("with %d chunks and GOGC=%s: %d percent, want %d", test.chunks+1, test.gogc, got, test.want)
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
	closeChain(c)
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

// openCopy opens a copy of the named file, which may be locked.
func openCopy(t testing.TB, name string) *Blockchain {
	t.Helper()
	copied := filepath.Join(t.TempDir(), "copy.jsonl")
	writeFile(t, copied, readFile(t, name))
	return open(t, copied)
}

// closeChain closes the chain's file, as the end of the program does.
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

// The file has the blocks that are broadcast, one a line, and opening it again
// gives the same chain.
func TestFileIsTheChain(t *testing.T) {
	name, _ := newChainFile(t, 1)
	c := open(t, name)
	for range 10 {
		appendBlock(t, c)
		objects := bytes.Split(readFile(t, name), []byte("\n"))
		if want := bytes.Join(objects[:len(objects)-1], []byte(",")); !bytes.Equal(bytes.Join(c.latest(0), nil), want) || len(objects[len(objects)-1]) != 0 {
			t.Fatalf("the file has %s, the chain %s", want, c.latest(0))
		}
		again := openCopy(t, name)
		if fmt.Sprint(blocks(t, again)) != fmt.Sprint(blocks(t, c)) || again.size != c.size {
			t.Fatalf("the chain read again is %v", again)
		}
	}
}

// openFast makes opening a chain cheap until the end of the test: nothing is synced
// and little memory is allocated.
func openFast(t testing.TB) {
	originalSync, originalSize := fsync, chunkSize
	t.Cleanup(func() { fsync, chunkSize = originalSync, originalSize })
	fsync = func(chainFile) error { return nil }
	chunkSize = 4 << 10
}

// opens writes text to a new file and opens it. It returns the bytes in the file
// thereafter, what was logged with the file's name left out, and the error.
func opens(t *testing.T, name string, text []byte) (after []byte, logged string, err error) {
	t.Helper()
	writeFile(t, name, text)
	var buffer bytes.Buffer
	c, err := openBlockchain(name, log.New(&buffer, "", 0))
	if err == nil {
		blocks(t, c)
		closeChain(c)
	}
	return readFile(t, name), strings.ReplaceAll(buffer.String(), name, "FILE"), err
}

// wantTorn checks that opening a file with the chain's text and a torn line after
// it drops the line with a warning, and adds a genesis block if nothing else is left.
func wantTorn(t *testing.T, name string, chain, torn []byte) {
	t.Helper()
	after, logged, err := opens(t, name, slices.Concat(chain, torn))
	if err != nil {
		t.Fatalf("with a torn line %q: %v", torn, err)
	}
	if !bytes.HasPrefix(after, chain) || bytes.Count(after, []byte("\n")) != max(bytes.Count(chain, []byte("\n")), 1) || after[len(after)-1] != '\n' {
		t.Fatalf("with a torn line %q the file became %q", torn, after)
	}
	want := fmt.Sprintf("FILE: dropped the last %d bytes, a line that was cut short by a crash; its block was never announced\n", len(torn))
	if len(torn) == 0 {
		want = ""
	}
	if logged != want {
		t.Fatalf("with a torn line %q: logged %q, want %q", torn, logged, want)
	}
}

// wantRefused checks that a file is refused with an error that begins with want,
// that nothing is logged, and that the file is left as it is.
func wantRefused(t *testing.T, name string, text []byte, want string) {
	t.Helper()
	after, logged, err := opens(t, name, text)
	if err == nil {
		t.Fatalf("accepted: %.1000q", text)
	}
	if !strings.HasPrefix(err.Error(), want) || len(err.Error()) > 1000 || strings.ContainsFunc(err.Error(), unicode.IsControl) {
		t.Fatalf("refused with %.2000q, want %q", err, want)
	}
	if logged != "" {
		t.Fatalf("logged %q", logged)
	}
	if !bytes.Equal(after, text) {
		t.Fatalf("the file was changed to %.1000q", after)
	}
}

// A last line that a crash has cut short anywhere, or whose pages did not all reach
// the disk, is dropped.
func TestFileCutOff(t *testing.T) {
	openFast(t)
	name, text := newChainFile(t, 3)
	lines := bytes.SplitAfter(text, []byte("\n"))
	for _, count := range []int{0, 2} {
		chain, line := bytes.Join(lines[:count], nil), lines[count]
		for cut := range line {
			wantTorn(t, name, chain, line[:cut])
			zeros := []int{1, len(line) - cut, maxBlock - cut}[cut%3]
			torn := append(bytes.Clone(line[:cut]), make([]byte, zeros)...)
			wantTorn(t, name, chain, torn)
			wantTorn(t, name, chain, append(torn, '\n'))
			// The first page never reached the disk, the second one did.
			torn = append(make([]byte, cut), line[cut:]...)
			if cut > 0 && cut <= len(line)-len("\"}\n") {
				wantTorn(t, name, chain, torn)
			} else if cut > 0 { // one that does not end as a block does
				torn = append(torn[:len(torn)-1], "x\n"...)
				wantRefused(t, name, slices.Concat(chain, torn), fmt.Sprintf("line %d: ", count+1))
			}
			if start := strings.Index(string(line), `:"`) + 2; cut > start {
				torn = bytes.Clone(line) // a page in the middle never reached the disk
				clear(torn[start:cut])
				wantTorn(t, name, chain, torn)
			}
		}
	}
}

// A file that is no chain, nor could be the beginning of one, is refused.
func TestFileIsNoChain(t *testing.T) {
	openFast(t)
	name, text := newChainFile(t, 3)
	lines := bytes.SplitAfter(text, []byte("\n"))[:3]
	zeros := make([]byte, 385)
	start := `{"Index":3,"Timestamp":"`
	for _, test := range []struct {
		chain []byte
		tail  string
		want  string
	}{
		{nil, `{"precious":1}`, `line 1: it has no {"Index": and is no block: "{\"precious\":1}"`},
		{nil, "{\"precious\":1}\n", `line 1: it has no {"Index": and is no block: "{\"precious\":1}"`},
		{nil, `[{"Index":0,"Timestamp":"`, `line 1: it has no ","BPM": and is no block: "[{\"Index\":0`},
		{nil, "hello", `line 1: it has no {"Index": and is no block: "hello"`},
		{nil, "\n", "line 1: it is empty"},
		{nil, strings.Repeat("x", 3<<20), `line 1: it has no {"Index": and is no block: "` + strings.Repeat("x", 64) + `"`},
		{nil, start[:10] + strings.Repeat("\x00", 3<<20), `line 1: it has no ,"Timestamp":" and is no block: "{\"Index\":3`},
		{nil, "\x7fELF\x02\x01\x01" + string(zeros[:9]), `line 1: it has no {"Index": and is no block: "\x7fELF`},
		{nil, string(zeros), `line 1: it has no {"Index": and is no block: "\x00\x00`},
		{nil, string(zeros) + "\n", `line 1: it has no {"Index": and is no block: "\x00\x00`},
		{nil, "\x00x", "line 1: "},
		{nil, "\x00x\n", "line 1: "},
		{nil, "\x00\n\n", "line 1: "},
		{nil, "\x00\"}\n", "line 1: "},
		{nil, "\x00\r\n", "line 1: "},
		{nil, start, "line 1: "}, // another block's index
		{nil, `{"Index":00`, "line 1: "},
		{nil, "{\n", "line 1: "},
		{nil, "{ ", "line 1: "},
		{nil, "{\x00 ", "line 1: "},
		{nil, "{\x00\x00}", "line 1: "},
		{text, "\n", "line 4: it is empty"},
		{text, " \n", "line 4: "},
		{text, " ", "line 4: "},
		{text, `{"Index":2,"Timestamp":"`, "line 4: "},
		{text, `{"Index":4,"Timestamp":"`, "line 4: "},
		{text, `{"Index":33`, "line 4: "},
		{text, string(lines[2]), "line 4: block 2 stands where block 3 belongs"},
		{text, string(lines[2][:len(lines[2])-1]), "line 4: block 2 stands where block 3 belongs"},
		{text, start + "\n", "line 4: "},
		{text, start + strings.Repeat("x", 385-len(start)), "line 4: "},
		{text, start + strings.Repeat("x", 385-len(start)) + "\x00\n", "line 4: "},
		{text, start + "2\x00\n\n", "line 4: "}, // not the last line
		{text, start + "2\x00\n" + start, "line 4: "},
		{text, string(zeros[:9]) + `4,"Timestamp":"` + "\"}\n", "line 4: "},
		{text, string(zeros[:9]) + `3,"Timestamp":"` + "\"}", "line 4: "},
		{text, string(zeros[:9]) + `3,"Timestamp":"` + "x}\n", "line 4: "},
		{text, string(zeros[:len(start)-1]) + "x\"}\n", "line 4: "},
		{text[:len(text)-1], string(lines[2]), "line 3: "}, // two objects in a line
	} {
		wantRefused(t, name, append(bytes.Clone(test.chain), test.tail...), test.want)
	}
	// The limits of what may be torn.
	wantTorn(t, name, text, []byte(start+strings.Repeat("x", 384-len(start))))
	wantTorn(t, name, text, []byte(start+strings.Repeat("x", 383-len(start))+"\x00\n"))
	wantTorn(t, name, text, append(zeros[:len(start)-1:len(start)-1], "\"\"}\n"...))
	wantTorn(t, name, text, append(zeros[:len(start):len(start)], "\"}\n"...))
	wantTorn(t, name, nil, zeros[:384])
	wantTorn(t, name, nil, append(zeros[:384:384], '\n'))
}

// mayBeTorn is the rule for torn lines, tried with every beginning of a block.
func mayBeTorn(line []byte, index int) bool {
	text := strings.TrimSuffix(string(line), "\n")
	if len(text) > 384 || len(text) < len(line) && !strings.Contains(text, "\x00") {
		return false
	}
	start := fmt.Sprintf(`{"Index":%d,"Timestamp":"`, index)
	if strings.HasPrefix(text, start) {
		return true
	}
	for n := range start {
		if text == start[:n]+strings.Repeat("\x00", max(len(text)-n, 0)) {
			return true
		}
		missing := n + 1 // bytes of start
		if len(text) < len(line) && len(text) >= len(start) && strings.HasSuffix(text, `"}`) &&
			text[:len(start)] == strings.Repeat("\x00", missing)+start[missing:] {
			return true
		}
	}
	return false
}

// A file with any byte changed is refused, with the number of the line, and left
// as it is, unless the change makes the last line a torn one.
func TestFileDamaged(t *testing.T) {
	openFast(t)
	name, text := newChainFile(t, 3)
	lines := bytes.SplitAfter(text, []byte("\n"))[:3]
	last := len(text) - len(lines[2])
	torn := 0
	for i := range text {
		for _, with := range []byte{text[i] ^ 1, text[i] ^ 0x20, text[i] ^ 0x80, '\n', 0} {
			if with == text[i] {
				continue
			}
			damaged := bytes.Clone(text)
			damaged[i] = with
			if i >= last && !bytes.Contains(damaged[last:len(text)-1], []byte("\n")) && mayBeTorn(damaged[last:], 2) {
				wantTorn(t, name, text[:last], damaged[last:])
				torn++
			} else {
				wantRefused(t, name, damaged, fmt.Sprintf("line %d: ", 1+bytes.Count(text[:i], []byte("\n"))))
			}
		}
	}
	// A zero byte at the beginning or in a value, and another byte for the last newline.
	if want := 1 + len(lines[2]) - len(`{"Index":2,"Timestamp":"`) + 3; torn != want {
		t.Errorf("%d changes made the last line a torn one, want %d", torn, want)
	}

	refused := func(want string, damaged ...[]byte) {
		t.Helper()
		wantRefused(t, name, bytes.Join(damaged, nil), want)
	}
	refused("line 2: block 2 stands where block 1 belongs", lines[0], lines[2])
	refused("line 1: block 1 stands where block 0 belongs", lines[1], lines[2])
	refused("line 2: block 0 stands where block 1 belongs", lines[0], lines[0])
	refused("line 2: it is empty", lines[0], []byte("\n"), lines[1])
	refused(`line 2: it has no {"Index": and is no block: "xxxx`, lines[0], bytes.Repeat([]byte("x"), 1<<20), []byte("\n"))
	refused(`line 2: it has no {"Index": and is no block: "\x00`, lines[0], make([]byte, 100), []byte("\n"), lines[1])
	_, other := newChainFile(t, 2)
	refused("line 2: block 1 does not follow: its PrevHash is ", lines[0], other[bytes.IndexByte(other, '\n')+1:])

	// The hash of these is right, but they are not what the server would write.
	object := string(bytes.TrimSpace(lines[0]))
	timestamp := object[strings.Index(object, `"Timestamp"`):strings.Index(object, `,"BPM"`)]
	for _, test := range [][2]string{
		{strings.Replace(object, ",", ", ", 1), `it has no ,"Timestamp":" and is no block: "{\"Index\":0, \"Timestamp\":\"`},
		{object + " ", "it should read " + object},
		{object + "\r", "it should read " + object},
		{" " + object, "it should read " + object},
		{strings.Replace(object, "Index", "index", 1), `it has no {"Index": and is no block: "{\"index\":0,`},
		{strings.Replace(object, `"BPM":0`, `"BPM":-0`, 1), "it should read " + object},
		{strings.Replace(object, `"BPM":0`, `"BPM":00`, 1), "it should read " + object},
		{strings.Replace(object, `"Index":0`, `"Index":+0`, 1), "it should read " + object},
		{strings.Replace(object, `"BPM":0`, `"BPM":0,"More":1`, 1), `its BPM is no whole number: "0,\"More\":1"`},
		{strings.Replace(object, `"BPM":0`, `"BPM":0.5`, 1), `its BPM is no whole number: "0.5"`},
		{strings.Replace(object, `"Index":0`, `"Index":`+strings.Repeat("\x1b", 100), 1), `its Index is no whole number: "` + strings.Repeat(`\x1b`, 64) + `"`},
		{strings.Replace(object, `"Index":0,`+timestamp, timestamp+`,"Index":0`, 1), `it has no {"Index": and is no block: `},
		{strings.Replace(object, "}", `,"Validator":""}`, 1), `its Validator is not at most 64 letters, digits, or any of :.+- but "\",\"Validator\":\""`},
		{object + object, "it should read " + object},
		{strings.TrimSuffix(object, "}"), `it has no "} and is no block: "{\"Index\":0,`},
	} {
		refused("line 1: "+test[1], []byte(test[0]+"\n"))
	}
	genesis, err := parseBlock(object)
	if err != nil {
		t.Fatal(err)
	}
	for _, value := range []string{"\x1b[2J", `\u0041`, "é", `"`, "<", "/", ";", "@", "[", "`", "{", strings.Repeat("a", 65)} {
		want := " is not at most 64 letters, digits, or any of :.+- but " + strconv.Quote(value[:min(len(value), 64)])
		first := Block{Timestamp: value}
		first.Hash = calculateBlockHash(first)
		refused("line 1: its Timestamp"+want, first.appendJSON(nil), []byte("\n"))
		second := generateBlock(genesis, 0, value, time.Now())
		refused("line 2: its Validator"+want, lines[0], second.appendJSON(nil), []byte("\n"))
		refused("line 2: its Hash"+want, lines[0], Block{Hash: value}.appendJSON(nil), []byte("\n"))
		refused("line 2: its PrevHash"+want, lines[0], Block{PrevHash: value}.appendJSON(nil), []byte("\n"))
	}
}

// A file that another server uses is refused, whatever its name, and left as it is.
func TestFileInUse(t *testing.T) {
	name, text := newChainFile(t, 2)
	c := open(t, name)
	if err := os.Symlink(name, name+"-link"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{name, name + "-link"} {
		wantRefused(t, name, text, "another server uses it; give each its own")
		// Not even a line that it would drop otherwise: the server may be writing it.
		wantRefused(t, name, append(bytes.Clone(text), "{"...), "another server uses it; give each its own")
	}
	writeFile(t, name, text)
	appendBlock(t, c)
	closeChain(c)
	open(t, name)
}

// recordSyncs records until the end of the test what is synced: the base name, and
// of a file the number of whole lines in it at the time.
func recordSyncs(t *testing.T) *[]string {
	recorded, original := new([]string), fsync
	t.Cleanup(func() { fsync = original })
	fsync = func(file chainFile) error {
		what := filepath.Base(file.Name())
		if info, err := file.Stat(); err != nil || !info.IsDir() {
			what = fmt.Sprintf("%s with %d lines", what, bytes.Count(readFile(t, file.Name()), []byte("\n")))
		}
		*recorded = append(*recorded, what)
		return original(file)
	}
	return recorded
}

// Every start syncs the file, whose last block may not have been, and its directory.
func TestOpenSyncs(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dir")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, "chain.jsonl")
	synced := recordSyncs(t)
	want := func(want ...string) {
		t.Helper()
		if !slices.Equal(*synced, want) {
			t.Errorf("synced %q, want %q", *synced, want)
		}
		*synced = nil
	}
	c := open(t, name)
	want("chain.jsonl with 1 lines", "dir")
	appendBlock(t, c)
	want("chain.jsonl with 2 lines")
	closeChain(c)
	closeChain(open(t, name))
	want("chain.jsonl with 2 lines", "dir")
	writeFile(t, name, append(readFile(t, name), "{"...))
	closeChain(open(t, name))
	want("chain.jsonl with 2 lines", "dir")
	if text := readFile(t, name); text[len(text)-1] != '\n' {
		t.Errorf("the file ends with %q", text[len(text)-10:])
	}
	if info, err := os.Stat(name); err != nil || info.Mode().Perm()&^0o644 != 0 {
		t.Errorf("%v, the file has mode %v, want at most 0644", err, info.Mode())
	}
}

// A sync that fails at the start stops it, except that of a directory where the
// system cannot sync directories.
func TestOpenSyncFails(t *testing.T) {
	original := fsync
	t.Cleanup(func() { fsync = original })
	var failing string
	var fault error
	fsync = func(file chainFile) error {
		if filepath.Base(file.Name()) == failing {
			return &fs.PathError{Op: "sync", Path: failing, Err: fault}
		}
		return original(file)
	}
	for _, test := range []struct {
		failing string
		fault   error
		fails   bool
	}{
		{"chain.jsonl", syscall.EIO, true},
		{"chain.jsonl", syscall.EINVAL, true},
		{"dir", syscall.EIO, true},
		{"dir", syscall.EINVAL, false},
		{"dir", syscall.ENOTSUP, false},
		{"dir", errors.ErrUnsupported, false},
	} {
		dir := filepath.Join(t.TempDir(), "dir")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(dir, "chain.jsonl")
		for _, file := range []string{"new", "old"} {
			failing, fault = test.failing, test.fault
			c, err := openBlockchain(name, log.New(io.Discard, "", 0))
			if err == nil {
				closeChain(c)
			}
			if test.fails != errors.Is(err, test.fault) || !test.fails && err != nil {
				t.Errorf("%s file, syncing %s fails with %v: %v", file, test.failing, test.fault, err)
			}
			failing = ""
			closeChain(open(t, name))
		}
	}
	if err := syncDir(filepath.Join(t.TempDir(), "unreadable")); err != nil {
		t.Errorf("a directory that cannot be opened: %v", err)
	}
	var dir chainFile
	fsync = func(file chainFile) error { dir = file; return nil }
	if err := syncDir(t.TempDir()); err != nil {
		t.Error(err)
	}
	if _, err := dir.Stat(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the directory was left open: %v", err)
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
	chainFile
	write, sync, truncate error
	written               int             // bytes that a failing write writes all the same
	touched               func(by string) // called by each of the three if not nil
}

func (f *failingFile) touch(by string) {
	if f.touched != nil {
		f.touched(by)
	}
}

func (f *failingFile) Write(p []byte) (int, error) {
	f.touch("Write")
	if f.write != nil {
		n, _ := f.chainFile.Write(p[:f.written])
		return n, f.write
	}
	return f.chainFile.Write(p)
}

func (f *failingFile) Sync() error {
	f.touch("Sync")
	if f.sync != nil {
		return f.sync
	}
	return f.chainFile.Sync()
}

func (f *failingFile) Truncate(size int64) error {
	f.touch("Truncate")
	if f.truncate != nil {
		return f.truncate
	}
	return f.chainFile.Truncate(size)
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
			fails.chainFile = c.file
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
			fails = failingFile{chainFile: fails.chainFile}
			appendBlock(t, c)
			if again := openCopy(t, file); again.head != c.head || len(blocks(t, again)) != 3 {
				t.Errorf("the chain read again ends with %v, want %v", again.head, c.head)
			}

			fails = failingFile{chainFile: fails.chainFile, write: full, written: 100, truncate: errors.New("input/output error")}
			err := c.append(generateBlock(c.head, 72, golden.Validator, time.Now()))
			if !errors.Is(err, errChainLost) || !errors.Is(err, full) || !errors.Is(err, fails.truncate) {
				t.Errorf("append: %v, want all three errors", err)
			}
			if want := "the chain cannot go on: writing a block failed (no space left on device), " +
				"and so did removing what was written of it (input/output error)"; err.Error() != want {
				t.Errorf("append: %v, want %s", err, want)
			}
		})
	}
}

// A file that something else has touched is left as it is, under its name and any
// other, and the error says what has happened to it.
func TestFileIsLost(t *testing.T) {
	for name, test := range map[string]struct {
		touch func(t *testing.T, file string, text []byte)
		want  string // FILE stands for the file's name, SIZE for its size before
	}{
		"deleted": {func(t *testing.T, file string, text []byte) { os.Remove(file) },
			"FILE was deleted while the server ran"},
		"replaced by a copy": {func(t *testing.T, file string, text []byte) {
			writeFile(t, file+"~", text)
			os.Rename(file+"~", file)
		}, "FILE was replaced by another file while the server ran"},
		"replaced by a link to itself": {func(t *testing.T, file string, text []byte) {
			os.Remove(file)
			os.Symlink(file, file)
		}, "stat FILE: too many levels of symbolic links"},
		"longer": {func(t *testing.T, file string, text []byte) { writeFile(t, file, append(text, '\n')) },
			"FILE was made longer by something else while the server ran: from SIZE to SIZE+1 bytes"},
		"shorter": {func(t *testing.T, file string, text []byte) { os.Truncate(file, 10) },
			"FILE was made shorter by something else while the server ran: from SIZE to 10 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			file, text := newChainFile(t, 2)
			c := open(t, file)
			c.file = &failingFile{chainFile: c.file, touched: func(by string) { t.Errorf("the lost file was touched by %s", by) }}
			test.touch(t, file, bytes.Clone(text))
			touched, _ := os.ReadFile(file)
			err := c.append(generateBlock(c.head, 72, golden.Validator, time.Now()))
			want := strings.NewReplacer("FILE", file, "SIZE+1", strconv.Itoa(len(text)+1), "SIZE", strconv.Itoa(len(text))).Replace(
				"the chain cannot go on: " + test.want)
			if !errors.Is(err, errChainLost) || err.Error() != want {
				t.Errorf("append: %v, want %s", err, want)
			}
			if left, _ := os.ReadFile(file); !bytes.Equal(left, touched) || len(blocks(t, c)) != 2 {
				t.Errorf("the file has %q, want %q as before", left, touched)
			}
		})
	}
}

// A file whose state cannot be found out is not written to.
func TestFileCannotBeChecked(t *testing.T) {
	name, _ := newChainFile(t, 2)
	c := open(t, name)
	closeChain(c)
	c.file = &failingFile{chainFile: c.file, touched: func(by string) { t.Errorf("the file was touched by %s", by) }}
	err := c.append(generateBlock(c.head, 72, golden.Validator, time.Now()))
	if want := "the chain cannot go on: stat " + name + ": " + os.ErrClosed.Error(); err == nil || err.Error() != want {
		t.Errorf("append: %v, want %s", err, want)
	}
}

func TestFileCannotBeUsed(t *testing.T) {
	dir := t.TempDir()
	tests := map[string]string{
		dir: "open " + dir + ": is a directory",
		filepath.Join(dir, "none", "chain.jsonl"): "open " + filepath.Join(dir, "none", "chain.jsonl") + ": no such file or directory",
		os.DevNull: "it is not a regular file",
	}
	if fifo := filepath.Join(dir, "fifo"); exec.Command("mkfifo", fifo).Run() == nil {
		tests[fifo] = "it is not a regular file" // reading it would never end
	}
	for name, want := range tests {
		c, err := openBlockchain(name, log.New(io.Discard, "", 0))
		if err == nil {
			closeChain(c)
			t.Errorf("%s was taken for a chain", name)
		} else if err.Error() != want {
			t.Errorf("%s: %v, want %s", name, err, want)
		}
	}
}

// A file that can be opened but not read is refused.
func TestFileCannotBeRead(t *testing.T) {
	name, text := newChainFile(t, 2)
	file, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	c := &Blockchain{head: beforeGenesis}
	if err := c.load(file, log.New(io.Discard, "", 0)); !errors.Is(err, syscall.EBADF) {
		t.Errorf("load: %v, want %v", err, syscall.EBADF)
	}
	file.Close()
	if err := c.load(file, log.New(io.Discard, "", 0)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("load of a closed file: %v, want %v", err, os.ErrClosed)
	}
	if !bytes.Equal(readFile(t, name), text) {
		t.Error("the file has changed")
	}
}

// A torn line that cannot be dropped stops the start, and nothing says that it was.
func TestTornLineStays(t *testing.T) {
	name, text := newChainFile(t, 2)
	writeFile(t, name, append(text, '{'))
	file, err := os.OpenFile(name, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	os.Remove(name) // it is truncated by its name
	var logged bytes.Buffer
	c := &Blockchain{head: beforeGenesis}
	if err := c.load(file, log.New(&logged, "", 0)); !errors.Is(err, fs.ErrNotExist) || logged.Len() > 0 {
		t.Errorf("load: %v, want %v; logged %q", err, fs.ErrNotExist, &logged)
	}
}

// wantOpened returns how many bytes of text are blocks, and whether a file with it
// can be opened. It checks the lines with encoding/json.
func wantOpened(text []byte) (size int, ok bool) {
	last := beforeGenesis
	for len(text) > size {
		line := text[size:]
		if end := bytes.IndexByte(line, '\n'); end >= 0 {
			line = line[:end+1]
		}
		if size+len(line) == len(text) && mayBeTorn(line, last.Index+1) {
			break
		}
		var block Block
		if err := json.Unmarshal(line, &block); err != nil || validateBlock(block, last) != nil {
			return 0, false
		}
		if again, err := json.Marshal(block); err != nil || string(again)+"\n" != string(line) {
			return 0, false
		}
		last = block
		size += len(line)
	}
	return size, true
}

// Whatever is in the file, opening it either gives the chain of its valid lines
// without a torn last one, or refuses the file and leaves it as it is.
func FuzzOpen(f *testing.F) {
	openFast(f)
	name, text := newChainFile(f, 3)
	f.Add(text)
	f.Add(text[:len(text)-1])
	f.Add(text[:200])
	f.Add([]byte(`{"precious":1}`))
	f.Add(append(bytes.Clone(text), `{"Index":3,"Times`+"\x00\x00\n"...))
	f.Add(append(make([]byte, 5), text[5:bytes.IndexByte(text, '\n')+1]...))
	f.Add(bytes.Replace(text, []byte(`"BPM":72`), []byte(`"BPM":73`), 1))
	f.Add([]byte("\n"))
	f.Add(make([]byte, 100))
	f.Add(make([]byte, 1000))
	f.Fuzz(func(t *testing.T, text []byte) {
		after, _, err := opens(t, name, text)
		size, ok := wantOpened(text)
		switch {
		case ok != (err == nil):
			t.Fatalf("%q: %v", text, err)
		case !ok && !bytes.Equal(after, text):
			t.Fatalf("refused with %v and changed to %q", err, after)
		case ok && size > 0 && !bytes.Equal(after, text[:size]):
			t.Fatalf("%q was taken for %q", text, after)
		case ok && size == 0 && bytes.Count(after, []byte("\n")) != 1:
			t.Fatalf("%q became %q", text, after)
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
	block := generateBlock(beforeGenesis, 0, "", time.Unix(0, 0))
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
