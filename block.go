package main

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"proof-of-stake/internal/filelock"
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

// maxBlock is a length in bytes that no JSON object of a block exceeds.
const maxBlock = 384

// marshal returns the block's compact JSON object.
func (b *Block) marshal() []byte {
	object, _ := json.Marshal(b) // never fails
	return object
}

// calculateBlockHash returns the hexadecimal SHA-256 of the block's JSON object
// with an empty Hash. It covers every other field, and the object's keys keep
// them apart.
func calculateBlockHash(block Block) string {
	block.Hash = ""
	sum := sha256.Sum256(block.marshal())
	return hex.EncodeToString(sum[:])
}

// beforeGenesis stands for the block that the genesis block follows.
var beforeGenesis = Block{Index: -1}

// generateBlock returns the block that follows oldBlock. The validator at address
// proposed it at the time proposed.
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

// validateBlock returns nil if newBlock can follow oldBlock, or else an error that says
// why it cannot.
func validateBlock(newBlock, oldBlock Block) error {
	if newBlock.Index != oldBlock.Index+1 {
		return fmt.Errorf("block %d stands where block %d belongs", newBlock.Index, oldBlock.Index+1)
	}
	if newBlock.Index == 0 && (newBlock.BPM != 0 || newBlock.PrevHash != "" || newBlock.Validator != "") {
		return errors.New("block 0 is no genesis block: that has BPM 0, an empty PrevHash and an empty Validator")
	}
	if newBlock.PrevHash != oldBlock.Hash {
		return fmt.Errorf("block %d does not follow: its PrevHash is %s, the Hash of block %d is %s",
			newBlock.Index, cmp.Or(newBlock.PrevHash, "empty"), oldBlock.Index, oldBlock.Hash)
	}
	if hash := calculateBlockHash(newBlock); newBlock.Hash != hash {
		return fmt.Errorf("block %d was changed: its contents hash to %s, its Hash says %s",
			newBlock.Index, hash, cmp.Or(newBlock.Hash, "nothing"))
	}
	return nil
}

// parseBlock is the inverse of marshal for a line with or without its newline. Its error
// says where the line is not as marshal writes it. It refuses blocks with strings that need
// escapes in JSON or are not safe to print on a terminal. index is the one that the block
// should have.
func parseBlock(line []byte, index int) (Block, error) {
	text := bytes.TrimSuffix(line, []byte("\n"))
	switch {
	case len(text) == 0:
		return Block{}, errors.New("it is empty")
	case bytes.HasPrefix(text, []byte("\xef\xbb\xbf")), bytes.HasPrefix(text, []byte("\xff\xfe")), bytes.HasPrefix(text, []byte("\xfe\xff")):
		return Block{}, errors.New("it begins with a byte order mark; save the file as UTF-8 without one")
	case bytes.Contains(text, []byte("}\r")):
		return Block{}, errors.New("it ends with a carriage return; save it with Unix line ends (LF)")
	case len(text) > maxBlock:
		return Block{}, fmt.Errorf("it is longer than a block, which has at most %d bytes; it begins with %s", maxBlock, quote(text))
	}
	block := Block{Index: index}
	var syntax *json.SyntaxError
	if errors.As(json.Unmarshal(line, &block), &syntax) { // a value of another type is left out, and found below
		at := max(int(syntax.Offset), 1) // 0 from Go's next encoding/json
		return Block{}, fmt.Errorf("from byte %d on it reads %s, but a block is one JSON object", at, quote(text[at-1:]))
	}
	if object := block.marshal(); !bytes.Equal(text, object) {
		at := 0
		for at < min(len(text), len(object)) && text[at] == object[at] {
			at++
		}
		return Block{}, fmt.Errorf("from byte %d on it reads %s where it should read %s", at+1, quote(text[at:]), quote(object[at:]))
	}
	for at, c := range text {
		if c <= ' ' || c > '~' || c == '\\' {
			return Block{}, fmt.Errorf("from byte %d on it reads %s, but a block has only visible ASCII characters, without escapes", at+1, quote(text[at:]))
		}
	}
	return block, nil
}

// blockStart returns how the JSON object of the block with this index begins.
func blockStart(index int) []byte {
	return fmt.Appendf(nil, `{"Index":%d,"Timestamp":"`, index)
}

// quote returns the first 64 bytes of text in quotes, in visible ASCII characters.
func quote(text []byte) string {
	if len(text) == 0 {
		return "nothing"
	}
	return strconv.QuoteToASCII(string(text[:min(len(text), 64)]))
}

