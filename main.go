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
// standard error. It stops on SIGINT and SIGTERM with exit status 0, and with 1
// after a fault that it cannot work around. During the start, and for the second time,
// these signals kill it.
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
	"unicode"
	"unicode/utf8"

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
minute gets the chain. The server prints each block that joins the chain on
standard output and its log on standard error. Ctrl-C stops it.

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
		switch os.Args[1] {
		case "-h", "-help", "--help":
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
	logWarnings := func() {
		for _, warning := range warnings {
			logger.Print("warning: " + warning)
		}
	}
	listener, err := listen(set)
	if err != nil {
		logWarnings() // the fault may come from a .env.txt that is not read
		return err
	}
	chain, err := openBlockchain(set.chainFile, set.broadcastBlocks, logger)
	if err != nil {
		logWarnings()
		return chainFileError(set, err)
	}
	ctx := untilSignal() // until here a signal kills: nothing else would end the wait for a name server or a disk
	logListening(set, listener.Addr().(*net.TCPAddr), logger)
	if set.chainFile == "" {
		logger.Print("the chain is in memory only, since CHAIN_FILE is empty")
	} else {
		logger.Printf("the chain is in %q; blocks: %d", set.chainFile, chain.head.Index+1)
	}
	logger.Printf("a draw every %v, a broadcast of the chain every %v", set.roundInterval, set.broadcastInterval)
	logWarnings()

	lottery := newLottery(chain, stdout, logger)
	lottery.roundInterval = set.roundInterval
	lottery.broadcastInterval = set.broadcastInterval
	server := newServer(lottery, set.maxValidators, logger)
	server.maxStake = set.maxStake
	return serve(ctx, lottery, server, listener)
}

// untilSignal returns a context that is done when the user stops the server. Before it is
// called, and once the context is done, a signal kills the process.
func untilSignal() context.Context {
	signals := []os.Signal{syscall.SIGTERM}
	if !signal.Ignored(os.Interrupt) { // as a script's shell has it for what it starts with &
		signals = append(signals, os.Interrupt)
	}
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	context.AfterFunc(ctx, stop)
	return ctx
}

