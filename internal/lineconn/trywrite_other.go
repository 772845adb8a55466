//go:build !unix

package lineconn

import (
	"net"
	"slices"
)

func tryWrite(_ net.Conn, pieces [][]byte) (rest net.Buffers) { return slices.Clone(pieces) }
