package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

// A Block is one heart rate on the chain. Its fields, in this order, are
// the keys of its JSON object.
type Block struct {
	Index     int    // height: 0 for the genesis block
	Timestamp string // when it was proposed, UTC, as time.RFC3339Nano prints it
	BPM       int    // beats per minute, as the validator claims
	Hash      string // calculateBlockHash of the block, 64 hexadecimal digits
	PrevHash  string // Hash of the block before it; empty for the genesis block
	Validator string // address of who proposed it; empty for the genesis block
}

// maxBlock is as long as a block's JSON object gets here, in bytes.
const maxBlock = 384

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

// parseBlock is the inverse of appendJSON. It refuses what appendJSON would
// have written differently.
func parseBlock(object string) (Block, error) {
	var values [len(jsonParts)]string // what stands before each part; before the first, nothing
	rest := object
	for i, part := range jsonParts {
		var found bool
		if values[i], rest, found = strings.Cut(rest, part); !found {
			return Block{}, fmt.Errorf("it is no block: want %s in it", part)
		}
	}
	block := Block{Timestamp: values[2], Hash: values[4], PrevHash: values[5], Validator: values[6]}
	var err error
	if block.Index, err = strconv.Atoi(values[1]); err != nil {
		return Block{}, fmt.Errorf("its Index is %q, want a whole number", values[1])
	}
	if block.BPM, err = strconv.Atoi(values[3]); err != nil {
		return Block{}, fmt.Errorf("its BPM is %q, want a whole number", values[3])
	}
	if !isPlain(block.Timestamp) || !isPlain(block.Validator) {
		return Block{}, fmt.Errorf("want letters, digits and :.+- alone in its Timestamp %q and its Validator %q", block.Timestamp, block.Validator)
	}
	if string(block.appendJSON(make([]byte, 0, maxBlock))) != object {
		return Block{}, fmt.Errorf("it is %q, want %q", object, block.appendJSON(nil))
	}
	return block, nil
}

// isPlain reports whether s has nothing in it that JSON would have to escape,
// or that a terminal would obey. Times and addresses never have.
func isPlain(s string) bool {
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != ':' && c != '.' && c != '+' && c != '-' {
			return false
		}
	}
	return true
}

// calculateBlockHash returns the hexadecimal SHA-256 of the block's JSON object
// with an empty Hash. It covers every other field, and the object's keys keep
// them apart.
func calculateBlockHash(block Block) string {
	block.Hash = ""
	sum := sha256.Sum256(block.appendJSON(make([]byte, 0, maxBlock)))
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
// broadcast, and in a file with a block a line unless it is in memory only. It
// belongs to one goroutine, but what latest returned may be read by others at any
// time: bytes once written never change or move.
type Blockchain struct {
	head   Block     // the newest block
	chunks [][]byte  // the blocks' JSON objects, a comma after each; none is split over two chunks
	file   chainFile // nil if the chain is in memory only
	size   int64     // of the file, in bytes
}

// A chainFile is what a Blockchain needs of an os.File that is open for appending.
type chainFile interface {
	Name() string
	Stat() (fs.FileInfo, error)
	Write([]byte) (int, error)
	Sync() error
	Truncate(size int64) error
}

// errChainLost is in the errors after which the chain's file can no longer be
// vouched for.
var errChainLost = errors.New("the chain cannot go on")

// chunkSize is the capacity of a chunk in bytes. A slice that grew as one piece
// would at times hold the chain twice, and once more for whoever still reads an
// older copy. Many small pieces would cost their readers more.
const chunkSize = 4 << 20

// openBlockchain returns the chain in the file of that name, or a new one that is
// kept there from now on. Without a name the chain is in memory only.
func openBlockchain(name string, logger *log.Logger) (*Blockchain, error) {
	c := &Blockchain{head: nothing}
	if name == "" {
		return c, c.append(generateBlock(nothing, 0, "", time.Now()))
	}
	file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	if err := c.load(file, logger); err != nil {
		file.Close()
		return nil, err
	}
	return c, nil
}

// load makes the file the chain's. The file is changed only if all its lines
// are valid: a last line without its end, which cannot have been announced, is
// dropped with a warning, and an empty file gets a genesis block.
func (c *Blockchain) load(file *os.File, logger *log.Logger) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", file.Name())
	}
	for lines := bufio.NewReaderSize(file, 64<<10); ; {
		line, err := lines.ReadSlice('\n')
		for err == bufio.ErrBufferFull {
			line = nil // no block is that long
			_, err = lines.ReadSlice('\n')
		}
		if err == io.EOF {
			break
		}
		var block Block
		object := bytes.TrimSuffix(line, []byte("\n"))
		if err == nil {
			block, err = parseBlock(string(object))
		}
		if err == nil {
			err = validateBlock(block, c.head)
		}
		if err != nil {
			return fmt.Errorf("%s, line %d: %w", file.Name(), c.head.Index+2, err)
		}
		c.grow(block, object)
		c.size += int64(len(line))
	}
	c.file = file
	if torn := info.Size() - c.size; torn > 0 {
		// By its name, since on Windows a file that is open for appending cannot be cut.
		if err := os.Truncate(file.Name(), c.size); err != nil {
			return err
		}
		logger.Printf("dropped the last %d bytes of %s, a line without its end", torn, file.Name())
	}
	if c.head == nothing {
		if err := c.append(generateBlock(nothing, 0, "", time.Now())); err != nil {
			return err
		}
		return syncDir(filepath.Dir(file.Name()))
	}
	return file.Sync() // whoever wrote what has been read may not have come to this
}