// serve runs the lottery and the server until ctx is done or the chain is lost. Then the
// server tells all clients at once, also while a block is being written. serve waits for
// the disk and for the connections, but no longer than stopLimit.
func serve(ctx context.Context, lottery *lottery, server *server, listener net.Listener) error {
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
	var err error
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

// chainFileError says that the chain's file cannot be used. Where the system refuses the
// file, it also says where its name is from, and what to do.
func chainFileError(set settings, err error) error {
	var refused *fs.PathError
	source, remedy := "", ""
	if errors.As(err, &refused) || errors.Is(err, errNotRegular) {
		source = set.chainFileSource
	}
	switch {
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		remedy = "; let the user who starts the server write the file and its directory, or choose another file: CHAIN_FILE=FILE"
	case errors.Is(err, fs.ErrNotExist):
		remedy = "; make the directory first, or choose another file: CHAIN_FILE=FILE"
	}
	return fmt.Errorf("cannot use %q for CHAIN_FILE%s: %w%s", set.chainFile, source, err, remedy)
}

// WSAEADDRINUSE and WSAEACCES; package syscall's EADDRINUSE and EACCES are other numbers there.
const (
	windowsEADDRINUSE = syscall.Errno(10048)
	windowsEACCES     = syscall.Errno(10013)
)

// hostMust is what HOST must be.
const hostMust = "a name or an address of this machine, or empty for all of them"

// joinable reports whether a client can connect to the address: not if it is a multicast
// address, or the broadcast address of all networks or of one to which this machine's
// interfaces, whose addresses addrs are, belong.
func joinable(ip netip.Addr, addrs []net.Addr) bool {
	for _, addr := range addrs {
		network, _ := netip.ParsePrefix(addr.String())
		if ip.Is4() && network.Bits() < 31 && network.Contains(ip) && !network.Contains(ip.Next()) {
			return false
		}
	}
	return !ip.IsMulticast() && ip != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// listen listens on the port of the host, and on IPv4 alone if that is an IPv4 address.
func listen(set settings) (net.Listener, error) {
	network := "tcp"
	if addr, _ := netip.ParseAddr(set.host); addr.Unmap().Is4() {
		network = "tcp4"
	}
	listener, err := lineconn.Listen(network, net.JoinHostPort(set.host, strconv.Itoa(set.port)), lineconn.Timeout)
	if err != nil {
		return nil, listenError(set, err)
	}
	return listener, nil
}

// listenError says why the server cannot listen. HOST can be at fault only if it is set.
func listenError(set settings, err error) error {
	other := 9100
	if set.port == other {
		other = 9200
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE), errors.Is(err, windowsEADDRINUSE):
		return fmt.Errorf("cannot listen on port %d: it is in use; choose another: PORT=%d", set.port, other)
	case errors.Is(err, syscall.EACCES), errors.Is(err, windowsEACCES): // it is reserved
		return fmt.Errorf("cannot listen on port %d: %w; choose another: PORT=%d", set.port, err, other)
	case set.host != "":
		return fmt.Errorf("cannot listen on port %d with %q for HOST%s, which must be %s: %w", set.port, set.host, set.hostSource, hostMust, err)
	}
	return fmt.Errorf("cannot listen on port %d: %w", set.port, err)
}

// logListening logs the address listened on, and how to join: from this machine and, if
// that is possible, from others.
func logListening(set settings, address *net.TCPAddr, logger *log.Logger) {
	host, setting := "localhost", ""
	if set.host != "" {
		setting = fmt.Sprintf("; HOST is %q%s", set.host, set.hostSource)
		if !address.IP.IsUnspecified() {
			host = set.host
		} else if address.IP.To4() != nil {
			host = "127.0.0.1" // localhost may be ::1 alone
		}
	}
	logger.Printf("listening on %v; join with: nc %s %d%s", address, host, address.Port, setting)
	addrs, _ := net.InterfaceAddrs() // without them, nothing is said of other machines
	for _, host := range reachable(address.IP, addrs) {
		logger.Printf("from other machines: nc %s %d", host, address.Port)
	}
}

// reachable returns the addresses at which other machines reach a server that listens on
// ip: that one, or the IPv4 addresses among addrs, which are those of this machine's
// interfaces, but no more than five, if the server listens on all.
func reachable(ip net.IP, addrs []net.Addr) (hosts []string) {
	if !ip.IsUnspecified() {
		addrs = []net.Addr{&net.IPNet{IP: ip}}
	}
	for _, addr := range addrs {
		network, ok := addr.(*net.IPNet)
		if !ok || !network.IP.IsGlobalUnicast() || ip.IsUnspecified() && network.IP.To4() == nil || len(hosts) == 5 {
			continue
		}
		hosts = append(hosts, network.IP.String())
	}
	return hosts
}

// settings are explained in .env.example.
type settings struct {
	port              int
	host              string // without the brackets of an IPv6 address
	hostSource        string // as readSettings has it
	roundInterval     time.Duration
	broadcastInterval time.Duration
	broadcastBlocks   int
	chainFile         string
	chainFileSource   string
	maxValidators     int
	maxStake          int // tokens
}

// visible reports whether value is UTF-8 in which each character shows and none drives a
// terminal. The system's errors show HOST and CHAIN_FILE unquoted, and two names that look
// alike would be two chains.
func visible(value string) bool {
	return utf8.ValidString(value) && !strings.ContainsFunc(value, func(r rune) bool { return !unicode.IsGraphic(r) })
}

// readSettings takes each setting from the nearest place that has it: first the
// environment, that is, whoever starts the server; then .env, which belongs to the
// directory; then .env.example. A source says which it was, and is empty for the last. The
// warnings are for the log. The error has one line for each fault.
//
// A value that godotenv would change is refused, but only of a setting that is used: the
// rest of .env may belong to other programs.
func readSettings() (set settings, warnings []string, err error) {
	defaults, err := godotenv.Unmarshal(envExample)
	if err != nil {
		return settings{}, nil, fmt.Errorf(".env.example: %w", err)
	}
	values, changed, err := dotenv.Read(".env")
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

	const fromEnvironment, fromDotenv = " (from the environment)", " (from .env)"
	var faults []error
	// get gives the value of the key to use, which reports whether it can be used, and
	// returns its source. must says, after a fault, what the value must be.
	get := func(key, must string, use func(value string) bool) (source string) {
		value := defaults[key]
		if v, ok := values[key]; ok {
			value, source = v, fromDotenv
		}
		if v, ok := os.LookupEnv(key); ok {
			value, source = v, fromEnvironment
		}
		if written, ok := changed[key]; ok && source == fromDotenv {
			// Quoted for the terminal, and otherwise as it is in the file.
			quoted := strings.NewReplacer(`\\`, `\`, `\"`, `"`).Replace(strconv.Quote(written))
			faults = append(faults, fmt.Errorf("cannot use %s for %s%s: %s; $, \\ and # have a meaning there, so put the value in single quotes to keep them", quoted, key, source, must))
		} else if !use(value) || !visible(value) {
			faults = append(faults, fmt.Errorf("cannot use %q for %s%s: %s", value, key, source, must))
		}
		return source
	}
	number := func(key string, low, high int) (n int) {
		get(key, fmt.Sprintf("it must be a whole number from %d to %d", low, high), func(value string) bool {
			var err error
			n, err = strconv.Atoi(value)
			return err == nil && low <= n && n <= high
		})
		return n
	}
	duration := func(key string) (d time.Duration) {
		get(key, "it must be a duration of at least 1ms, such as 30s or 1m30s", func(value string) bool {
			var err error
			d, err = time.ParseDuration(value)
			return err == nil && d >= time.Millisecond
		})
		return d
	}
	set.port = number("PORT", 0, 65535)
	set.hostSource = get("HOST", "it must be "+hostMust+"; only an IPv6 address may have brackets, and a multicast or broadcast address cannot be joined", func(value string) bool {
		set.host = value
		if strings.HasPrefix(value, "[") && strings.HasSuffix(value, "]") {
			set.host = value[1 : len(value)-1]
		}
		ip, _ := netip.ParseAddr(set.host)
		addrs, _ := net.InterfaceAddrs() // without them, its broadcast addresses are not known
		return joinable(ip.Unmap(), addrs) && (ip.Is6() || set.host == value)
	})
	set.roundInterval = duration("ROUND_INTERVAL")
	set.broadcastInterval = duration("BROADCAST_INTERVAL")
	set.broadcastBlocks = number("BROADCAST_BLOCKS", 0, math.MaxInt)
	set.chainFileSource = get("CHAIN_FILE", "it must be a file name of visible characters and blanks, or empty", func(value string) bool {
		set.chainFile = value
		return true
	})
	set.maxValidators = number("MAX_VALIDATORS", 1, 1_000_000)
	set.maxStake = number("MAX_STAKE", 1, maxStake)
	return set, warnings, errors.Join(faults...)
}
