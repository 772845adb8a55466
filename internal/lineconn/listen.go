package lineconn

import (
	"context"
	"net"
	"time"
)

// Timeout is how long a client may acknowledge nothing. Over a link that has failed for
// 20 s it has time to come back, since TCP waits twice as long after each lost try.
const Timeout = 45 * time.Second

// Listen listens on the address of the network. On Linux the system itself resets each
// connection it accepts whose client, for the timeout, acknowledges nothing of what was
// sent to it, opens no window or answers no keep-alive.
func Listen(network, address string, timeout time.Duration) (net.Listener, error) {
	lc := listenConfig(timeout)
	lc.SetMultipathTCP(false) // its sockets do not hand the options on
	return lc.Listen(context.Background(), network, address)
}
