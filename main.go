// Proof-of-stake is a proof-of-stake lottery behind one TCP port.
//
// A validator connects with nc or telnet, stakes tokens and enters heart
// rates (BPM). Each BPM proposes a block. In every round one of the proposed
// blocks is drawn, with a chance in proportion to its validator's stake, joins
// the chain, and all validators hear whose it was.
//
// It takes no arguments but -h. Its settings come from the environment, then from the
// file .env in the working directory, then from .env.example, which is compiled
// in. The blocks of the chain go to standard output as they join it, the log to
// standard error. It stops on SIGINT, SIGTERM and SIGHUP with exit status 0, and with 1
// after a fault that it cannot work around. During the start these signals kill it, and
// while it stops, SIGINT and SIGTERM do.
package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"maps"
	"math"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/joho/godotenv"

	"proof-of-stake/internal/asyncwriter"
	"proof-of-stake/internal/dotenv"
	"proof-of-stake/internal/lineconn"
)

const usage = `Usage: proof-of-stake

A proof-of-stake lottery behind one TCP port. Start it, and join it from other
terminals, as often as you like:

    nc localhost 9000

Stake some tokens, then enter a heart rate (BPM) to propose a block. In every
round one of the proposed blocks is drawn and joins the chain; the more tokens a
validator stakes, the better its chance. Everyone hears who won, and once a
minute gets the latest blocks. The server prints each block that joins the chain
on standard output and its log on standard error. Ctrl-C stops it.

The chain is kept in CHAIN_FILE and goes on when the server is started again.
To begin a new chain, stop the server and move that file away.

Settings in the environment come before those in the file .env in the working
directory, and those before these defaults:

`

// envExample documents every setting and holds the defaults.
//
//go:embed .env.example
var envExample string

func main() {
	if len(os.Args) > 1 {
		if slices.Contains([]string{"-h", "-help", "--help"}, os.Args[1]) {
			fmt.Print(usage, envExample)
			return
		}
		fmt.Fprintf(os.Stderr, "proof-of-stake takes no arguments but -h, and was given %q; settings go before it, as in PORT=9100 proof-of-stake\n", os.Args[1:])
		os.Exit(2)
	}
	signal.Ignore(syscall.SIGPIPE) // so that writing to a closed pipe is an error

	stderr := &asyncwriter.Writer{Dst: os.Stderr, What: "lines left out of the log"}
	stdout := &asyncwriter.Writer{Dst: os.Stdout, What: "blocks left out of standard output", Log: stderr}
	logger := log.New(stderr, "", log.LstdFlags)
	err := run(stdout, logger)
	if err != nil {
		logger.Print(err)
	}
	end := time.Now().Add(flushLimit)
	stdout.Flush(end)
	stderr.Flush(end.Add(flushLimit / 4)) // with what it now says is left out of stdout
	if err != nil {
		os.Exit(1)
	}
}

const (
	stopLimit  = 3500 * time.Millisecond // from the stop until the connections and the disk are waited for no longer
	flushLimit = time.Second             // from then to the end of the outputs
)

// errNoAnswer is why a stop waits for the lottery no longer.
var errNoAnswer = fmt.Errorf("the disk has not answered within %v; the block that was being written may be in the file, but it was not announced", stopLimit)

// run reads the settings and runs the server until a signal stops it or the chain is lost.
func run(stdout io.Writer, logger *log.Logger) error {
	set, warnings, err := readSettings()
	if err != nil {
		return err
	}
	for _, warning := range warnings {
		logger.Print("warning: " + warning)
	}
	listener, err := listen(set)
	if err != nil {
		return listenError(set, err)
	}
	chain, err := openBlockchain(set.chainFile.value, set.broadcastBlocks, logger)
	if err != nil {
		return set.chainFile.refuse(err)
	}
	// Until here a signal kills: nothing else would end the wait for a name server or a disk.
	signals := slices.DeleteFunc([]os.Signal{os.Interrupt, syscall.SIGHUP}, signal.Ignored) // as by & in a script, and by nohup
	ctx, stop := signal.NotifyContext(context.Background(), append(signals, syscall.SIGTERM)...)
	context.AfterFunc(ctx, func() {
		// A closed window sends SIGHUP twice; Ignore would let the second kill while it takes effect.
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
		stop() // any other signal kills now
	})
	logListening(set, listener.Addr().(*net.TCPAddr).AddrPort(), logger)
	if set.chainFile.value == "" {
		logger.Print("the chain is in memory only, since CHAIN_FILE is empty")
	} else {
		logger.Printf("the chain is in %q; blocks: %d", set.chainFile.value, chain.head.Index+1)
	}
	logger.Printf("a draw every %v, a broadcast of the chain every %v", set.roundInterval, set.broadcastInterval)

	lottery := newLottery(chain, stdout, logger)
	lottery.roundInterval = set.roundInterval
	lottery.broadcastInterval = set.broadcastInterval
	server := newServer(lottery, set.maxValidators, logger)
	server.maxPerAddress = set.maxPerAddress
	server.maxStake = set.maxStake
	return serve(ctx, lottery, server, listener)
}

