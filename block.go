package main

import (
	"bufio"
	"bytes"
	"cmp"
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
	"slices"
	"strconv"
	"strings"
	"syscall"
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

// jsonParts is the text before, between and after the six values of a block's
// JSON object.
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

// parseBlock is the inverse of appendJSON. Its error says why object is not, byte
// for byte, what appendJSON writes. The block's strings are parts of object.
func parseBlock(object string) (Block, error) {
	if object == "" {
		return Block{}, errors.New("it is empty")
	}
	var values [len(jsonParts)]string // values[i] is the text before jsonParts[i]
	rest := object
	for i, part := range jsonParts {
		var found bool
		if values[i], rest, found = strings.Cut(rest, part); !found {
			return Block{}, fmt.Errorf("it has no %s and is no block: %s", part, quote(object))
		}
	}
	block := Block{Timestamp: values[2], Hash: values[4], PrevHash: values[5], Validator: values[6]}
	var err error
	if block.Index, err = strconv.Atoi(values[1]); err != nil {
		return Block{}, fmt.Errorf("its Index is no whole number: %s", quote(values[1]))
	}
	if block.BPM, err = strconv.Atoi(values[3]); err != nil {
		return Block{}, fmt.Errorf("its BPM is no whole number: %s", quote(values[3]))
	}
	for i, key := range [...]string{2: "Timestamp", 4: "Hash", 5: "PrevHash", 6: "Validator"} {
		if key != "" && !isPlain(values[i]) {
			return Block{}, fmt.Errorf("its %s is not at most 64 letters, digits, or any of :.+- but %s", key, quote(values[i]))
		}
	}
	if written := block.appendJSON(make([]byte, 0, maxBlock)); string(written) != object {
		return Block{}, fmt.Errorf("it should read %s", string(written))
	}
	return block, nil
}

// plainBytes holds true for each byte that times, hashes and addresses consist of.
var plainBytes = func() (plain [256]bool) {
	for _, c := range []byte("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz:.+-") {
		plain[c] = true
	}
	return
}()

// isPlain reports whether s has at most 64 bytes, all of them plain. Such a string
// needs no escapes in JSON and is safe to print on a terminal.
func isPlain(s string) bool {
	for i := range len(s) {
		if !plainBytes[s[i]] {
			return false
		}
	}
	return len(s) <= 64
}

// quote returns the first 64 bytes of s in quotes, without control characters.
func quote(s string) string {
	return strconv.Quote(s[:min(len(s), 64)])
}

// calculateBlockHash returns the hexadecimal SHA-256 of the block's JSON object
// with an empty Hash. It covers every other field, and the object's keys keep
// them apart.
func calculateBlockHash(block Block) string {
	block.Hash = ""
	sum := sha256.Sum256(block.appendJSON(make([]byte, 0, maxBlock)))
	return string(hex.AppendEncode(make([]byte, 0, 2*len(sum)), sum[:])) // allocates only once
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

// validateBlock returns nil if newBlock can follow oldBlock, or else an error that
// says why it cannot.
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

// A Blockchain is an append-only list of blocks. It holds them as the JSON that is
// broadcast and, unless it is in memory only, in a file with one block a line.
//
// Only one goroutine may use it. What latest returned may be read by others at any
// time, since bytes once written never change or move.
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

// An appendFile is an os.File that is open for appending. It is truncated by its name,
// since Windows cannot truncate it otherwise.
type appendFile struct{ *os.File }

func (f appendFile) Truncate(size int64) error { return os.Truncate(f.Name(), size) }

// errChainLost is wrapped by errors after which no block can be appended any more,
// because the chain's file is in a state that the chain does not know.
var errChainLost = errors.New("the chain cannot go on")

// chunkSize is the capacity of a chunk in bytes. If the chain were one slice,
// growing it would copy it, and readers would keep the older copies in memory. A
// broadcast writes each chunk separately, so small chunks would slow it down. Tests
// use smaller ones.
var chunkSize = 4 << 20

// fsync makes what was written to a file, or the names in a directory, survive a
// power cut. Tests replace it.
var fsync = chainFile.Sync

// openBlockchain returns the chain in the named file. If there is no such file, or
// it is empty, it returns a new chain and keeps it there. Without a name the chain
// is in memory only. When openBlockchain returns, all blocks are on disk.
//
// The file stays locked as long as it is open. It is refused, and left as it is,
// if another server uses it or if it has a line that is no valid block, except
// for a torn last line, which is dropped with a warning.
func openBlockchain(name string, logger *log.Logger) (*Blockchain, error) {
	c := &Blockchain{head: beforeGenesis}
	if name == "" {
		return c, c.append(generateBlock(beforeGenesis, 0, "", time.Now()))
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

// load loads the chain from the file, as openBlockchain documents.
func (c *Blockchain) load(file *os.File, logger *log.Logger) error {
	if !filelock.TryLock(file) {
		return errors.New("another server uses it; give each its own")
	}
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("it is not a regular file")
	}
	c.file = appendFile{file}
	if err := c.readBlocks(file, info.Size(), logger); err != nil {
		return err
	}
	if c.head == beforeGenesis {
		err = c.append(generateBlock(beforeGenesis, 0, "", time.Now()))
	} else {
		err = fsync(file) // a server that crashed may have written a block without syncing it
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(file.Name()))
}

// readBlocks reads the blocks in the file of size bytes and drops a torn last line.
func (c *Blockchain) readBlocks(file *os.File, size int64, logger *log.Logger) error {
	lines := bufio.NewReaderSize(file, 64<<10)
	for c.size < size {
		line, err := lines.ReadSlice('\n')
		if err != nil && err != io.EOF && err != bufio.ErrBufferFull { // a line that fills the buffer is no block
			return err
		}
		next := c.head.Index + 1
		if c.size+int64(len(line)) == size && isTorn(line, next) {
			if err := c.file.Truncate(c.size); err != nil {
				return err
			}
			logger.Printf("%s: dropped the last %d bytes, a line that was cut short by a crash; its block was never announced",
				file.Name(), len(line))
			return nil
		}
		object := c.add(bytes.TrimSuffix(line, []byte("\n")))
		block, err := parseBlock(string(object))
		if err == nil {
			err = validateBlock(block, c.head)
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", next+1, err)
		}
		c.head = block
		c.size += int64(len(line))
	}
	return nil
}

// isTorn reports whether line, the last one in a file, may be what a crash has left
// of the block with the given index: some of its pages never reached the disk, so
// the line is cut off or has zero bytes instead.
func isTorn(line []byte, index int) bool {
	text, whole := bytes.CutSuffix(line, []byte("\n"))
	if len(text) > maxBlock || whole && bytes.IndexByte(text, 0) < 0 {
		return false
	}
	start := fmt.Appendf(nil, `{"Index":%d,"Timestamp":"`, index)
	written := bytes.TrimRight(text, "\x00")
	if bytes.HasPrefix(written, start) || bytes.HasPrefix(start, written) {
		return true
	}
	// Or the page with its beginning is missing, and the next one reached the disk.
	written = bytes.TrimLeft(text, "\x00")
	missing := min(len(text)-len(written), len(start))
	return whole && bytes.HasPrefix(written, start[missing:]) && bytes.HasSuffix(written, []byte(`"}`))
}

// syncDir makes the names of new files in the directory survive a power cut, as
// far as the system and the file system can do that.
func syncDir(name string) error {
	if runtime.GOOS == "windows" {
		return nil // it cannot sync directories
	}
	dir, err := os.Open(name)
	if err != nil {
		return nil // a file in it can be used even if the directory cannot be read
	}
	defer dir.Close()
	err = fsync(dir)
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		return nil // as on some network file systems
	}
	return err
}

// append adds a block that is valid on top of the head. When it returns nil the
// block is on disk. When it returns an error the chain and its file are as before,
// unless the error wraps errChainLost.
func (c *Blockchain) append(block Block) error {
	if err := validateBlock(block, c.head); err != nil {
		return err
	}
	line := append(block.appendJSON(make([]byte, 0, maxBlock)), '\n')
	if c.file != nil {
		if err := c.write(line); err != nil {
			return err
		}
	}
	c.add(line[:len(line)-1])
	c.head = block
	return nil
}

// write appends a line to the file and syncs it. Its error means what that of append means.
func (c *Blockchain) write(line []byte) error {
	if err := c.checkFile(); err != nil {
		return fmt.Errorf("%w: %w", errChainLost, err)
	}
	_, err := c.file.Write(line)
	if err == nil {
		err = fsync(c.file)
	}
	if err == nil {
		c.size += int64(len(line))
		return nil
	}
	// The truncation need not be synced: if a crash undoes it, the file ends with a
	// torn line or with a block that was not announced.
	if failed := c.file.Truncate(c.size); failed != nil {
		return fmt.Errorf("%w: writing a block failed (%w), and so did removing what was written of it (%w)", errChainLost, err, failed)
	}
	return err
}

// checkFile returns an error if something else has deleted or replaced the file, or
// changed its size.
func (c *Blockchain) checkFile() error {
	name := c.file.Name()
	opened, err := c.file.Stat()
	if err != nil {
		return err
	}
	named, err := os.Stat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s was deleted while the server ran", name)
	case err != nil:
		return err
	case !os.SameFile(opened, named):
		return fmt.Errorf("%s was replaced by another file while the server ran", name)
	case opened.Size() > c.size:
		return fmt.Errorf("%s was made longer by something else while the server ran: from %d to %d bytes", name, c.size, opened.Size())
	case opened.Size() < c.size:
		return fmt.Errorf("%s was made shorter by something else while the server ran: from %d to %d bytes", name, c.size, opened.Size())
	}
	return nil
}

// add appends a JSON object to the chunks and returns the copy there.
func (c *Blockchain) add(object []byte) []byte {
	last := len(c.chunks) - 1
	if last < 0 || len(c.chunks[last])+len(object)+len(",") > cap(c.chunks[last]) {
		c.chunks = append(c.chunks, make([]byte, 0, chunkSize))
		last++
		// By default Go collects garbage when there is as much of it as of the chain. Chunks
		// have no pointers, so collecting it after 32 MB already costs little.
		if os.Getenv("GOGC") == "" {
			debug.SetGCPercent(min(100, max(10, 100*(32<<20)/(len(c.chunks)*chunkSize))))
		}
	}
	start := len(c.chunks[last])
	c.chunks[last] = append(append(c.chunks[last], object...), ',')
	return c.chunks[last][start : start+len(object)]
}

// latest returns the JSON objects of the newest count blocks, or of all blocks if
// count is 0 or more than there are. The pieces together are one text, with commas
// between the objects.
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
	pieces := slices.Clone(c.chunks[first:])
	pieces[0] = pieces[0][start:]
	end := &pieces[len(pieces)-1]
	*end = (*end)[:len(*end)-1]
	return pieces
}