// A Blockchain is an append-only list of blocks. It holds the newest of them as the
// JSON that is broadcast and, unless it is in memory only, all of them in a file with
// one block a line.
//
// Only one goroutine may use it. What latest returned may be read by others at any
// time, since bytes once written never change.
type Blockchain struct {
	head  Block     // the newest block
	limit int       // of blocks in json; 0 is none
	json  []byte    // the newest blocks' objects, a comma after each; grows at its end and is cut at its front
	file  chainFile // nil if the chain is in memory only
	size  int64     // of the blocks in the file, in bytes
	tail  int64     // of a block that could not be written; anything from nothing to all of it may be in the file
}

// A chainFile is what a Blockchain needs of an os.File that is open for appending.
type chainFile interface {
	io.ReadWriter
	Name() string
	Stat() (fs.FileInfo, error)
	Sync() error
	SyncDir() error // makes the file's name survive a power cut
	Truncate(size int64) error
}

// An appendFile is an os.File that is open for appending.
type appendFile struct{ *os.File }

// Truncate truncates the open file, whatever its name leads to by now. Windows cannot do
// that, but does not let anybody replace an open file either.
func (f appendFile) Truncate(size int64) error {
	if runtime.GOOS == "windows" {
		return os.Truncate(f.Name(), size)
	}
	return f.File.Truncate(size)
}