// serve runs the lottery and the server until ctx is done or the chain is lost. Then the
// server tells all clients at once, also while a block is being written. serve waits for
// the disk and for the connections, but no longer than stopLimit.
func serve(ctx context.Context, lottery *lottery, server *server, listener net.Listener) (err error) {
	serving, stop := context.WithCancel(ctx)
	defer stop()
	drawn := make(chan error, 1)
	go func() {
		drawn <- lottery.run(serving, server)
		stop()
	}()
	served := make(chan struct{})
	go func() {
		server.serve(serving, listener)
		close(served)
	}()
	<-serving.Done()
	if ctx.Err() != nil {
		server.log.Print("shutting down")
	}
	limit, cancel := context.WithTimeout(context.Background(), stopLimit)
	defer cancel()
	select {
	case err = <-drawn:
	case <-limit.Done():
		err = errNoAnswer
	}
	select {
	case <-served:
	case <-limit.Done():
	}
	return err
}

// listen listens on the port of the host, and on IPv4 alone if that is an IPv4 address.
func listen(set settings) (net.Listener, error) {
	network := "tcp"
	if addr, _ := netip.ParseAddr(set.host.value); addr.Unmap().Is4() {
		network = "tcp4"
	}
	return lineconn.Listen(network, net.JoinHostPort(set.host.value, strconv.Itoa(set.port)), lineconn.Timeout)
}

// listenError says why the server cannot listen. HOST can be at fault only if it is set.
func listenError(set settings, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE), errors.Is(err, syscall.Errno(10048)): // the latter is Windows' WSAEADDRINUSE
		other := 9100
		if set.port == other {
			other = 9200
		}
		return fmt.Errorf("cannot listen on port %d: it is in use; choose another: PORT=%d", set.port, other)
	case set.host.value != "":
		return fmt.Errorf("cannot listen on port %d with %q for HOST%s, which must be a name or an address of this machine, or empty for all of them: %q",
			set.port, set.host.value, set.host.source, err) // which may quote HOST
	}
	return fmt.Errorf("cannot listen on port %d: %w", set.port, err)
}

// logListening logs the address listened on, and how to join: from this machine and, if
// that is possible, from others.
func logListening(set settings, address netip.AddrPort, logger *log.Logger) {
	host, setting := address.Addr().String(), "" // no name, since not every client tries all its addresses
	switch host {
	case "0.0.0.0":
		host = "127.0.0.1"
	case "::":
		host = "localhost"
	}
	if set.host.value != "" {
		setting = fmt.Sprintf("; HOST is %q%s", set.host.value, set.host.source)
	}
	logger.Printf("listening on %v; join with: nc %s %d%s", address, host, address.Port(), setting)
	addrs, _ := net.InterfaceAddrs() // without them, nothing is said of other machines
	for _, host := range reachable(address.Addr(), addrs) {
		logger.Printf("from other machines: nc %v %d", host, address.Port())
	}
}

