package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os/exec"
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
	block := generateBlock(golden, -7, newAddress(), time.Now())
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
		block = generateBlock(block, int(random.Int64()), newAddress(), time.Unix(random.Int64N(1<<33), random.Int64N(1e9)))
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
		"validator":       {func(b *Block) { b.Validator = newAddress() }, "its Hash is"},
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
	for len(c.chunks) < 3 {
		if c.head.Index%500 == 0 {
			pieces = append(pieces, c.latest(0))
			early = append(early, string(bytes.Join(c.latest(0), nil)))
		}
		if err := c.append(generateBlock(c.head, c.head.Index, golden.Validator, time.Now())); err != nil {
			t.Fatal(err)
		}
	}
	for i := range early {
		if text := string(bytes.Join(pieces[i], nil)); text != early[i] {
			t.Fatalf("the chain of %d blocks has changed", i*500+1)
		}
	}
	all := blocks(t, c)
	for _, count := range []int{1, 2, 3, 3000, 3600, 3700, len(all) - 1, len(all), len(all) + 1, 0} {
		var got []Block
		if err := json.Unmarshal(fmt.Appendf(nil, "[%s]", bytes.Join(c.latest(count), nil)), &got); err != nil {
			t.Fatalf("latest(%d): %v", count, err)
		}
		want := all
		if count > 0 && count < len(all) {
			want = all[len(all)-count:]
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("latest(%d) gives %d blocks, want %d", count, len(got), len(want))
		}
	}
}
