package lineconn

import (
	"net"
	"syscall"
	"time"
)

// tcpUserTimeout is TCP_USER_TIMEOUT, which package syscall does not have everywhere.
const tcpUserTimeout = 18

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
				} {
					if err == nil {
						err = syscall.SetsockoptInt(int(fd), option.level, option.name, option.value)
					}
				}
			}
			if failed := conn.Control(set); failed != nil {
				return failed
			}
			return err
		},
	}
}