// syncDir makes the names of new files in the directory last.
func syncDir(name string) error {
	if runtime.GOOS == "windows" {
		return nil // where no directory can be synced
	}
	dir, err := os.Open(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// append puts on the chain a block that is valid on top of the head. When it
// returns nil the block is on disk; when it returns an error nothing has
// changed, unless it is errChainLost: then the file is not the chain's any more.
func (c *Blockchain) append(block Block) error {
	if err := validateBlock(block, c.head); err != nil {
		return fmt.Errorf("block %d: %w", block.Index, err)
	}
	line := append(block.appendJSON(make([]byte, 0, maxBlock)), '\n')
	if c.file != nil {
		if err := c.write(line); err != nil {
			return err
		}
	}
	c.grow(block, line[:len(line)-1])
	return nil
}

// write adds a line to the file, on the terms of append.
func (c *Blockchain) write(line []byte) error {
	if err := c.checkFile(); err != nil {
		return fmt.Errorf("%w: %w", errChainLost, err)
	}
	_, err := c.file.Write(line)
	if err == nil {
		err = c.file.Sync()
	}
	if err == nil {
		c.size += int64(len(line))
		return nil
	}
	// Whether the cut is on disk does not matter: without it there would be a
	// torn line, or a block that nobody has heard of.
	if failed := c.file.Truncate(c.size); failed != nil {
		return fmt.Errorf("%w: after %w its file cannot be cut back to the last whole block: %w", errChainLost, err, failed)
	}
	return err
}

// checkFile says why the file is not as the chain left it, or nil if it is.
func (c *Blockchain) checkFile() error {
	opened, err := c.file.Stat()
	if err != nil {
		return err
	}
	there, err := os.Stat(c.file.Name())
	if err != nil {
		return err
	}
	if !os.SameFile(opened, there) {
		return fmt.Errorf("%s was replaced by another file", c.file.Name())
	}
	if opened.Size() != c.size {
		return fmt.Errorf("%s has %d bytes, want the %d that were left there: something else has written to it",
			c.file.Name(), opened.Size(), c.size)
	}
	return nil
}

// grow makes block the head and adds its JSON object in memory.
func (c *Blockchain) grow(block Block, object []byte) {
	last := len(c.chunks) - 1
	if last < 0 || len(c.chunks[last])+len(object)+len(",") > cap(c.chunks[last]) {
		c.chunks = append(c.chunks, make([]byte, 0, chunkSize))
		last++
		// By default as much garbage may pile up as there is chain. A chunk
		// has no pointers, so collecting earlier costs little: after 32 MB.
		debug.SetGCPercent(min(100, max(10, 100*(32<<20)/(len(c.chunks)*chunkSize))))
	}
	c.chunks[last] = append(append(c.chunks[last], object...), ',')
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