// reachable returns those of addrs, the addresses of this machine's interfaces, at which
// other machines reach a server that listens on ip: ip alone or, if that is unspecified, at
// most five, IPv4 if there are any.
func reachable(ip netip.Addr, addrs []net.Addr) (hosts []netip.Addr) {
	for _, addr := range addrs {
		prefix, _ := netip.ParsePrefix(addr.String())
		if host := prefix.Addr(); host.IsGlobalUnicast() && (host == ip || ip.IsUnspecified()) {
			hosts = append(hosts, host)
		}
	}
	if ip.Is4() || slices.ContainsFunc(hosts, netip.Addr.Is4) {
		hosts = slices.DeleteFunc(hosts, netip.Addr.Is6)
	}
	return hosts[:min(len(hosts), 5)]
}

// settings are explained in .env.example.
type settings struct {
	port              int
	host              setting // without the brackets of an IPv6 address
	roundInterval     time.Duration
	broadcastInterval time.Duration
	broadcastBlocks   int
	chainFile         setting
	maxValidators     int
	maxPerAddress     int
	maxStake          int // tokens
}

// A setting is the value of a key, and where it was set: empty, or in parentheses behind a blank.
type setting struct{ key, value, source string }

// refuse returns an error that says why the setting cannot be used. The value may drive a
// terminal, so it is quoted; a fault of the file system would repeat it as it is.
func (s setting) refuse(fault error) error {
	var path *fs.PathError
	if errors.As(fault, &path) {
		fault = path.Err
	}
	return fmt.Errorf("cannot use %q for %s%s: %w", s.value, s.key, s.source, fault)
}

// readSettings takes each setting from the nearest place that has it: first the
// environment, that is, whoever starts the server; then .env, which belongs to the
// directory; then .env.example. The warnings are for the log. The error has one line for
// each fault.
func readSettings() (set settings, warnings []string, err error) {
	defaults, _ := godotenv.Unmarshal(envExample)
	values, err := dotenv.Read(".env")
	if errors.Is(err, fs.ErrNotExist) {
		for _, name := range []string{".env.txt", ".env.text"} {
			if _, err := os.Lstat(name); err == nil {
				warnings = append(warnings, name+" is not read; to have its settings read, rename it to .env")
			}
		}
	} else if err != nil {
		return settings{}, nil, fmt.Errorf("cannot read .env: %w", err)
	}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		if _, known := defaults[key]; !known {
			warnings = append(warnings, strings.Trim(strconv.Quote(key), `"`)+" in .env is no setting; the settings are in .env.example, or: proof-of-stake -h")
		}
	}

	get := func(key string) setting {
		if value, ok := os.LookupEnv(key); ok {
			return setting{key, value, " (from the environment)"}
		}
		if value, ok := values[key]; ok {
			return setting{key, value, " (from .env)"}
		}
		return setting{key, defaults[key], ""}
	}
	var faults []error
	number := func(key string, low, high int) int {
		s := get(key)
		n, err := strconv.Atoi(s.value)
		if err != nil || n < low || n > high {
			faults = append(faults, s.refuse(fmt.Errorf("it must be a whole number from %d to %d", low, high)))
		}
		return n
	}
	duration := func(key string) time.Duration {
		s := get(key)
		d, err := time.ParseDuration(s.value)
		if err != nil || d < time.Millisecond {
			faults = append(faults, s.refuse(errors.New("it must be a duration of at least 1ms, such as 30s or 1m30s")))
		}
		return d
	}
	set.port = number("PORT", 0, 65535)
	set.host = get("HOST")
	if s := set.host; strings.HasPrefix(s.value, "[") && strings.HasSuffix(s.value, "]") {
		set.host.value = s.value[1 : len(s.value)-1]
		if ip, _ := netip.ParseAddr(set.host.value); !ip.Is6() {
			faults = append(faults, s.refuse(errors.New("it must be a name or an address of this machine; only an IPv6 address may have brackets")))
		}
	}
	set.roundInterval = duration("ROUND_INTERVAL")
	set.broadcastInterval = duration("BROADCAST_INTERVAL")
	set.broadcastBlocks = number("BROADCAST_BLOCKS", 0, math.MaxInt)
	set.chainFile = get("CHAIN_FILE")
	set.maxValidators = number("MAX_VALIDATORS", 1, 1_000_000)
	set.maxPerAddress = number("MAX_PER_ADDRESS", 0, 1_000_000)
	set.maxStake = number("MAX_STAKE", 1, maxStake)
	return set, warnings, errors.Join(faults...)
}