func (f appendFile) SyncDir() error {
	if runtime.GOOS == "windows" {
		return nil // it cannot sync directories
	}
	name, err := filepath.EvalSymlinks(f.Name())
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// errNotRegular is why a pipe, a device or the like cannot hold the chain.
var errNotRegular = errors.New("it is not a regular file")

// errChainLost is wrapped by the errors that say that something else has deleted, replaced or
// changed the chain's file.
var errChainLost = errors.New("the chain cannot go on")

// openBlockchain returns the chain in the named file. If there is no such file, or
// it is empty, it returns a new chain and keeps it there. Without a name the chain
// is in memory only. When openBlockchain returns, all blocks are on disk. latest is
// how many of the newest blocks the method of that name returns; 0 is all.
//
// The file stays locked as long as it is open. It is refused, and left as it is,
// if another server uses it or if it has a line that is no valid block. Only a torn
// last line is dropped, and the newline of a whole one is written; the log says so.
func openBlockchain(name string, latest int, logger *log.Logger) (*Blockchain, error) {
	c := &Blockchain{head: beforeGenesis, limit: latest}
	if name == "" {
		return c, c.append(generateBlock(beforeGenesis, 0, "", time.Now()))
	}
	file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	if !filelock.TryLock(file) {
		err = errors.New("another server uses it; give each its own")
	} else {
		err = c.load(appendFile{file}, logger)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return c, nil
}

// load loads the chain from the file, as openBlockchain documents.
func (c *Blockchain) load(file chainFile, logger *log.Logger) error {
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errNotRegular
	}
	c.file = file
	if err := c.readBlocks(info.Size(), logger); err != nil {
		return err
	}
	if c.head == beforeGenesis {
		err = c.append(generateBlock(beforeGenesis, 0, "", time.Now()))
	} else {
		err = file.Sync() // a server that crashed may have written a block without syncing it
	}
	if err != nil {
		return err
	}
	if err := file.SyncDir(); err != nil {
		logger.Printf("warning: cannot sync the directory of %s, so a power cut may lose a new file: %v", c.fileName(), err)
	}
	return nil
}

// readBlocks reads the blocks in the file of size bytes. It drops a torn last line and
// writes the newline that a whole one lacks.
func (c *Blockchain) readBlocks(size int64, logger *log.Logger) error {
	if c.limit == 0 {
		c.json = make([]byte, 0, size+1<<20) // for memory; see docs/measurements.md
	}
	lines := bufio.NewReader(c.file)
	for c.size < size {
		line, err := lines.ReadSlice('\n')
		if err != nil && err != io.EOF && err != bufio.ErrBufferFull { // a line that fills the buffer is no block
			return err
		}
		index := c.head.Index + 1
		object, whole := bytes.CutSuffix(line, []byte("\n"))
		block, err := parseBlock(line, index)
		if err == nil {
			err = validateBlock(block, c.head)
		}
		switch {
		case err == nil:
			c.add(block, object)
			c.size += int64(len(line))
			if !whole {
				if err := c.write([]byte("\n")); err != nil {
					return err
				}
				logger.Printf("%s: block %d, the last line, had no newline; it was written", c.fileName(), index)
			}
		case c.size+int64(len(line)) == size && isTorn(line, index):
			if err := c.file.Truncate(c.size); err != nil {
				return err
			}
			logger.Printf("%s: dropped the last %d bytes, a line that was cut short by a crash; its block was never announced",
				c.fileName(), len(line))
			return nil
		default:
			return fmt.Errorf("line %d: %w", index+1, err)
		}
	}
	return nil
}

// isTorn reports whether line, the last one in a file and no valid block, may be what a
// crash has left of the block with the given index: it is cut off before the } that ends a
// block, or some of its pages never reached the disk, which then has zero bytes instead.
// A file that begins with zero bytes is no chain.
func isTorn(line []byte, index int) bool {
	text, ended := bytes.CutSuffix(line, []byte("\n"))
	zero := bytes.IndexByte(text, 0)
	if len(text) > maxBlock || zero < 0 && (ended || bytes.ContainsRune(text, '}')) {
		return false
	}
	if zero == 0 {
		return index > 0
	}
	start := blockStart(index)
	written := bytes.TrimRight(text, "\x00")
	return bytes.HasPrefix(written, start) || bytes.HasPrefix(start, written)
}

// append adds a block that is valid on top of the head. When it returns nil the block is on
// disk. When it returns an error the chain is as before, and what may be left of the block in
// its file is removed before the next one is written. After an error that wraps errChainLost
// no block can be appended any more.
func (c *Blockchain) append(block Block) error {
	if err := validateBlock(block, c.head); err != nil {
		return err
	}
	object := block.marshal()
	if c.file != nil {
		if err := c.write(append(object, '\n')); err != nil {
			return err
		}
	}
	c.add(block, object)
	return nil
}

// write appends text to the file and syncs it. Its error means what that of append means.
func (c *Blockchain) write(text []byte) error {
	if err := c.rollBack(); err != nil {
		return err
	}
	_, err := c.file.Write(text)
	if err == nil {
		err = c.file.Sync()
	}
	if err != nil {
		c.tail = int64(len(text))
		c.rollBack() // if that fails, the next write tries again
		return err
	}
	c.size += int64(len(text))
	return nil
}

// fileName returns the file's name as it may be shown on a terminal.
func (c *Blockchain) fileName() string { return strings.Trim(strconv.Quote(c.file.Name()), `"`) }

// rollBack removes what a failed write has left in the file, if it is still the chain's.
// This need not be synced: if a crash undoes it, the file ends with a torn line or with a
// block that was not announced.
func (c *Blockchain) rollBack() error {
	err := c.checkFile()
	if err != nil || c.tail == 0 {
		return err
	}
	if err = c.file.Truncate(c.size); err == nil {
		c.tail = 0
	}
	return err
}

// checkFile returns an error that wraps errChainLost if something else has deleted or
// replaced the file or changed its size, or another error if that cannot be found out.
func (c *Blockchain) checkFile() error {
	opened, err := c.file.Stat()
	var named fs.FileInfo
	if err == nil {
		named, err = os.Stat(c.file.Name())
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %s was deleted while the server ran", errChainLost, c.fileName())
	case err != nil:
		return err
	case !os.SameFile(opened, named):
		return fmt.Errorf("%w: %s was replaced by another file while the server ran", errChainLost, c.fileName())
	case opened.Size() > c.size+c.tail:
		return fmt.Errorf("%w: %s was made longer by something else while the server ran: from %d to %d bytes", errChainLost, c.fileName(), c.size+c.tail, opened.Size())
	case opened.Size() < c.size:
		return fmt.Errorf("%w: %s was made shorter by something else while the server ran: from %d to %d bytes", errChainLost, c.fileName(), c.size, opened.Size())
	}
	return nil
}

// add makes the block the head and appends its JSON object. What exceeds the limit is
// cut off, and no longer kept as soon as append moves the rest to another array.
func (c *Blockchain) add(block Block, object []byte) {
	c.head = block
	c.json = append(append(c.json, object...), ',')
	if c.limit > 0 && block.Index >= c.limit {
		oldest := blockStart(block.Index - c.limit + 1)
		c.json = c.json[bytes.Index(c.json, oldest):]
	}
}

// latest returns the JSON objects of the newest blocks, as many as openBlockchain was
// told, with commas between them.
func (c *Blockchain) latest() []byte {
	return slices.Clip(c.json[:len(c.json)-len(",")])
}
