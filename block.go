package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"time"
)

// A Block is one heartbeat rate on the chain. Its fields, in this order, are
// the keys of its JSON object.
type Block struct {
	Index     int    // height: 0 for the genesis block
	Timestamp string // when it was proposed, UTC, as time.RFC3339Nano prints it
	BPM       int    // beats per minute, as the validator claims
	Hash      string // calculateBlockHash of the block, 64 hexadecimal digits
	PrevHash  string // Hash of the block before it; empty for the genesis block
	Validator string // address of who proposed it; empty for the genesis block
}

// jsonParts is the text around the six values of a block's JSON object.
var jsonParts = [...]string{`{"Index":`, `,"Timestamp":"`, `","BPM":`,
	`,"Hash":"`, `","PrevHash":"`, `","Validator":"`, `"}`}

// appendJSON appends the block's compact JSON object, the same bytes that
// encoding/json gives, since no string in a block holds anything to escape.
func (b Block) appendJSON(dst []byte) []byte {
	for i, value := range [...]string{strconv.Itoa(b.Index), b.Timestamp,
		strconv.Itoa(b.BPM), b.Hash, b.PrevHash, b.Validator} {
		dst = append(append(dst, jsonParts[i]...), value...)
	}
	return append(dst, jsonParts[len(jsonParts)-1]...)
}

// calculateBlockHash returns the hexadecimal SHA-256 of the block's JSON object
// with an empty Hash. It covers every other field, and the object's keys keep
// them apart.
func calculateBlockHash(block Block) string {
	block.Hash = ""
	sum := sha256.Sum256(block.appendJSON(make([]byte, 0, 384)))
	return hex.EncodeToString(sum[:])
}

// nothing is what the genesis block is built on.
var nothing = Block{Index: -1}

// generateBlock returns the block that follows oldBlock, as the validator at
// address proposed it at that time.
func generateBlock(oldBlock Block, BPM int, address string, proposed time.Time) Block {
	newBlock := Block{
		Index:     oldBlock.Index + 1,
		Timestamp: proposed.UTC().Format(time.RFC3339Nano),
		BPM:       BPM,
		PrevHash:  oldBlock.Hash,
		Validator: address,
	}
	newBlock.Hash = calculateBlockHash(newBlock)
	return newBlock
}

// validateBlock says why newBlock cannot follow oldBlock, or nil if it can.
func validateBlock(newBlock, oldBlock Block) error {
	if newBlock.Index != oldBlock.Index+1 {
		return fmt.Errorf("its Index is %d, want %d", newBlock.Index, oldBlock.Index+1)
	}
	if newBlock.PrevHash != oldBlock.Hash {
		return fmt.Errorf("its PrevHash is %q, want the Hash of the block before, %q", newBlock.PrevHash, oldBlock.Hash)
	}
	if hash := calculateBlockHash(newBlock); newBlock.Hash != hash {
		return fmt.Errorf("its Hash is %q, want %q", newBlock.Hash, hash)
	}
	if newBlock.Index == 0 && (newBlock.BPM != 0 || newBlock.Validator != "") {
		return fmt.Errorf("the genesis block has BPM %d and Validator %q, want 0 and none", newBlock.BPM, newBlock.Validator)
	}
	return nil
}

// A Blockchain is an append-only list of blocks, held as the JSON that is
// broadcast. It belongs to one goroutine, but what latest returned may be read
// by others at any time: bytes once written never change or move.
type Blockchain struct {
	head   Block    // the newest block
	chunks [][]byte // the blocks' JSON objects, a comma after each; none is split over two chunks
}

// chunkSize is the capacity of a chunk in bytes. A slice that grew as one piece
// would at times hold twice the chain, once more for each client still reading
// an older copy.
const chunkSize = 1 << 20

// newBlockchain returns a chain of the genesis block alone.
func newBlockchain() *Blockchain {
	chain := &Blockchain{head: nothing}
	chain.grow(generateBlock(nothing, 0, "", time.Now()))
	return chain
}

// append puts a block that is valid on top of the head on the chain.
func (c *Blockchain) append(block Block) error {
	if err := validateBlock(block, c.head); err != nil {
		return fmt.Errorf("block %d: %w", block.Index, err)
	}
	c.grow(block)
	return nil
}

// grow makes block the head and adds its JSON object.
func (c *Blockchain) grow(block Block) {
	object := append(block.appendJSON(nil), ',')
	last := len(c.chunks) - 1
	if last < 0 || len(c.chunks[last])+len(object) > cap(c.chunks[last]) {
		c.chunks = append(c.chunks, make([]byte, 0, chunkSize))
		last++
	}
	c.chunks[last] = append(c.chunks[last], object...)
	c.head = block
}

// latest returns the JSON objects of the newest count blocks, or of all if
// count is 0 or more than there are: pieces that make one text, the objects with
// commas between them.
func (c *Blockchain) latest(count int) [][]byte {
	first, start := 0, 0
	if count > 0 && count <= c.head.Index {
		for first = len(c.chunks); count > 0; count-- {
			if start == 0 {
				first--
				start = len(c.chunks[first])
			}
			start = bytes.LastIndexByte(c.chunks[first][:start], '{')
		}
	}
	pieces := append([][]byte(nil), c.chunks[first:]...)
	pieces[0] = pieces[0][start:]
	end := &pieces[len(pieces)-1]
	*end = (*end)[:len(*end)-1]
	return pieces
}
