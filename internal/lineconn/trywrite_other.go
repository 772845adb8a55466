//go:build !unix

package lineconn

import (
	"net"
	"slices"
	"syscall"
)

func tryWrite(_ syscall.RawConn, pieces [][]byte) (rest net.Buffers, err error) {
	return slices.Clone(pieces), nil
}
