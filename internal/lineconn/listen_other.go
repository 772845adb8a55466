//go:build !linux

package lineconn

import (
	"net"
	"time"
)

// listenConfig asks for keep-alive, which the system has in its own way.
func listenConfig(timeout time.Duration) net.ListenConfig {
	return net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: timeout / 3, Interval: timeout / 9, Count: 6,
	}}
}
