//go:build unix

package lineconn

import (
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
)

// tryWrite writes as much of the pieces as the system takes at once, which is nothing if conn
// is nil, and returns the rest. It never waits.
func tryWrite(conn syscall.RawConn, pieces [][]byte) (rest net.Buffers, err error) {
	if conn == nil {
		return slices.Clone(pieces), nil
	}
	t := tries.Get().(*try)
	t.pieces = append(t.pieces[:0], pieces...)
	t.rest, t.err = t.pieces, nil
	if err = conn.Write(t.write); err == nil {
		err = t.err
	}
	if len(t.rest) > 0 {
		rest = slices.Clone(t.rest)
	}
	clear(t.pieces)
	tries.Put(t)
	return rest, err
}

// A try is one call of tryWrite. It is reused; see docs/measurements.md.
type try struct {
	pieces net.Buffers
	rest   net.Buffers // of pieces
	err    error       // why not all was written, unless it can be at another time
	write  func(fd uintptr) bool
}

var tries = sync.Pool{New: func() any {
	t := new(try)
	t.write = func(fd uintptr) bool {
		for len(t.rest) > 0 {
			n, err := syscall.Write(int(fd), t.rest[0])
			if err != nil {
				if err != syscall.EAGAIN && err != syscall.EINTR {
					t.err = os.NewSyscallError("write", err)
				}
				break
			}
			if t.rest[0] = t.rest[0][n:]; len(t.rest[0]) == 0 {
				t.rest = t.rest[1:]
			}
		}
		return true // false would have the RawConn wait
	}
	return t
}}
