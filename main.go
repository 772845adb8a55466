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
// after a fault that it cannot work around.
package main

import (
	"cmp"
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
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/joho/godotenv"

	"proof-of-stake/internal/asyncwriter"
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
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)   // so that a second Ctrl-C kills
	signal.Ignore(syscall.SIGPIPE) // so that writing to a closed pipe is an error

	var notices *log.Logger // room in the log for what was left out of both
	leftOut := func(what string) func(int, error) {
		return func(writes int, reason error) { notices.Printf("%s: %d; %v", what, writes, reason) }
	}
	stderr := asyncwriter.New(os.Stderr, leftOut("lines left out of the log"))
	stdout := asyncwriter.New(os.Stdout, leftOut("blocks left out of standard output"))
	notices = log.New(stderr.Notices(), "", log.LstdFlags)
	logger := log.New(stderr, "", log.LstdFlags)
	err := run(ctx, stdout, logger)
	if err != nil {
		logger.Print(err)
	}
	deadline := time.Now().Add(flushLimit)
	stdout.Flush(deadline)
	stderr.Flush(deadline.Add(flushLimit / 10)) // later, since stdout.Flush may have logged
	if err != nil {
		os.Exit(1)
	}
}

const (
	stopLimit  = 3500 * time.Millisecond // from the stop until the connections and the disk are waited for no longer
	flushLimit = time.Second             // from then to the end of the outputs
)

// errNoAnswer is why a stop did not wait for the lottery.
var errNoAnswer = fmt.Errorf("the disk has not answered within %v; the block that was being written may be in the file, but it was not announced", stopLimit)

// run reads the settings and runs the server until ctx is done or the chain is lost.
func run(ctx context.Context, stdout io.Writer, logger *log.Logger) error {
	set, unknown, err := readSettings()
	if err != nil {
		return err
	}
	listener, err := listen(set.host, set.port)
	if err != nil {
		return err
	}
	chain, err := openBlockchain(set.chainFile, set.broadcastBlocks, logger)
	if err != nil {
		return fmt.Errorf("cannot use %q for CHAIN_FILE: %w", set.chainFile, err)
	}
	logger.Printf("listening on %v; join with: nc %s %d", listener.Addr(),
		cmp.Or(set.host, "localhost"), listener.Addr().(*net.TCPAddr).Port)
	if set.chainFile == "" {
		logger.Print("the chain is in memory only, since CHAIN_FILE is empty")
	} else {
		logger.Printf("the chain is in %q; blocks: %d", set.chainFile, chain.head.Index+1)
	}
	logger.Printf("a draw every %v, a broadcast of the chain every %v", set.roundInterval, set.broadcastInterval)
	for _, key := range unknown {
		logger.Printf("warning: %s in .env is no setting; the settings are in .env.example, or: proof-of-stake -h", key)
	}

	lottery := newLottery(chain, stdout, logger)
	lottery.roundInterval = set.roundInterval
	lottery.broadcastInterval = set.broadcastInterval
	return serve(ctx, lottery, newServer(lottery, set.maxValidators, logger), listener)
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

// windowsEADDRINUSE is WSAEADDRINUSE; package syscall's EADDRINUSE is another number there.
const windowsEADDRINUSE = syscall.Errno(10048)

// listen listens on the port of the host.
func listen(host string, port int) (net.Listener, error) {
	listener, err := lineconn.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)), lineconn.Timeout)
	switch {
	case errors.Is(err, syscall.EADDRINUSE), errors.Is(err, windowsEADDRINUSE):
		other := 9100
		if port == other {
			other = 9200
		}
		return nil, fmt.Errorf("cannot listen on port %d: it is in use; choose another: PORT=%d", port, other)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("cannot listen on port %d: %w; choose another: PORT=9000", port, err)
	case err != nil:
		return nil, fmt.Errorf("cannot listen on port %d with %q for HOST, which must be a name or an address of this machine, or empty for all of them: %w", port, host, err)
	}
	return listener, nil
}

// settings are explained in .env.example.
type settings struct {
	port              int
	host              string
	roundInterval     time.Duration
	broadcastInterval time.Duration
	broadcastBlocks   int
	chainFile         string
	maxValidators     int
}

// readSettings takes each setting from the nearest place that has it: first the
// environment, that is, whoever starts the server; then .env, which belongs to the
// directory; then .env.example. unknown are the keys in .env that are no settings. The
// error has one line for each fault.
func readSettings() (set settings, unknown []string, err error) {
	defaults, err := godotenv.Unmarshal(envExample)
	if err != nil {
		return settings{}, nil, fmt.Errorf(".env.example: %w", err)
	}
	dotenv, err := readDotenv()
	if err != nil {
		return settings{}, nil, err
	}
	for _, key := range slices.Sorted(maps.Keys(dotenv)) {
		if _, known := defaults[key]; !known {
			unknown = append(unknown, key)
		}
	}
	var faults []error
	get := func(key string) string {
		if value, ok := os.LookupEnv(key); ok {
			return value
		}
		if value, ok := dotenv[key]; ok {
			return value
		}
		return defaults[key]
	}
	number := func(key string, low, high int) int {
		n, err := strconv.Atoi(get(key))
		if err != nil || n < low || n > high {
			faults = append(faults, fmt.Errorf("cannot use %q for %s: it must be a whole number from %d to %d", get(key), key, low, high))
		}
		return n
	}
	duration := func(key string) time.Duration {
		d, err := time.ParseDuration(get(key))
		if err != nil || d < time.Millisecond {
			faults = append(faults, fmt.Errorf("cannot use %q for %s: it must be a duration of at least 1ms, such as 30s or 1m30s", get(key), key))
		}
		return d
	}
	set = settings{
		port:              number("PORT", 0, 65535),
		host:              get("HOST"),
		roundInterval:     duration("ROUND_INTERVAL"),
		broadcastInterval: duration("BROADCAST_INTERVAL"),
		broadcastBlocks:   number("BROADCAST_BLOCKS", 0, math.MaxInt),
		chainFile:         get("CHAIN_FILE"),
		maxValidators:     number("MAX_VALIDATORS", 1, 1_000_000),
	}
	return set, unknown, errors.Join(faults...)
}

// readDotenv reads .env, if there is one. godotenv's own error would quote the
// rest of the file, secrets and all; this one shows the line at fault.
func readDotenv() (map[string]string, error) {
	text, err := os.ReadFile(".env")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read .env: %w", err)
	}
	// Without a newline at its end, godotenv would accept a last line without =.
	env, err := godotenv.UnmarshalBytes(append(text, '\n'))
	if err == nil {
		return env, nil
	}
	lines := strings.SplitAfter(string(text)+"\n", "\n")
	good := len(lines) - 1
	for ; good > 0; good-- {
		if _, err := godotenv.Unmarshal(strings.Join(lines[:good], "")); err == nil {
			break
		}
	}
	return nil, fmt.Errorf("cannot read .env: line %d is not KEY=VALUE: %q", good+1, strings.TrimSpace(lines[good]))
}
