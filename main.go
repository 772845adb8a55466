// Proof-of-stake is a proof-of-stake lottery behind one TCP port.
//
// A validator connects with nc or telnet, stakes tokens and enters heart
// rates (BPM). Each BPM proposes a block. In every round one of the proposed
// blocks is drawn, with a chance in proportion to its validator's stake, joins
// the chain, and all validators hear whose it was.
//
// It takes no arguments. Its settings come from the environment, then from the
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
	"math"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/joho/godotenv"
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

Settings are read from the environment, then from the file .env in the working
directory, then from these defaults:

`

// envExample documents every setting and is where the defaults stand.
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
		fmt.Fprintf(os.Stderr, "proof-of-stake takes no arguments but -h, got %q\n", os.Args[1:])
		os.Exit(2)
	}
	logger := log.New(os.Stderr, "", log.LstdFlags)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)   // so that a second Ctrl-C kills
	signal.Ignore(syscall.SIGPIPE) // the validators stay when whoever reads the blocks does not
	if err := run(ctx, os.Stdout, logger); err != nil {
		logger.Fatal(err)
	}
}

// run is the server from its settings to its stop, which is when ctx is done or
// when the chain's file is not its own any more.
func run(ctx context.Context, stdout io.Writer, logger *log.Logger) error {
	set, err := readSettings()
	if err != nil {
		return err
	}
	port := strconv.Itoa(set.port)
	listener, err := net.Listen("tcp", net.JoinHostPort(set.host, port))
	if err != nil {
		return fmt.Errorf("cannot use %q for PORT with %q for HOST: want a free port of an address of this machine: %w",
			port, set.host, err)
	}
	chain, err := openBlockchain(set.chainFile, logger)
	if err != nil {
		return fmt.Errorf("cannot use %q for CHAIN_FILE: %w", set.chainFile, err)
	}
	logger.Printf("listening on %v; join with: nc %s %d", listener.Addr(),
		cmp.Or(set.host, "localhost"), listener.Addr().(*net.TCPAddr).Port)

	lottery := newLottery(chain, stdout, logger)
	lottery.roundInterval = set.roundInterval
	lottery.broadcastInterval = set.broadcastInterval
	lottery.broadcastBlocks = set.broadcastBlocks
	server := newServer(lottery, set.maxValidators, logger)

	// The server stops after the lottery, so that whatever is drawn is announced.
	serving, stopServing := context.WithCancel(context.Background())
	served := make(chan struct{})
	go func() {
		server.serve(serving, listener)
		close(served)
	}()
	err = lottery.run(ctx, server)
	if err == nil {
		logger.Print("shutting down")
	}
	stopServing()
	<-served
	return err
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
// directory; then .env.example. Its error has one line for each fault.
func readSettings() (settings, error) {
	defaults, err := godotenv.Unmarshal(envExample)
	if err != nil {
		return settings{}, fmt.Errorf(".env.example: %w", err)
	}
	dotenv, err := readDotenv()
	if err != nil {
		return settings{}, err
	}
	var faults []error
	get := func(key string) string {
		if value, set := os.LookupEnv(key); set {
			return value
		}
		if value, set := dotenv[key]; set {
			return value
		}
		return defaults[key]
	}
	number := func(key string, low, high int) int {
		n, err := strconv.Atoi(get(key))
		if err != nil || n < low || n > high {
			faults = append(faults, fmt.Errorf("cannot use %q for %s: want a whole number from %d to %d", get(key), key, low, high))
		}
		return n
	}
	duration := func(key string) time.Duration {
		d, err := time.ParseDuration(get(key))
		if err != nil || d < time.Millisecond {
			faults = append(faults, fmt.Errorf("cannot use %q for %s: want a duration of at least 1ms, such as 30s or 1m30s", get(key), key))
		}
		return d
	}
	set := settings{
		port:              number("PORT", 0, 65535),
		host:              get("HOST"),
		roundInterval:     duration("ROUND_INTERVAL"),
		broadcastInterval: duration("BROADCAST_INTERVAL"),
		broadcastBlocks:   number("BROADCAST_BLOCKS", 0, math.MaxInt),
		chainFile:         get("CHAIN_FILE"),
		maxValidators:     number("MAX_VALIDATORS", 1, 1_000_000),
	}
	return set, errors.Join(faults...)
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
	// With a line end at the very end, a last line without = is a fault as elsewhere.
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
