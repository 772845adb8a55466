package main

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math"
	"os"
	"os/exec"
	"path/filepath"
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
	cmd.Stdin = bytes.NewReader(block.marshal())
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
	c, err := openBlockchain("", 0, log.New(io.Discard, "", 0))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// blocks returns the blocks of a chain after checking all of them.
func blocks(t *testing.T, c *Blockchain) (all []Block) {
	t.Helper()
	text := "[" + string(c.latest()) + "]"
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

// latest gives the newest blocks, as many as it should and no more, and what it gave stays
// the same when the chain grows. Little more is kept.
func TestLatest(t *testing.T) {
	for _, limit := range []int{0, 1, 2, 3, 39, 40, 41, math.MaxInt} {
		c, err := openBlockchain("", limit, log.New(io.Discard, "", 0))
		if err != nil {
			t.Fatal(err)
		}
		var objects, want, got []string // of all blocks; of the newest, whenever there was one more
		var shared [][]byte
		for range 40 {
			objects = append(objects, string(c.head.marshal()))
			newest := objects
			if limit > 0 {
				newest = objects[max(0, len(objects)-limit):]
			}
			want = append(want, strings.Join(newest, ","))
			got = append(got, string(c.latest()))
			shared = append(shared, c.latest())
			_ = append(c.latest(), "more"...) // is no concern of the chain's
			if kept := cap(c.json); kept > 2*(len(newest)+1)*maxBlock {
				t.Fatalf("%d bytes are kept for the newest %d blocks", kept, len(newest))
			}
			// A string may have what also ends an object.
			if err := c.append(generateBlock(c.head, 72, "},{", time.Now())); err != nil {
				t.Fatal(err)
			}
		}
		for i := range want {
			if got[i] != want[i] || string(shared[i]) != want[i] {
				t.Fatalf("the newest %d of %d blocks are %s, later %s, want %s", limit, i+1, got[i], shared[i], want[i])
			}
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
	c, err := openBlockchain(name, 0, log.New(io.Discard, "", 0))
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
	if info, err := os.Stat(name); err != nil || info.Mode().Perm()&^0o644 != 0 {
		t.Errorf("%v, the file has mode %v, want at most 0644", err, info.Mode())
	}
	c := open(t, name)
	for range 10 {
		appendBlock(t, c)
		objects := bytes.Split(readFile(t, name), []byte("\n"))
		if want := bytes.Join(objects[:len(objects)-1], []byte(",")); !bytes.Equal(c.latest(), want) || len(objects[len(objects)-1]) != 0 {
			t.Fatalf("the file has %s, the chain %s", want, c.latest())
		}
		again := openCopy(t, name)
		if fmt.Sprint(blocks(t, again)) != fmt.Sprint(blocks(t, c)) || again.size != c.size {
			t.Fatalf("the chain read again is %v", again)
		}
	}
}

// An unsyncedFile is never synced, so that a test can open thousands.
type unsyncedFile struct{ chainFile }

func (unsyncedFile) Sync() error    { return nil }
func (unsyncedFile) SyncDir() error { return nil }

// openFile opens or makes the named file, without the lock, until the end of the test.
func openFile(t *testing.T, name string) *os.File {
	t.Helper()
	file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file
}

func load(file chainFile, logger *log.Logger) (*Blockchain, error) {
	c := &Blockchain{head: beforeGenesis}
	return c, c.load(file, logger)
}

// opens writes text to a new file and opens it. It returns the bytes in the file
// thereafter, what was logged with the file's name left out, and the error.
func opens(t *testing.T, name string, text []byte) (after []byte, logged string, err error) {
	t.Helper()
	writeFile(t, name, text)
	file := openFile(t, name)
	defer file.Close()
	var buffer bytes.Buffer
	c, err := load(unsyncedFile{appendFile{file}}, log.New(&buffer, "", 0))
	if err == nil {
		blocks(t, c)
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
	name, text := newChainFile(t, 3)
	lines := bytes.SplitAfter(text, []byte("\n"))
	for _, count := range []int{0, 2} {
		chain, line := bytes.Join(lines[:count], nil), lines[count]
		for cut := range len(line) - 1 {
			wantTorn(t, name, chain, line[:cut])
			zeros := []int{1, len(line) - cut, maxBlock - cut}[cut%3]
			torn := append(bytes.Clone(line[:cut]), make([]byte, zeros)...)
			if count > 0 || cut > 0 {
				wantTorn(t, name, chain, torn)
				wantTorn(t, name, chain, append(torn, '\n'))
			}
			if cut > 0 { // the first page never reached the disk, the second one did
				torn = append(make([]byte, cut), line[cut:]...)
				if count > 0 {
					wantTorn(t, name, chain, torn)
				} else {
					wantRefused(t, name, torn, "line 1: from byte 1 on it reads ")
				}
			}
			if start := strings.Index(string(line), `:"`) + 2; cut > start {
				torn = bytes.Clone(line) // a page in the middle never reached the disk
				clear(torn[start:cut])
				wantTorn(t, name, chain, torn)
			}
		}
	}
}

// A last line that is a whole valid block but for its newline stays.
func TestNewlineIsMissing(t *testing.T) {
	name, text := newChainFile(t, 3)
	for count := range 3 {
		whole := bytes.Join(bytes.SplitAfter(text, []byte("\n"))[:count+1], nil)
		after, logged, err := opens(t, name, whole[:len(whole)-1])
		want := fmt.Sprintf("FILE: block %d, the last line, had no newline; it was written\n", count)
		if err != nil || logged != want || !bytes.Equal(after, whole) {
			t.Errorf("%v, logged %q, want %q; the file became %q, want %q", err, logged, want, after, whole)
		}
	}
	// If it cannot be written and synced, the file stays as it is, and nothing says that it was.
	full := errors.New("no space left on device")
	for _, fails := range []failingFile{{write: full}, {sync: full}} {
		writeFile(t, name, text[:len(text)-1])
		var logged bytes.Buffer
		fails.chainFile = appendFile{openFile(t, name)}
		if _, err := load(&fails, log.New(&logged, "", 0)); !errors.Is(err, full) || logged.Len() > 0 || !bytes.Equal(readFile(t, name), text[:len(text)-1]) {
			t.Errorf("load: %v, want %v; logged %q; the file became %q", err, full, &logged, readFile(t, name))
		}
	}
}

// A file that is no chain, nor could be the beginning of one, is refused.
func TestFileIsNoChain(t *testing.T) {
	name, text := newChainFile(t, 3)
	lines := bytes.SplitAfter(text, []byte("\n"))[:3]
	object := string(lines[0][:len(lines[0])-1])
	second := string(lines[1][:len(lines[1])-1])
	timestamp := object[strings.Index(object, `"Timestamp"`):strings.Index(object, `,"BPM"`)]
	after := func(part string) int { return strings.Index(object, part) + len(part) + 1 } // the number of the byte
	zeros := string(make([]byte, 385))
	start := `{"Index":3,"Timestamp":"`
	const (
		first     = ` where it should read "{\"Index\":0,\"Timestamp\":\"`
		fourth    = ` where it should read "{\"Index\":3,\"Timestamp\":\"`
		mark      = "it begins with a byte order mark; save the file as UTF-8 without one"
		cr        = "it ends with a carriage return; save it with Unix line ends (LF)"
		oneObject = ", but a block is one JSON object"
		long      = "it is longer than a block, which has at most 384 bytes; it begins with "
	)
	for _, test := range []struct {
		chain []byte
		tail  string
		want  string // the beginning of the error
	}{
		{nil, `{"precious":1}`, `line 1: from byte 3 on it reads "precious\":1}" where it should read "Index\":0,\"Timestamp\":\"`},
		{nil, "{\"precious\":1}\n", `line 1: from byte 3 on it reads "precious\":1}" where it should read "Index\":0,\"Timestamp\":\"`},
		{nil, "hello", `line 1: from byte 1 on it reads "hello"` + oneObject},
		{nil, "\n", "line 1: it is empty"},
		{nil, "my precious notes \"}\n", `line 1: from byte 1 on it reads "my precious notes \"}"` + oneObject},
		{nil, strings.Repeat("x", 3<<20), "line 1: " + long + `"` + strings.Repeat("x", 64) + `"`},
		{nil, start[:10] + strings.Repeat("\x00", 3<<20), "line 1: " + long + `"{\"Index\":3\x00`},
		{nil, "\x7fELF\x02\x01\x01" + zeros[:9], `line 1: from byte 1 on it reads "\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00"` + oneObject},
		{nil, "null\n", `line 1: from byte 1 on it reads "null"` + first},
		{text, "null\n", `line 4: from byte 1 on it reads "null"` + fourth},
		// Zero bytes at the front, without a block before them.
		{nil, "\x00", `line 1: from byte 1 on it reads "\x00"` + oneObject},
		{nil, "\x00\n", `line 1: from byte 1 on it reads "\x00"` + oneObject},
		{nil, zeros[:24] + "my precious notes \"}\n", `line 1: from byte 1 on it reads "` + strings.Repeat(`\x00`, 24) + `my precious notes \"}"` + oneObject},
		{nil, zeros[:9] + `0,"Timestamp":"2000"}` + "\n", `line 1: from byte 1 on it reads "\x00`},
		{nil, zeros[:384], `line 1: from byte 1 on it reads "\x00\x00`},
		{nil, zeros, "line 1: " + long + `"\x00\x00`},
		{nil, "\x00\n\n", "line 1: "},
		{nil, start, `line 1: from byte 24 on it reads "\""` + oneObject}, // another block's index
		{nil, `{"Index":00`, `line 1: from byte 11 on it reads "0"` + oneObject},
		{nil, "{\n", `line 1: from byte 2 on it reads nothing` + oneObject},
		{nil, "{ ", "line 1: "},
		{nil, "{\x00 ", "line 1: "},
		{nil, "{\x00\x00}", "line 1: "},
		{text, "\n", "line 4: it is empty"},
		{text, " \n", `line 4: from byte 2 on it reads nothing` + oneObject},
		{text, " ", `line 4: from byte 1 on it reads " "` + oneObject},
		{text, `{"Index":2,"Timestamp":"`, "line 4: "},
		{text, `{"Index":4,"Timestamp":"`, "line 4: "},
		{text, `{"Index":33`, "line 4: "},
		{text, string(lines[2]), "line 4: block 2 stands where block 3 belongs"},
		{text, string(lines[2][:len(lines[2])-1]), "line 4: block 2 stands where block 3 belongs"},
		// Whole objects without a newline: a crash cuts a block before its }.
		{nil, `{"Index":0,"Timestamp":"my data","x":[1]}`, `line 1: from byte 35 on it reads "x\":[1]}" where it should read "BPM\":0,`},
		{nil, object + " ", fmt.Sprintf(`line 1: from byte %d on it reads " " where it should read nothing`, after(`"}`))},
		{lines[0], second + ",", "line 2: "},
		{lines[0], strings.Replace(second, `"BPM":72`, `"BPM":172`, 1), "line 2: block 1 was changed"},
		{lines[0], strings.Replace(second, `,"BPM"`, `, "BPM"`, 1), "line 2: "},
		{text, start + "\n", "line 4: from byte 25 on it reads nothing" + oneObject},
		{text, start + strings.Repeat("x", 385-len(start)), "line 4: " + long + `"{\"Index\":3,`},
		{text, start + strings.Repeat("x", 384-len(start)) + "\x00", "line 4: " + long + `"{\"Index\":3,`},
		{text, start + "2\x00\n\n", `line 4: from byte 26 on it reads "\x00"` + oneObject}, // not the last line
		{text, start + "2\x00\n" + start, "line 4: "},
		{text, zeros, "line 4: "},
		{text[:len(text)-1], string(lines[2]), "line 3: " + long + `"{\"Index\":2,`}, // two objects in a line
		// Bytes that one does not see.
		{nil, "\xef\xbb\xbf" + string(text), "line 1: " + mark},
		{nil, "\xef\xbb\xbf", "line 1: " + mark},
		{nil, "\xff\xfe{\x00\"\x00I\x00", "line 1: " + mark},
		{nil, "\xfe\xff\x00{\x00\"\x00I", "line 1: " + mark},
		{nil, "{\x00\"\x00I\x00", `line 1: from byte 2 on it reads "\x00\"\x00I\x00"` + oneObject},
		{nil, strings.ReplaceAll(string(text), "\n", "\r\n"), "line 1: " + cr},
		{nil, strings.ReplaceAll(string(text), "\n", "\r"), "line 1: " + cr},
		{lines[0], second + "\r", "line 2: " + cr},
		{lines[0], second + "\r\n", "line 2: " + cr},
		{nil, "\r\n", `line 1: from byte 2 on it reads nothing` + oneObject},
		{nil, object + " \n", fmt.Sprintf(`line 1: from byte %d on it reads " " where it should read nothing`, after(`"}`))},
		{nil, object + "\t\n", fmt.Sprintf(`line 1: from byte %d on it reads "\t" where it should read nothing`, after(`"}`))},
		{nil, object + "\u00a0\n", fmt.Sprintf(`line 1: from byte %d on it reads "\u00a0"`, after(`"}`)) + oneObject},
		{nil, object + "\x00\n" + second, fmt.Sprintf(`line 1: from byte %d on it reads "\x00"`, after(`"}`)) + oneObject},
		{nil, " " + object + "\n", `line 1: from byte 1 on it reads " {\"Index\":0`},
		{nil, "\u200b" + object + "\n", `line 1: from byte 1 on it reads "\u200b{\"Index\":0`},
		{nil, strings.Replace(object, ",", ", ", 1) + "\n", `line 1: from byte 12 on it reads " \"Timestamp\":\"`},
		{nil, strings.Replace(object, "Index", "Inde\u0445", 1) + "\n", `line 1: from byte 7 on it reads "\u0445\":0`},
		{nil, strings.Replace(object, "BPM", "\u0412PM", 1) + "\n", fmt.Sprintf(`line 1: from byte %d on it reads "\u0412PM\":0,`, after(`,"B`)-1)},
		// An array.
		{nil, "[" + object + "]\n", `line 1: from byte 1 on it reads "[{\"Index\":0,`},
		{nil, "[\n  {\n", "line 1: from byte 2 on it reads nothing" + oneObject},
		{nil, object + ",\n", fmt.Sprintf(`line 1: from byte %d on it reads ","`, after(`"}`)) + oneObject},
		// The hash of these is right, but they are not what the server would write.
		{nil, strings.Replace(object, "Index", "index", 1) + "\n", `line 1: from byte 3 on it reads "index\":0`},
		{nil, strings.Replace(object, `"BPM":0`, `"BPM":-0`, 1) + "\n", fmt.Sprintf(`line 1: from byte %d on it reads "-0,\"Hash\":\"`, after(`"BPM":`))},
		{nil, strings.Replace(object, `"BPM":0`, `"BPM":00`, 1) + "\n", fmt.Sprintf(`line 1: from byte %d on it reads "0,\"Hash\":\"`, after(`"BPM":0`))},
		{nil, strings.Replace(object, `"Index":0`, `"Index":+0`, 1) + "\n", `line 1: from byte 10 on it reads "+0,\"Timestamp\":\"`},
		{nil, strings.Replace(object, `"BPM":0`, `"BPM":0,"More":1`, 1) + "\n", fmt.Sprintf(`line 1: from byte %d on it reads "More\":1,\"Hash\":\"`, after(`"BPM":0,"`))},
		{nil, strings.Replace(object, `"BPM":0`, `"BPM":0.5`, 1) + "\n", fmt.Sprintf(`line 1: from byte %d on it reads ".5,`, after(`"BPM":0`))},
		{nil, strings.Replace(object, `"BPM":0`, `"BPM":99999999999999999999`, 1) + "\n", fmt.Sprintf(`line 1: from byte %d on it reads "9999`, after(`"BPM":`))},
		{nil, strings.Replace(object, `"BPM":0`, `"BPM":"0"`, 1) + "\n", fmt.Sprintf(`line 1: from byte %d on it reads "\"0\",`, after(`"BPM":`))},
		{nil, strings.Replace(object, `"Validator":""`, `"Validator":0`, 1) + "\n", fmt.Sprintf(`line 1: from byte %d on it reads "0}" where it should read "\"\"}"`, after(`"Validator":`))},
		{nil, strings.Replace(object, `"Index":0`, `"Index":`+strings.Repeat("\x1b", 100), 1) + "\n", `line 1: from byte 10 on it reads "` + strings.Repeat(`\x1b`, 64) + `"` + oneObject},
		{nil, strings.Replace(object, `"Index":0,`+timestamp, timestamp+`,"Index":0`, 1) + "\n", `line 1: from byte 3 on it reads "Timestamp\":\"`},
		{nil, strings.Replace(object, "}", `,"Validator":""}`, 1) + "\n", fmt.Sprintf(`line 1: from byte %d on it reads ",\"Validator\":\"\"}" where it should read "}"`, after(`"Validator":""`))},
		{nil, strings.TrimSuffix(object, "}") + "\n", fmt.Sprintf(`line 1: from byte %d on it reads nothing`, after(`"Validator":""`)) + oneObject},
		{nil, strings.Replace(object, `"Timestamp":"2`, `"Timestamp":"\u0032`, 1) + "\n", `line 1: from byte 25 on it reads "\\u0032`},
	} {
		wantRefused(t, name, append(bytes.Clone(test.chain), test.tail...), test.want)
	}
	// The limits of what may be torn.
	wantTorn(t, name, text, []byte(start+strings.Repeat("x", 384-len(start))))
	wantTorn(t, name, text, []byte(start+strings.Repeat("x", 383-len(start))+"\x00\n"))
	wantTorn(t, name, text, []byte(zeros[:24]+"my precious notes\n"))
	wantTorn(t, name, text, []byte(zeros[:384]))
	wantTorn(t, name, text, []byte(zeros[:384]+"\n"))
	wantTorn(t, name, lines[0], []byte("\x00"))
	wantTorn(t, name, text, []byte("\x00}\n"))
	wantTorn(t, name, nil, []byte("{"+zeros[:383]))
	wantTorn(t, name, nil, []byte("{\x00\n"))
	wantTorn(t, name, text, []byte(start+"2000\r")) // no whole block
}

// mayBeTorn is the rule for torn lines, tried with every beginning of a block.
func mayBeTorn(line []byte, index int) bool {
	text := strings.TrimSuffix(string(line), "\n")
	zeros := strings.Contains(text, "\x00")
	whole := len(text) < len(line) || strings.Contains(text, "}")
	if len(text) > 384 || whole && !zeros {
		return false
	}
	start := fmt.Sprintf(`{"Index":%d,"Timestamp":"`, index)
	for n := range start {
		if n > 0 && text == start[:n]+strings.Repeat("\x00", max(len(text)-n, 0)) {
			return true
		}
	}
	return strings.HasPrefix(text, start) || index > 0 && text[0] == 0
}

// A file with any byte changed is refused, with the number of the line, and left
// as it is, unless the change makes the last line a torn one.
func TestFileDamaged(t *testing.T) {
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
	// A zero byte at the beginning or in a value.
	if want := 1 + len(lines[2]) - len(`{"Index":2,"Timestamp":"`); torn != want {
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
	refused(`line 2: it is longer than a block, which has at most 384 bytes; it begins with "xxxx`, lines[0], bytes.Repeat([]byte("x"), 1<<20), []byte("\n"))
	refused(`line 2: from byte 1 on it reads "\x00`, lines[0], make([]byte, 100), []byte("\n"), lines[1])
	_, other := newChainFile(t, 2)
	refused("line 2: block 1 does not follow: its PrevHash is ", lines[0], other[bytes.IndexByte(other, '\n')+1:])

	var genesis Block
	if err := json.Unmarshal(lines[0], &genesis); err != nil {
		t.Fatal(err)
	}
	// Strings that would need escapes, or drive a terminal.
	for _, value := range []string{"é", " ", "<", "&", `\`, "\u2028", "\x7f", "\x1b", "\u009b2J"} {
		for key, block := range map[string]Block{"Timestamp": {Timestamp: value}, "Hash": {Hash: value}, "PrevHash": {PrevHash: value}, "Validator": {Validator: value}} {
			line := block.marshal()
			from := bytes.Index(line, fmt.Appendf(nil, "%q:", key)) + len(key) + len(`"":"`)
			refused(fmt.Sprintf("line 1: from byte %d on it reads %s, but a block has only visible ASCII characters, without escapes",
				from+1, strconv.QuoteToASCII(string(line[from:min(len(line), from+64)]))), line, []byte("\n"))
		}
	}
	visible := generateBlock(genesis, 0, "!~}{[]/", time.Now())
	if after, _, err := opens(t, name, slices.Concat(lines[0], visible.marshal())); err != nil {
		t.Errorf("refused with %v: %q", err, after)
	}
	longest := generateBlock(genesis, 0, "", time.Now())
	longest.Validator = strings.Repeat("x", maxBlock-len(longest.marshal()))
	longest.Hash = calculateBlockHash(longest)
	if after, _, err := opens(t, name, slices.Concat(lines[0], longest.marshal())); err != nil {
		t.Errorf("refused with %v: %q", err, after)
	}
	longest.Validator += "x"
	longest.Hash = calculateBlockHash(longest)
	refused("line 2: it is longer than a block, which has at most 384 bytes; it begins with ", lines[0], longest.marshal(), []byte("\n"))
	for _, raw := range []string{"\x1b[2J", "\x00", "\x9b2J", `\u001b[2J`, `"`, `\`} { // as no JSON encoder writes it
		refused("line 2: ", lines[0], bytes.Replace(lines[1], []byte(golden.Validator), []byte(raw), 1), lines[2])
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
		// Not even a line that it would drop otherwise: the server may be writing it.
		for _, text := range [][]byte{text, append(bytes.Clone(text), '{')} {
			writeFile(t, name, text)
			_, err := openBlockchain(name, 0, log.New(io.Discard, "", 0))
			if err == nil || err.Error() != "another server uses it; give each its own" || !bytes.Equal(readFile(t, name), text) {
				t.Errorf("%s: %v; the file became %q", name, err, readFile(t, name))
			}
		}
	}
	writeFile(t, name, text)
	appendBlock(t, c)
	closeChain(c)
	closeChain(open(t, name))
	writeFile(t, name, []byte("no chain"))
	if _, err := openBlockchain(name, 0, log.New(io.Discard, "", 0)); err == nil {
		t.Error("no chain was taken for one")
	}
	writeFile(t, name, text)
	open(t, name) // a file that was refused is not locked
}

// A recordingFile records what is synced: "dir", and of the file the number of whole lines
// in it at the time.
type recordingFile struct {
	chainFile
	synced []string
}

func (f *recordingFile) Sync() error {
	text, err := os.ReadFile(f.Name())
	f.synced = append(f.synced, fmt.Sprintf("%d lines", bytes.Count(text, []byte("\n"))))
	return cmp.Or(err, f.chainFile.Sync())
}

func (f *recordingFile) SyncDir() error {
	f.synced = append(f.synced, "dir")
	return f.chainFile.SyncDir()
}

// Every start syncs the file, whose last block may not have been, and its directory.
func TestOpenSyncs(t *testing.T) {
	name := filepath.Join(t.TempDir(), "chain.jsonl")
	var c *Blockchain
	var file *recordingFile
	loaded := func(want ...string) {
		t.Helper()
		file = &recordingFile{chainFile: appendFile{openFile(t, name)}}
		var err error
		if c, err = load(file, log.New(io.Discard, "", 0)); err != nil || !slices.Equal(file.synced, want) {
			t.Errorf("%v, synced %q, want %q", err, file.synced, want)
		}
	}
	loaded("1 lines", "dir")
	appendBlock(t, c)
	if want := []string{"1 lines", "dir", "2 lines"}; !slices.Equal(file.synced, want) {
		t.Errorf("synced %q, want %q", file.synced, want)
	}
	loaded("2 lines", "dir")
	text := readFile(t, name)
	writeFile(t, name, append(bytes.Clone(text), '{'))
	loaded("2 lines", "dir")
	writeFile(t, name, text[:len(text)-1])
	loaded("2 lines", "2 lines", "dir")
	if again := readFile(t, name); !bytes.Equal(again, text) {
		t.Errorf("the file has %q, want %q", again, text)
	}
}

// A file that cannot be synced at the start stops it. A directory that cannot be, for
// whatever reason, is a warning.
func TestOpenSyncFails(t *testing.T) {
	name := filepath.Join(t.TempDir(), "chain.jsonl")
	for range 2 { // a new file, then an old one
		for _, fault := range []error{syscall.EIO, syscall.EINVAL, syscall.EACCES, syscall.ENOTSUP, syscall.EROFS} {
			file := failingFile{chainFile: appendFile{openFile(t, name)}, sync: fault}
			if _, err := load(&file, log.New(io.Discard, "", 0)); !errors.Is(err, fault) {
				t.Errorf("the file cannot be synced: %v, want %v", err, fault)
			}
			var logged bytes.Buffer
			file = failingFile{chainFile: appendFile{openFile(t, name)}, syncDir: fault}
			c, err := load(&file, log.New(&logged, "", 0))
			want := fmt.Sprintf("warning: cannot sync the directory of %s, so a power cut may lose a new file: %v\n", name, fault)
			if err != nil || logged.String() != want {
				t.Errorf("the directory cannot be synced: %v, logged %q, want %q", err, &logged, want)
			}
			blocks(t, c)
			if fault != syscall.EROFS {
				os.Remove(name)
			}
		}
	}
}

// The directory that is synced is that of the file itself, whatever links lead to it.
func TestSyncDir(t *testing.T) {
	dir := t.TempDir()
	target, link := filepath.Join(dir, "target"), filepath.Join(dir, "link")
	for _, name := range []string{target, link} {
		if err := os.Mkdir(name, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(target, "chain.jsonl"), nil)
	if err := os.Symlink(filepath.Join("..", "target", "chain.jsonl"), filepath.Join(link, "chain.jsonl")); err != nil {
		t.Fatal(err)
	}
	file := appendFile{openFile(t, filepath.Join(link, "chain.jsonl"))}
	open := func() int { files, _ := os.ReadDir("/dev/fd"); return len(files) }
	before := open()
	for range 10 {
		if err := file.SyncDir(); err != nil {
			t.Error(err)
		}
	}
	if after := open(); after > before {
		t.Errorf("%d files are open, want %d as before", after, before)
	}
	os.Chmod(target, 0o300)
	if _, err := os.Open(target); err != nil { // root can open it
		if err := file.SyncDir(); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("of a directory that cannot be read: %v, want %v", err, fs.ErrPermission)
		}
	}
	os.Chmod(target, 0o700)
	os.RemoveAll(target)
	if err := file.SyncDir(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without the target's directory: %v, want %v", err, fs.ErrNotExist)
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
	stat, write, sync, syncDir, truncate error

	nowhere bool            // the name leads nowhere: looking it up fails, but not since it does not exist
	written int             // bytes that a failing write writes all the same, at most
	touched func(by string) // called by Write, Sync and Truncate if not nil
}

func (f *failingFile) touch(by string) {
	if f.touched != nil {
		f.touched(by)
	}
}

func (f *failingFile) Name() string {
	if f.nowhere {
		return f.chainFile.Name() + "/nowhere"
	}
	return f.chainFile.Name()
}

func (f *failingFile) Stat() (fs.FileInfo, error) {
	if f.stat != nil {
		return nil, f.stat
	}
	return f.chainFile.Stat()
}

func (f *failingFile) Write(p []byte) (int, error) {
	f.touch("Write")
	if f.write != nil {
		n, _ := f.chainFile.Write(p[:min(f.written, len(p))])
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

func (f *failingFile) SyncDir() error {
	if f.syncDir != nil {
		return f.syncDir
	}
	return f.chainFile.SyncDir()
}

func (f *failingFile) Truncate(size int64) error {
	f.touch("Truncate")
	if f.truncate != nil {
		return f.truncate
	}
	return f.chainFile.Truncate(size)
}

// Whatever the storage refuses, a draw has failed and no more: the file has the blocks, and
// of the one that failed what could not be removed. When the storage is back, the file gets
// that block and nothing else.
func TestStorageFails(t *testing.T) {
	faults := []failingFile{
		{stat: syscall.ESTALE},
		{nowhere: true},
		{write: syscall.ENOSPC},
		{write: syscall.EDQUOT, written: 100},
		{write: syscall.ETIMEDOUT, written: math.MaxInt},
		{sync: syscall.EIO},
		{truncate: syscall.EROFS},
	}
	name, before := newChainFile(t, 2)
	for i, first := range faults {
		for _, second := range faults[i:] {
			for _, draws := range []int{1, 3} {
				writeFile(t, name, before)
				testStorageFails(t, name, draws, failingFile{
					stat:     cmp.Or(first.stat, second.stat),
					nowhere:  first.nowhere || second.nowhere,
					write:    cmp.Or(first.write, second.write),
					written:  cmp.Or(first.written, second.written),
					sync:     cmp.Or(first.sync, second.sync),
					truncate: cmp.Or(first.truncate, second.truncate),
				})
			}
		}
	}
}

func testStorageFails(t *testing.T, name string, draws int, fails failingFile) {
	t.Helper()
	c, err := load(unsyncedFile{appendFile{openFile(t, name)}}, log.New(io.Discard, "", 0))
	if err != nil {
		t.Fatal(err)
	}
	before, head, file := readFile(t, name), c.head, c.file
	block := generateBlock(head, 72, golden.Validator, time.Now())
	line := append(block.marshal(), '\n')

	fault, left := fails.sync, len(line)
	if fails.write != nil {
		fault, left = fails.write, min(fails.written, len(line))
	}
	if fails.truncate == nil {
		left = 0
	}
	away := fails.stat != nil || fails.nowhere
	if away {
		fault, left = cmp.Or(fails.stat, error(syscall.ENOTDIR)), 0
	} else if fault == nil {
		draws = 0 // there is nothing to remove, which would fail
	}
	fails.chainFile = file
	fails.touched = func(by string) {
		if away {
			t.Errorf("%+v: touched by %s", fails, by)
		}
	}
	c.file = &fails
	for range draws {
		if err := c.append(block); !errors.Is(err, fault) || errors.Is(err, errChainLost) {
			t.Errorf("%+v: append: %v, want %v alone", fails, err, fault)
		}
		if text, want := readFile(t, name), slices.Concat(before, line[:left]); c.head != head || !bytes.Equal(text, want) {
			t.Fatalf("%+v: the head is block %d, the file %q, want %q", fails, c.head.Index, text, want)
		}
		if !away {
			fault = cmp.Or(fails.truncate, fault) // what is left must be removed before anything is written
		}
	}
	if draws > 0 {
		c.file = file
	}
	if err := c.append(block); err != nil || len(blocks(t, c)) != 3 {
		t.Errorf("%+v, healed: append: %v", fails, err)
	}
	if text, want := readFile(t, name), slices.Concat(before, line); !bytes.Equal(text, want) {
		t.Errorf("%+v, healed: the file has %q, want %q", fails, text, want)
	}
}

// What goes away while a block is written may be back with anything of it.
func TestStorageGoesAway(t *testing.T) {
	name, before := newChainFile(t, 2)
	c := open(t, name)
	block := generateBlock(c.head, 72, golden.Validator, time.Now())
	line := append(block.marshal(), '\n')
	for left := range len(line) + 1 {
		file := unsyncedFile{c.file}
		fails := &failingFile{chainFile: file, sync: syscall.EHOSTDOWN}
		fails.touched = func(string) { fails.stat = syscall.EHOSTDOWN }
		c.file = fails
		if err := c.append(block); !errors.Is(err, syscall.EHOSTDOWN) || errors.Is(err, errChainLost) {
			t.Fatalf("append: %v", err)
		}
		writeFile(t, name, slices.Concat(before, line[:left]))
		c.file = &failingFile{chainFile: file, sync: syscall.EIO} // another fault when it is back
		if err := c.append(block); !errors.Is(err, syscall.EIO) || !bytes.Equal(readFile(t, name), before) {
			t.Fatalf("append: %v, the file has %q, want %q", err, readFile(t, name), before)
		}
		c.file = file.chainFile
	}
	appendBlock(t, c)
	if again := openCopy(t, name); again.head != c.head || len(blocks(t, again)) != 3 {
		t.Errorf("the chain read again ends with %v, want %v", again.head, c.head)
	}
}

// A file that was replaced or deleted while a write failed is left as it is.
func TestReplacedWhileWriting(t *testing.T) {
	for _, replaced := range []bool{true, false} {
		name, text := newChainFile(t, 2)
		other := bytes.Repeat(text, 3)
		c := open(t, name)
		c.file = &hookedFile{c.file, func() error {
			os.Remove(name)
			if replaced {
				writeFile(t, name, other)
			}
			return syscall.EIO
		}}
		block := generateBlock(c.head, 72, golden.Validator, time.Now())
		if err := c.append(block); !errors.Is(err, syscall.EIO) {
			t.Errorf("append: %v, want %v", err, syscall.EIO)
		}
		if err := c.append(block); !errors.Is(err, errChainLost) {
			t.Errorf("append: %v, want %v", err, errChainLost)
		}
		if left, err := os.ReadFile(name); replaced != (err == nil) || replaced && !bytes.Equal(left, other) {
			t.Errorf("%v, the file has %q, want %q", err, left, other)
		}
	}
}

// It is the open file that is truncated, whatever has taken its name.
func TestTruncate(t *testing.T) {
	name, text := newChainFile(t, 2)
	file := appendFile{openFile(t, name)}
	moved := name + "~"
	if err := os.Rename(name, moved); err != nil {
		t.Fatal(err)
	}
	writeFile(t, name, text)
	if err := file.Truncate(10); err != nil || !bytes.Equal(readFile(t, name), text) || !bytes.Equal(readFile(t, moved), text[:10]) {
		t.Errorf("%v, the files have %q and %q", err, readFile(t, name), readFile(t, moved))
	}
}

// A file that something else has touched is left as it is, under its name and any
// other, and the error says what has happened to it.
func TestFileIsLost(t *testing.T) {
	for name, test := range map[string]struct {
		touch func(t *testing.T, file string, text []byte)
		want  string // FILE stands for the file's name, SIZE for its size before, BLOCKS for that of its blocks
	}{
		"deleted": {func(t *testing.T, file string, text []byte) { os.Remove(file) },
			"FILE was deleted while the server ran"},
		"replaced by a copy": {func(t *testing.T, file string, text []byte) {
			writeFile(t, file+"~", text)
			os.Rename(file+"~", file)
		}, "FILE was replaced by another file while the server ran"},
		"longer": {func(t *testing.T, file string, text []byte) { writeFile(t, file, append(text, '\n')) },
			"FILE was made longer by something else while the server ran: from SIZE to SIZE+1 bytes"},
		"shorter": {func(t *testing.T, file string, text []byte) { os.Truncate(file, 10) },
			"FILE was made shorter by something else while the server ran: from BLOCKS to 10 bytes"},
	} {
		for state, fails := range map[string]failingFile{ // of a write before that failed
			"written":     {},
			"removed":     {sync: syscall.EIO},
			"not removed": {sync: syscall.EIO, truncate: syscall.EIO},
		} {
			t.Run(name+", "+state, func(t *testing.T) {
				file, _ := newChainFile(t, 2)
				c := open(t, file)
				fails.chainFile = c.file
				c.file = &fails
				block := generateBlock(c.head, 72, golden.Validator, time.Now())
				if err := c.append(block); (err == nil) != (fails.sync == nil) {
					t.Fatal(err)
				}
				old, text := c.head, readFile(t, file)
				c.file = &failingFile{chainFile: fails.chainFile, touched: func(by string) { t.Errorf("the lost file was touched by %s", by) }}
				test.touch(t, file, bytes.Clone(text))
				touched, _ := os.ReadFile(file)
				err := c.append(generateBlock(c.head, 72, golden.Validator, time.Now()))
				want := strings.NewReplacer("FILE", file, "SIZE+1", strconv.Itoa(len(text)+1), "SIZE", strconv.Itoa(len(text)), "BLOCKS", strconv.FormatInt(c.size, 10)).Replace(
					"the chain cannot go on: " + test.want)
				if !errors.Is(err, errChainLost) || err.Error() != want {
					t.Errorf("append: %v, want %s", err, want)
				}
				if left, _ := os.ReadFile(file); !bytes.Equal(left, touched) || c.head != old {
					t.Errorf("the file has %q, want %q as before", left, touched)
				}
			})
		}
	}
	// Some file systems say of the open file that it does not exist.
	c := open(t, filepath.Join(t.TempDir(), "chain.jsonl"))
	c.file = &failingFile{chainFile: c.file, stat: syscall.ENOENT}
	if err := c.append(generateBlock(c.head, 72, golden.Validator, time.Now())); !errors.Is(err, errChainLost) {
		t.Errorf("append: %v, want %v", err, errChainLost)
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
		c, err := openBlockchain(name, 0, log.New(io.Discard, "", 0))
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
	if _, err := load(appendFile{file}, log.New(io.Discard, "", 0)); !errors.Is(err, syscall.EBADF) {
		t.Errorf("load: %v, want %v", err, syscall.EBADF)
	}
	file.Close()
	if _, err := load(appendFile{file}, log.New(io.Discard, "", 0)); !errors.Is(err, os.ErrClosed) {
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
	file := &failingFile{chainFile: appendFile{openFile(t, name)}, truncate: syscall.EIO}
	var logged bytes.Buffer
	if _, err := load(file, log.New(&logged, "", 0)); !errors.Is(err, syscall.EIO) || logged.Len() > 0 {
		t.Errorf("load: %v, want %v; logged %q", err, syscall.EIO, &logged)
	}
}

// wantOpened returns what a file with text has after it was opened, nothing if it becomes a
// new chain, and whether it can be opened. It checks the lines with encoding/json.
func wantOpened(text []byte) (after []byte, ok bool) {
	last := beforeGenesis
	for rest := text; len(rest) > 0; {
		line, next, _ := bytes.Cut(rest, []byte("\n"))
		var block Block
		err := json.Unmarshal(line, &block)
		again, _ := json.Marshal(block)
		visible := !strings.ContainsFunc(string(line), func(r rune) bool {
			return !unicode.IsGraphic(r) || unicode.IsSpace(r) || r > unicode.MaxASCII || r == '\\'
		})
		if err != nil || !visible || len(line) > 384 || !bytes.Equal(line, again) || validateBlock(block, last) != nil {
			return after, len(next) == 0 && mayBeTorn(rest, last.Index+1)
		}
		after = append(append(after, line...), '\n')
		last = block
		rest = next
	}
	return after, true
}

// Whatever is in the file, opening it either gives the chain of its valid lines
// without a torn last one, or refuses the file and leaves it as it is.
func FuzzOpen(f *testing.F) {
	name, text := newChainFile(f, 3)
	f.Add(text)
	f.Add(text[:len(text)-1])
	f.Add(append(bytes.Clone(text[:len(text)-1]), '\r'))
	f.Add(bytes.ReplaceAll(text, []byte("\n"), []byte("\r\n")))
	f.Add(append([]byte("\xef\xbb\xbf"), text...))
	f.Add(text[:200])
	f.Add([]byte(`{"precious":1}`))
	f.Add(append(bytes.Clone(text), `{"Index":3,"Times`+"\x00\x00\n"...))
	f.Add(append(make([]byte, 5), text[5:bytes.IndexByte(text, '\n')+1]...))
	f.Add(append(bytes.Clone(text), "\x00\x00\x00\x00\x00\x00\x00\x00\x003,\"Timestamp\":\"2009\"}\n"...))
	f.Add(bytes.Replace(text, []byte(`"BPM":72`), []byte(`"BPM":73`), 1))
	f.Add([]byte("\n"))
	f.Add(make([]byte, 100))
	f.Add(append(bytes.Clone(text), make([]byte, 100)...))
	f.Add(make([]byte, 1000))
	f.Fuzz(func(t *testing.T, text []byte) {
		after, _, err := opens(t, name, text)
		want, ok := wantOpened(text)
		switch {
		case ok != (err == nil):
			t.Fatalf("%q: %v", text, err)
		case !ok && !bytes.Equal(after, text):
			t.Fatalf("refused with %v and changed to %q", err, after)
		case ok && len(want) > 0 && !bytes.Equal(after, want):
			t.Fatalf("%q became %q", text, after)
		case ok && len(want) == 0 && bytes.Count(after, []byte("\n")) != 1:
			t.Fatalf("%q became %q", text, after)
		case !ok && (len(err.Error()) > 1000 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r > '~' })):
			t.Fatalf("%q is refused with %q", text, err)
		}
	})
}

// newLongChainFile returns the name and the size of a file with a chain of so many
// blocks, written without a sync for each.
func newLongChainFile(b testing.TB, blocks int) (name string, size int) {
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
		n, _ := w.Write(append(block.marshal(), '\n'))
		size += n
		block = generateBlock(block, 72, golden.Validator, time.Unix(int64(30*block.Index), 123456789))
	}
	if err := w.Flush(); err != nil {
		b.Fatal(err)
	}
	return name, size
}

// The program's memory does not grow with the chain unless a broadcast carries all of it.
func TestMemory(t *testing.T) {
	if _, err := os.Stat("/proc/self/status"); err != nil || raceEnabled() {
		t.Skip("memory cannot be measured")
	}
	name, size := newLongChainFile(t, 100_000)
	memory := func(setting string) int {
		p := start(t, "CHAIN_FILE="+name, setting)
		defer p.kill()
		return p.memory("VmRSS")
	}
	if got := memory("BROADCAST_BLOCKS=3"); got > 30<<20 {
		t.Errorf("with 3 blocks a broadcast the program takes %d bytes, want at most 30 MB", got)
	}
	if got := memory("BROADCAST_BLOCKS=0"); got < size || got > size*22/10+30<<20 {
		t.Errorf("with the whole chain it takes %d bytes, the chain alone has %d", got, size)
	}
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
		c, err := openBlockchain(name, 0, log.New(io.Discard, "", 0))
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
			c, err := openBlockchain(name, 100, log.New(io.Discard, "", 0))
			if err != nil {
				b.Fatal(err)
			}
			defer closeChain(c)
			b.ReportAllocs()
			for b.Loop() {
				c.latest()
			}
		})
	}
}

// A file's name cannot drive the terminal that the log is read on.
func TestFileNameIsEscaped(t *testing.T) {
	name := filepath.Join(t.TempDir(), "a\x1b[31mb.jsonl")
	chain := open(t, name)
	os.Remove(name)
	err := chain.append(generateBlock(chain.head, 72, "a", time.Now()))
	if err == nil || !strings.HasSuffix(err.Error(), `a\x1b[31mb.jsonl was deleted while the server ran`) {
		t.Errorf("append: %v", err)
	}
}
