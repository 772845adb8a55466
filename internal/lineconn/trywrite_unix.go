//go:build unix

package lineconn

import (
	"net"
	"slices"
	"sync"
	"syscall"
)

// tryWrite writes as much of the pieces as the system takes at once, and returns the rest.
// It never waits. An error is left to whoever writes the rest.
func tryWrite(conn net.Conn, pieces [][]byte) (rest net.Buffers) {
	t := tries.Get().(*try)
	t.pieces = append(t.pieces[:0], pieces...)
	t.rest = t.pieces
	if socket, ok := conn.(syscall.Conn); ok {
		if raw, err := socket.SyscallConn(); err == nil {
			raw.Write(t.write)
		}
	}
	if len(t.rest) > 0 {
		rest = slices.Clone(t.rest)
	}
	clear(t.pieces)
	tries.Put(t)
	return rest
}

// A try is one call of tryWrite. It is reused, or each message to each connection would
// leave a function as garbage.
type try struct {
	pieces net.Buffers
	rest   net.Buffers // of pieces
	write  func(fd uintptr) bool
}

var tries = sync.Pool{New: func() any {
	t := new(try)
	t.write = func(fd uintptr) bool {
		for len(t.rest) > 0 {
			n, err := syscall.Write(int(fd), t.rest[0])
			if err != nil {
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
