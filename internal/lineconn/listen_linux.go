package lineconn

import (
	"cmp"
	"net"
	"os"
	"syscall"
	"time"
)

// tcpUserTimeout is TCP_USER_TIMEOUT, an option of IPPROTO_TCP that package syscall does not
// have everywhere.
const tcpUserTimeout = 18

// listenConfig sets the options on the listening socket, from which each accepted one
// inherits them, so that they cost no system call a connection. While something is sent,
// TCP_USER_TIMEOUT alone decides; while nothing is, keep-alive's probes ask and it decides
// how long they may go unanswered. The first comes after a third of it, so that no failure of
// the link for 20 s takes them all. See "When TCP sockets refuse to die" in Cloudflare's blog.
func listenConfig(timeout time.Duration) net.ListenConfig {
	idle := max(1, int(timeout.Seconds()/3))
	interval := max(1, idle/3)
	return net.ListenConfig{
		KeepAlive: -1, // or it would be set for each connection
		Control: func(_, _ string, conn syscall.RawConn) error {
			var err error
			set := func(fd uintptr) {
				for _, option := range [...]struct{ level, name, value int }{
					{syscall.SOL_SOCKET, syscall.SO_SNDBUF, 256 << 10}, // bytes for a slow client, which Linux doubles; by itself it would take 4 MB
					{syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1},
					{syscall.IPPROTO_TCP, syscall.TCP_KEEPIDLE, idle},
					{syscall.IPPROTO_TCP, syscall.TCP_KEEPINTVL, interval},
					{syscall.IPPROTO_TCP, tcpUserTimeout, int(timeout.Milliseconds())},
				} {
					failed := syscall.SetsockoptInt(int(fd), option.level, option.name, option.value)
					if failed != syscall.ENOPROTOOPT { // as WSL 1 says of TCP_USER_TIMEOUT, which it does not have
						err = cmp.Or(err, os.NewSyscallError("setsockopt", failed))
					}
				}
			}
			failed := conn.Control(set)
			return cmp.Or(failed, err)
		},
	}
}
