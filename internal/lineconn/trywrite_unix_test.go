//go:build unix

package lineconn

import (
	"bytes"
	"io"
	"testing"
)

// What tryWrite does not write it returns, and changes neither.
func TestTryWriteReturnsTheRest(t *testing.T) {
	peer, its := accept(t, Timeout)
	text := bytes.Repeat([]byte("0123456789"), 1<<20)
	pieces := [][]byte{text[:1], text[1:1000], text[1000 : len(text)-3], text[len(text)-3:]}
	rest := tryWrite(its, pieces)
	left := 0
	for _, piece := range rest {
		left += len(piece)
	}
	if left == 0 || left >= len(text) || !bytes.Equal(bytes.Join(rest, nil), text[len(text)-left:]) || !bytes.Equal(bytes.Join(pieces, nil), text) {
		t.Errorf("of %d bytes %d are left, or they are others", len(text), left)
	}
	if n, err := io.ReadFull(peer, make([]byte, len(text)-left)); err != nil {
		t.Errorf("received %d bytes of the %d that were written: %v", n, len(text)-left, err)
	}
	its.Close()
	if rest := tryWrite(its, pieces); !bytes.Equal(bytes.Join(rest, nil), text) {
		t.Error("of a closed connection not all is left")
	}
}
