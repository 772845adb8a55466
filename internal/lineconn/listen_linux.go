package lineconn

import (
	"cmp"
	"net"
	"os"
	"syscall"
	"time"
)

// Options of IPPROTO_TCP that package syscall does not have everywhere.
const (
	tcpUserTimeout = 18 // TCP_USER_TIMEOUT
	tcpRTOMax      = 44 // TCP_RTO_MAX_MS, since Linux 6.15
)

// maxRetry is the longest that TCP waits before it sends again what was not acknowledged.
// By itself it waits twice as long after each try, and after a failure of the link for
// 20 s the next try may come too late for the timeout.
const maxRetry = 5 * time.Second

// beforeClose undoes maxRetry. A closed connection whose client takes nothing for so long
// is given up by Linux, and with it the last line.
func beforeClose(conn TCPConn) {
	if conn, ok := conn.(syscall.Conn); ok {
		if raw, err := conn.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) { setOption(fd, syscall.IPPROTO_TCP, tcpRTOMax, 120_000) }) // ms, as without maxRetry
		}
	}
}

// setOption has no effect on a system without the option, as WSL 1 is without TCP_USER_TIMEOUT.
func setOption(fd uintptr, level, name, value int) error {
	err := syscall.SetsockoptInt(int(fd), level, name, value)
	if err == syscall.ENOPROTOOPT {
		return nil
	}
	return os.NewSyscallError("setsockopt", err)
}

// writeBuffer bounds in bytes what the kernel holds for a client that reads slowly; Linux
// takes twice as much. Left to itself it would hold 4 MB.
const writeBuffer = 256 << 10

// listenConfig sets the options on the listening socket, from which each accepted one
// inherits them, so that they cost no system call a connection. While something is sent,
// TCP_USER_TIMEOUT alone decides; while nothing is, keep-alive's probes ask and it decides
// how long they may go unanswered. See "When TCP sockets refuse to die" in Cloudflare's blog.
func listenConfig(timeout time.Duration) net.ListenConfig {
	idle := max(1, int(timeout.Seconds()*2/3))
	interval := max(1, idle/6)
	return net.ListenConfig{
		KeepAlive: -1, // or it would be set for each connection
		Control: func(_, _ string, conn syscall.RawConn) error {
			var err error
			set := func(fd uintptr) {
				for _, option := range [...]struct{ level, name, value int }{
					{syscall.SOL_SOCKET, syscall.SO_SNDBUF, writeBuffer},
					{syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
					{syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, idle},
					{syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL, interval},
					{syscall.IPPROTO_TCP, tcpUserTimeout, int(timeout.Milliseconds())},
					{syscall.IPPROTO_TCP, tcpRTOMax, int(maxRetry.Milliseconds())},
				} {
					err = cmp.Or(err, setOption(fd, option.level, option.name, option.value))
				}
			}
			failed := conn.Control(set)
			return cmp.Or(failed, err)
		},
	}
}
