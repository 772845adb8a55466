package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/joho/godotenv"

	"proof-of-stake/internal/lineconn"
)

// The test binary can be the program, so that it is tested as users meet it, and
// the bare server that it is measured against.
func TestMain(m *testing.M) {
	run := map[string]func(){"the program": main, "bare": bareServer}[os.Getenv("TEST_BINARY_IS")]
	if run == nil {
		for _, s := range []os.Signal{os.Interrupt, syscall.SIGHUP} {
			if signal.Ignored(s) { // as by & in a script, or by nohup; the program is not to inherit that
				signal.Notify(make(chan os.Signal, 1), s)
			}
		}
		os.Exit(m.Run())
	}
	go func() { // standard input ends with the process of the tests, even if it is killed
		io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	run()
}

// program returns the program as a command in an empty directory, with no
// settings but env. With go test -cover, what it covers counts too.
func program(t testing.TB, env ...string) *exec.Cmd {
	self, err := os.Executable() // os.Args[0] may be relative to another directory
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.Dir = t.TempDir()
	cmd.Env = append([]string{
		"TEST_BINARY_IS=the program",
		"PATH=" + os.Getenv("PATH"),
		"GORACE=atexit_sleep_ms=0", // not a second for each
		"GOCOVERDIR=" + cmp.Or(flag.Lookup("test.gocoverdir").Value.String(), os.TempDir()),
	}, env...)
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	return cmd
}

// A process is the program running.
type process struct {
	*exec.Cmd
	address        string
	stdout, stderr buffer
	logged         chan struct{} // closed when stderr has all of it
}

// localhost may be 127.0.0.1 or ::1.
var listening = regexp.MustCompile(`listening on (\S+:[0-9]+); join with: nc \S+ [0-9]+`)

// waitLimit bounds what a test waits for the program, so that none hangs. It leaves room for
// a machine that is busy with something else.
const waitLimit = time.Minute

// cannotStart runs a program that should not start, and returns its exit status and both
// its outputs.
func cannotStart(t testing.TB, cmd *exec.Cmd) (status int, out string) {
	t.Helper()
	var both buffer
	cmd.Stdout, cmd.Stderr = &both, &both
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer time.AfterFunc(waitLimit, func() { cmd.Process.Kill() }).Stop()
	cmd.Wait()
	return cmd.ProcessState.ExitCode(), both.take()
}

// start starts the program on a free port and waits until it listens.
func start(t testing.TB, env ...string) *process {
	t.Helper()
	return startCommand(t, program(t, env...))
}

// startCommand is start for what program has returned.
func startCommand(t testing.TB, cmd *exec.Cmd) *process {
	t.Helper()
	cmd.Env = append([]string{"PORT=0", "HOST=localhost"}, cmd.Env...) // the later of two counts
	p := &process{Cmd: cmd, logged: make(chan struct{})}
	stderr, err := p.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if p.Stdout == nil {
		p.Stdout = &p.stdout
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Process.Kill()
		p.Wait()
	})
	defer time.AfterFunc(waitLimit, func() { p.Process.Kill() }).Stop()
	log := bufio.NewReader(stderr)
	logged := ""
	for p.address == "" {
		line, err := log.ReadString('\n')
		logged += line
		if err != nil {
			t.Fatalf("it does not listen on localhost within %v: %v; logged %s", waitLimit, err, logged)
		}
		if match := listening.FindStringSubmatch(line); match != nil {
			p.address = match[1]
		} else if strings.Contains(line, " a draw every ") {
			t.Fatalf("logged %s\nwant a line before that like %v", logged, listening)
		}
	}
	io.WriteString(&p.stderr, logged)
	go func() {
		io.Copy(&p.stderr, log)
		close(p.logged)
	}()
	return p
}

// A tcpClient is a connection to the program. Reading gives up waitLimit after dial.
type tcpClient struct {
	*net.TCPConn
	*bufio.Reader
}

// dial connects to the program.
func (p *process) dial(t testing.TB) tcpClient {
	t.Helper()
	conn, err := net.Dial("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(waitLimit))
	return tcpClient{conn.(*net.TCPConn), bufio.NewReader(conn)}
}

func (c tcpClient) Read(p []byte) (int, error) { return c.Reader.Read(p) }

// readUntil reads up to and including text.
func readUntil(t testing.TB, r io.ByteReader, text string) string {
	t.Helper()
	var received []byte
	for !bytes.HasSuffix(received, []byte(text)) {
		b, err := r.ReadByte()
		if err != nil {
			t.Fatalf("received %q at last, and then %v\nwant     %q", received[max(0, len(received)-1000):], err, text)
		}
		received = append(received, b)
	}
	return string(received)
}

// readMessage reads one message of the program: to the end of a prompt, or to the end of all.
func readMessage(r io.ByteReader) (message string, err error) {
	var received []byte
	for !bytes.HasSuffix(received, []byte(bpmPrompt)) && !bytes.HasSuffix(received, []byte(balancePrompt)) {
		b, err := r.ReadByte()
		if err != nil {
			return string(received), err
		}
		received = append(received, b)
	}
	return string(received), nil
}

// wantNext reads the next messages, broadcasts left out. Each of them must have the text in it,
// or else the test ends now, and not when nothing more comes. wantNext returns the last of them.
func wantNext(t testing.TB, r io.ByteReader, texts ...string) (last string) {
	t.Helper()
	for _, text := range texts {
		message, err := readMessage(r)
		for strings.HasPrefix(message, "\n[{") && err == nil {
			message, err = readMessage(r)
		}
		if !strings.Contains(message, text) {
			t.Fatalf("received %q, %v\nwant     %q in it", message, err, text)
		}
		last = message
	}
	return last
}

// sendLine sends a line.
func sendLine(t testing.TB, c tcpClient, line string) {
	t.Helper()
	if _, err := io.WriteString(c.TCPConn, line+"\n"); err != nil {
		t.Fatal(err)
	}
}

func TestProgram(t *testing.T) {
	t.Parallel()
	p := start(t, "ROUND_INTERVAL=300ms", "BROADCAST_INTERVAL=1s", "CHAIN_FILE=")
	one, two := p.dial(t), p.dial(t)
	wantNext(t, one, balancePrompt)
	sendLine(t, one, "100")
	winner := &testClient{address: addressPattern.FindString(wantNext(t, one, " stakes 100 tokens\n")), stake: 100}
	wantNext(t, two, balancePrompt)
	sendLine(t, two, "300")
	wantNext(t, two, " stakes 300 tokens\n")
	sendLine(t, one, "72")
	wantNext(t, one, winner.proposes(1, 72, 100, 0))
	for c, won := range map[tcpClient]string{one: winner.won(100), two: winner.wins(100)} {
		wantNext(t, c, won)
		text, err := readMessage(c)
		var chain []Block
		if err := errors.Join(err, json.Unmarshal([]byte(strings.TrimSuffix(text, bpmPrompt)), &chain)); err != nil || len(chain) != 2 {
			t.Errorf("received %q, %v, want a chain of two blocks", text, err)
		}
	}
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for _, c := range []tcpClient{one, two} {
		wantNext(t, c, shuttingDown)
		if _, err := c.ReadByte(); err != io.EOF {
			t.Errorf("after the last line: %v, want EOF", err)
		}
	}
	if err := p.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v, want exit status 0", err)
	}
	if out := p.stdout.take(); !regexp.MustCompile(`^\(main\.Block\) \{\n Index: \(int\) 0,\n(.*\n){5}\}\n` +
		`\(main\.Block\) \{\n Index: \(int\) 1,\n(.*\n){5}\}\n$`).MatchString(out) {
		t.Errorf("standard output is %s", out)
	}
}

// Killed at any moment, dozens of times, the program never loses a winner that
// it has announced.
func TestKill(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "chain.jsonl")
	winner := regexp.MustCompile("winning validator: ([0-9a-f]{64}) ")
	known, announced := 0, 0 // blocks before, winners in all
	for kills := 0; !t.Failed() && (kills < 24 || announced == 0 && kills < 240); kills++ {
		p := start(t, "ROUND_INTERVAL=2ms", "CHAIN_FILE="+file)
		received := make([]buffer, 3)
		var playing sync.WaitGroup
		for i := range received {
			conn, err := net.Dial("tcp", p.address)
			if err != nil {
				t.Fatal(err)
			}
			playing.Go(func() {
				defer conn.Close()
				r := bufio.NewReader(io.TeeReader(conn, &received[i]))
				for line := "100\n"; ; line = "72\n" {
					message, err := readMessage(r)
					if err != nil {
						return
					}
					if strings.HasPrefix(message, "\n") && !winner.MatchString(message) {
						t.Errorf("received %q\nwant     %v in it", message, winner)
						return
					}
					io.WriteString(conn, line)
				}
			})
		}
		life := time.Duration(1+kills/24) * 100 * time.Millisecond // more if the disk is too slow for that
		time.AfterFunc(rand.N(life), func() { p.Process.Kill() })
		p.Wait()
		playing.Wait()

		all := blocks(t, openCopy(t, file))
		for i := range received {
			next := known
			for _, match := range winner.FindAllStringSubmatch(received[i].take(), -1) {
				for next < len(all) && all[next].Validator != match[1] {
					next++
				}
				if next++; next > len(all) {
					t.Fatalf("kill %d: client %d received winner %s, which is not in the file at its place", kills, i, match[1])
				}
				announced++
			}
		}
		known = len(all)
	}
	if announced == 0 {
		t.Error("no winner was announced")
	}
	t.Logf("%d blocks, %d announcements", known, announced)
}

// The chain goes on where it stopped; a file that is damaged stops the start.
func TestRestart(t *testing.T) {
	t.Parallel()
	file, text := newChainFile(t, 3)
	p := start(t, "CHAIN_FILE="+file)
	p.Process.Signal(syscall.SIGINT)
	if err := p.Wait(); err != nil {
		t.Errorf("after SIGINT: %v, want exit status 0", err)
	}
	if out := p.stdout.take(); !strings.Contains(out, " Index: (int) 2,\n") || strings.Count(out, "Index") != 1 {
		t.Errorf("printed %s, want the newest block", out)
	}
	if !bytes.Equal(readFile(t, file), text) {
		t.Error("the file has changed")
	}

	text[len(text)-20] ^= 1
	writeFile(t, file, text)
	cmd := program(t, "PORT=0", "CHAIN_FILE="+file)
	out, _ := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "cannot use \""+file+"\" for CHAIN_FILE (from the environment): line 3: block 2 was changed: its contents hash to ") || bytes.Count(out, []byte("\n")) != 1 {
		t.Errorf("with a damaged file: %v, %s", cmd.ProcessState, out)
	}
	if !bytes.Equal(readFile(t, file), text) {
		t.Error("the damaged file has changed")
	}
}

// A server whose file is taken away says so and stops.
func TestFileTakenAway(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "chain.jsonl")
	p := start(t, "ROUND_INTERVAL=50ms", "CHAIN_FILE="+file)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	c := p.dial(t)
	sendLine(t, c, "100\n72")
	wantNext(t, c, balancePrompt, " stakes 100 tokens\n", " proposed with BPM 72", shuttingDown)
	<-p.logged
	p.Wait()
	if log := p.stderr.take(); p.ProcessState.ExitCode() != 1 || !strings.Contains(log, "the chain cannot go on: "+file+" was deleted while the server ran\n") {
		t.Errorf("%v, logged %s", p.ProcessState, log)
	}
}

// The log begins with the keys in .env that are no settings, the address, the chain and
// the intervals.
func TestStartIsLogged(t *testing.T) {
	t.Parallel()
	dotenv := "SECRET=hush\nROUND_INTERVALL=1s\nBROADCAST_INTERVAL=90s\n"
	file, _ := newChainFile(t, 3)
	for name, chain := range map[string]string{
		file: fmt.Sprintf("the chain is in %q; blocks: 3\n", file),
		"":   "the chain is in memory only, since CHAIN_FILE is empty\n",
	} {
		cmd := program(t, "CHAIN_FILE="+name)
		writeFile(t, filepath.Join(cmd.Dir, ".env"), []byte(dotenv))
		p := startCommand(t, cmd)
		p.Process.Signal(syscall.SIGTERM)
		<-p.logged
		p.Wait()
		const warning = " in .env is no setting; the settings are in .env.example, or: proof-of-stake -h\n"
		want := "warning: ROUND_INTERVALL" + warning + "warning: SECRET" + warning +
			"listening on " + p.address + "\n" + chain + "a draw every 30s, a broadcast of the chain every 1m30s\n" + "shutting down\n"
		got := regexp.MustCompile("(?m)^20../../.. ..:..:.. ").ReplaceAllString(p.stderr.take(), "")
		if got = regexp.MustCompile("; join with: .*").ReplaceAllString(got, ""); got != want {
			t.Errorf("logged %q, want %q", got, want)
		}
	}

	cmd := program(t, "PORT=high")
	writeFile(t, filepath.Join(cmd.Dir, ".env"), []byte(dotenv))
	if out, _ := cmd.CombinedOutput(); bytes.Count(out, []byte("\n")) != 1 || !bytes.Contains(out, []byte(`"high" for PORT`)) {
		t.Errorf("with a bad setting: %s", out)
	}
}

// A port that is in use stops the start before the file is touched.
func TestPortFirst(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	cmd := program(t, "HOST=localhost", fmt.Sprintf("PORT=%d", taken.Addr().(*net.TCPAddr).Port))
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Errorf("it started: %s", out)
	}
	if files, err := os.ReadDir(cmd.Dir); err != nil || len(files) != 0 {
		t.Errorf("%v, %v are in its directory", err, files)
	}
}

// A second server on the same file does not start, by whatever name it has the
// file, and harms neither the first nor the file. When the first one is gone, even by
// kill -9, the next one starts.
func TestSecondServer(t *testing.T) {
	t.Parallel()
	file, text := newChainFile(t, 3)
	link, hardLink := file+".link", file+".hard"
	if err := errors.Join(os.Symlink(file, link), os.Link(file, hardLink)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		first := start(t, "CHAIN_FILE="+file, "ROUND_INTERVAL=300ms")
		for _, name := range []string{file, link, hardLink} {
			cmd := program(t, "PORT=0", "CHAIN_FILE="+name)
			out, _ := cmd.CombinedOutput()
			want := fmt.Sprintf("cannot use %q for CHAIN_FILE (from the environment): another server uses it; give each its own\n", name)
			if cmd.ProcessState.ExitCode() != 1 || !strings.HasSuffix(string(out), want) || bytes.Count(out, []byte("\n")) != 1 {
				t.Errorf("%v, %s, want %s", cmd.ProcessState, out, want)
			}
		}
		if !bytes.Equal(readFile(t, file), text) {
			t.Error("the file has changed")
		}
		c := first.dial(t)
		sendLine(t, c, "100\n72")
		wantNext(t, c, balancePrompt, " stakes 100 tokens\n", " proposed with BPM 72", " (you) with 100 of 100 tokens\n")
		first.Process.Kill()
		first.Wait()
		text = readFile(t, file)
	}
}

// The program's limits are those of its settings.
func TestLimitsAreSet(t *testing.T) {
	t.Parallel()
	p := start(t, "CHAIN_FILE=", "MAX_STAKE=50", "MAX_VALIDATORS=2", "MAX_PER_ADDRESS=1")
	c := p.dial(t)
	wantNext(t, c, balancePrompt)
	wantNext(t, p.dial(t), tooMany)
	sendLine(t, c, "51")
	wantNext(t, c, badBalance(50, `"51"`))

	p = start(t, "CHAIN_FILE=", "MAX_VALIDATORS=1")
	wantNext(t, p.dial(t), balancePrompt)
	wantNext(t, p.dial(t), full)
}

// The places of one address, or of one /64, are its own. One is free again when its client has
// hung up and, if that has staked, its draw is over.
func TestPlacesOfAddresses(t *testing.T) {
	t.Parallel()
	p := start(t, "CHAIN_FILE=", "HOST=", "MAX_PER_ADDRESS=2", "ROUND_INTERVAL=300ms")
	_, port, _ := net.SplitHostPort(p.address)
	dial := func(from string) tcpClient {
		t.Helper()
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		to := "127.0.0.1"
		if strings.Contains(from, ":") {
			to = "::1"
		}
		conn, err := dialer.DialContext(t.Context(), "tcp", net.JoinHostPort(to, port))
		if errors.Is(err, syscall.EADDRNOTAVAIL) { // not every system has them all
			t.Skip(err)
		} else if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(waitLimit))
		return tcpClient{conn.(*net.TCPConn), bufio.NewReader(conn)}
	}
	addresses := []string{"127.0.0.1", "127.0.0.2"}
	if listener, err := net.Listen("tcp", "[::1]:0"); err == nil {
		listener.Close()
		addresses = append(addresses, "::1")
	}
	for _, from := range addresses {
		one, two := dial(from), dial(from)
		for _, c := range []tcpClient{one, two} {
			wantNext(t, c, balancePrompt)
		}
		wantNext(t, dial(from), tooMany)
		sendLine(t, one, "100\n72")
		wantNext(t, one, " stakes 100 tokens\n", " proposed with BPM 72")
		for _, c := range []tcpClient{one, two} {
			c.Close()
			received, end := "", time.Now().Add(waitLimit)
			for received != balancePrompt { // the server has to hear of it, and the draw to come
				if received != "" && received != tooMany || time.Now().After(end) {
					t.Fatalf("from %s after a hang-up: received %q, want %q", from, received, balancePrompt)
				}
				again := dial(from)
				if received, _ = readMessage(again); received == tooMany {
					again.Close() // or a hundred of them would be waited for
				}
			}
		}
		wantNext(t, dial(from), tooMany)
	}
	if log := p.stderr.peek(); !strings.Contains(log, " 127.0.0.2:") || !strings.Contains(log, " refused: too many connections from its address\n") {
		t.Errorf("logged %s", log)
	}
}

// signalAgainAndAgain has the program stop by the signal, which it then sends, while the program
// waits for a client to close, until it has ended. The error is that of Wait.
func signalAgainAndAgain(t *testing.T, signal os.Signal) (*process, error) {
	t.Helper()
	p := start(t, "CHAIN_FILE=")
	c := p.dial(t)
	wantNext(t, c, balancePrompt)
	p.Process.Signal(signal)
	wantNext(t, c, shuttingDown)
	go func() {
		for p.Process.Signal(signal) == nil { // the next may come before the first has been handled
			<-time.After(10 * time.Millisecond)
		}
	}()
	return p, p.Wait()
}

// A second Ctrl-C ends the program at once, even while it waits for clients.
func TestSecondInterrupt(t *testing.T) {
	t.Parallel()
	p, _ := signalAgainAndAgain(t, os.Interrupt)
	if status := p.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != syscall.SIGINT {
		t.Errorf("it ended with %v, want by the signal", p.ProcessState)
	}
}

// When its terminal is closed the program stops as by SIGTERM, however often it hears of it.
func TestHangup(t *testing.T) {
	t.Parallel()
	if _, err := signalAgainAndAgain(t, syscall.SIGHUP); err != nil {
		t.Errorf("after SIGHUP: %v, want exit status 0", err)
	}
}

// What nohup starts goes on when its terminal is closed, and stops on SIGTERM.
func TestNohup(t *testing.T) {
	t.Parallel()
	nohup, err := exec.LookPath("nohup")
	if err != nil {
		t.Skip(err)
	}
	cmd := program(t, "CHAIN_FILE=", "ROUND_INTERVAL=50ms")
	cmd.Args = []string{"nohup", cmd.Path}
	cmd.Path = nohup
	p := startCommand(t, cmd)
	p.Process.Signal(syscall.SIGHUP)
	win(t, p, 10)
	p.Process.Signal(syscall.SIGTERM)
	if err := p.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v, want exit status 0", err)
	}
}

// Until the server listens, a signal ends it at once, however long the start takes.
func TestSignalWhileStarting(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/proc/self/fd"); err != nil {
		t.Skip(err)
	}
	name, _ := newLongChainFile(t, 100_000)
	cmd := program(t, "PORT=0", "CHAIN_FILE="+name)
	var logged bytes.Buffer
	cmd.Stderr = &logged
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	reads := func() bool { // whether it has opened the chain's file
		files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", cmd.Process.Pid))
		return slices.ContainsFunc(files, func(file string) bool {
			opened, _ := os.Readlink(file)
			return opened == name
		})
	}
	for deadline := time.Now().Add(waitLimit); !reads(); <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not read the chain")
		}
	}
	cmd.Process.Signal(syscall.SIGTERM)
	cmd.Wait()
	if status := cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != syscall.SIGTERM || logged.Len() > 0 {
		t.Errorf("it ended with %v, want by the signal; logged %s", cmd.ProcessState, &logged)
	}
}

// What a script starts with & goes on after the Ctrl-C that its shell ignores for it, and
// stops on SIGTERM.
func TestInterruptInBackground(t *testing.T) {
	t.Parallel()
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Skip(err)
	}
	cmd := program(t, "CHAIN_FILE=", "ROUND_INTERVAL=50ms")
	// After & standard input is /dev/null, at the end of which the program of the tests ends.
	writeFile(t, filepath.Join(cmd.Dir, "script"), []byte(`exec 3<&0
sh -c 'echo $$ >pid; exec "$0"' "$1" <&3 &
wait $!
`))
	cmd.Args = []string{"sh", "script", cmd.Path}
	cmd.Path = shell
	p := startCommand(t, cmd)
	pid, err := strconv.Atoi(strings.TrimSpace(string(readFile(t, filepath.Join(p.Dir, "pid")))))
	if err != nil {
		t.Fatal(err)
	}
	server, err := os.FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	server.Signal(os.Interrupt)
	win(t, p, 10)
	server.Signal(syscall.SIGTERM)
	if err := p.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v, want exit status 0", err)
	}
}

// Nobody reads standard output, the log or either of them: the draws go on, and SIGTERM
// ends the program with exit status 0.
func TestOutputsAreNotRead(t *testing.T) {
	for name, unread := range map[string]struct{ stdout, log bool }{
		"stdout": {true, false},
		"log":    {false, true},
		"both":   {true, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, stdout, log := startUnread(t, never)
			var reading sync.WaitGroup
			var blocks, lines []byte
			if !unread.stdout {
				reading.Go(func() { blocks, _ = io.ReadAll(stdout) })
			}
			if !unread.log {
				reading.Go(func() { lines, _ = io.ReadAll(log) })
			}
			const draws = 1000 // a pipe holds some 200 blocks and 400 lines of the log
			win(t, p, draws)
			p.Process.Signal(syscall.SIGTERM)
			if err := p.Wait(); err != nil {
				t.Error(err)
			}
			reading.Wait()
			if unread.stdout {
				blocks, _ = io.ReadAll(stdout)
			}
			printed := wantBlocks(t, blocks)
			if unread.stdout == (printed == 1+draws) {
				t.Errorf("%d blocks were printed", printed)
			}
			if !unread.log {
				lost := fmt.Sprintf("blocks left out of standard output: %d; it was not read\n", 1+draws-printed)
				if strings.Contains(string(lines), lost) != unread.stdout || strings.Count(string(lines), " wins with ") != draws {
					t.Errorf("%d blocks were printed; logged %.300s … %s", printed, lines, lines[len(lines)-300:])
				}
			}
		})
	}
}

// What does not fit into the queues is left out whole, and counted in the log when it is
// read again.
func TestOutputsAreReadAgain(t *testing.T) {
	t.Parallel()
	p, stdout, log := startUnread(t, never)
	const draws = 2800
	win(t, p, draws)
	const disqualified = 1700
	for range disqualified {
		c := p.dial(t)
		bad := strings.Repeat("\x80", lineconn.MaxLine) // four times as long in the log
		sendLine(t, c, "1\n"+bad)
		wantNext(t, c, balancePrompt, " stakes 1 tokens\n", (&testClient{stake: 1}).forfeits(strconv.Quote(bad)))
		c.Close()
	}

	var blocks []byte
	var reading sync.WaitGroup
	reading.Go(func() { blocks, _ = io.ReadAll(stdout) })
	defer time.AfterFunc(waitLimit, func() { p.Process.Kill() }).Stop() // what is not logged does not come
	lines := readUntil(t, log, " left out of ")
	lines += readUntil(t, log, " left out of ") // in either order
	win(t, p, 1)                                // and all is as ever
	p.Process.Signal(syscall.SIGTERM)
	rest, _ := io.ReadAll(log)
	lines += string(rest)
	reading.Wait()
	if err := p.Wait(); err != nil {
		t.Error(err)
	}

	omitted := func(what string) int {
		match := regexp.MustCompile(what+": ([0-9]+); it was not read\n").FindAllStringSubmatch(lines, -1)
		if len(match) != 1 {
			t.Fatalf("the log says %d times how many %s, at last %s", len(match), what, lines[len(lines)-1000:])
		}
		n, _ := strconv.Atoi(match[0][1])
		return n
	}
	if printed, lost := wantBlocks(t, blocks), omitted("blocks left out of standard output"); printed+lost != 1+draws+1 {
		t.Errorf("%d blocks were printed and %d left out, want %d together", printed, lost, 1+draws+1)
	}
	// The joins, the wins, the disqualified, both lines about what is left out, the stop.
	want := 2 + draws + 1 + 2*disqualified + 2 + 1
	if logged, lost := strings.Count(lines, "\n"), omitted("lines left out of the log"); logged+lost != want {
		t.Errorf("%d lines were logged and %d left out, want %d together", logged, lost, want)
	}
	wantLines(t, lines)
}

// Another program that shares the outputs, as some do with the terminal, makes them
// non-blocking, and nobody reads them for a thousand draws. Then all is there.
func TestOutputsAreNonBlocking(t *testing.T) {
	if err := exec.Command("sh", "-c", makeNonBlocking).Run(); err != nil {
		t.Skip("no dd that can make its output non-blocking: ", err)
	}
	for name, nonBlocking := range map[string]moment{"before": beforeStart, "after": afterStart} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, stdout, log := startUnread(t, nonBlocking)
			const draws = 1000 // a pipe holds some 200 blocks and 400 lines of the log, the queues 2500
			win(t, p, draws)
			defer time.AfterFunc(waitLimit, func() { p.Process.Kill() }).Stop() // what is lost does not come
			readTo := func(r *bufio.Reader, text string) (read string) {
				for line, err := "", error(nil); err == nil && !strings.Contains(line, text); read += line {
					line, err = r.ReadString('\n')
				}
				return read
			}
			blocks := readTo(stdout, fmt.Sprintf(" Index: (int) %d,", draws))
			lines := readTo(log, fmt.Sprintf(" block %d: ", draws))
			p.Process.Signal(syscall.SIGTERM)
			rest, _ := io.ReadAll(stdout)
			if printed := wantBlocks(t, append([]byte(blocks), rest...)); printed != 1+draws {
				t.Errorf("%d blocks were printed, want %d", printed, 1+draws)
			}
			rest, _ = io.ReadAll(log)
			lines += string(rest)
			if won := strings.Count(lines, " wins with "); won != draws || strings.Contains(lines, "left out") {
				t.Errorf("%d draws were logged, want %d; logged at last %s", won, draws, lines[len(lines)-300:])
			}
			wantLines(t, lines)
			if err := p.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

// makeNonBlocking is a shell's command that makes its outputs non-blocking.
const makeNonBlocking = `dd if=/dev/null oflag=nonblock status=none && dd if=/dev/null oflag=nonblock status=none >&2`

// A moment is when the outputs of startUnread are made non-blocking.
type moment int

const (
	never moment = iota
	beforeStart
	afterStart
)

// startUnread starts the program, with rounds of 1 ms, and reads no more of its outputs
// than that it has started.
func startUnread(t *testing.T, nonBlocking moment) (p *process, stdout, log *bufio.Reader) {
	t.Helper()
	cmd := program(t, "PORT=0", "HOST=localhost", "CHAIN_FILE=", "ROUND_INTERVAL=1ms", "BROADCAST_INTERVAL=1h")
	if nonBlocking == beforeStart {
		cmd.Args = []string{"sh", "-c", makeNonBlocking + ` && exec "$0"`, cmd.Path}
		cmd.Path = "/bin/sh"
	}
	var readers []*bufio.Reader
	for _, output := range []*io.Writer{&cmd.Stdout, &cmd.Stderr} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		t.Cleanup(func() { r.Close() })
		*output = w
		readers = append(readers, bufio.NewReaderSize(r, 1000))
	}
	p = &process{Cmd: cmd}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.kill() })
	started := ""
	for range 3 { // the address, the chain, the intervals
		started += readUntil(t, readers[1], "\n")
	}
	match := listening.FindStringSubmatch(started)
	if want := " a draw every 1ms, a broadcast of the chain every 1h0m0s\n"; match == nil || !strings.HasSuffix(started, want) {
		t.Fatalf("logged %q\nwant %v and then %q", started, listening, want)
	}
	p.address = match[1]
	if nonBlocking == afterStart {
		sharing := exec.Command("sh", "-c", makeNonBlocking)
		sharing.Stdout, sharing.Stderr = cmd.Stdout, cmd.Stderr
		if err := sharing.Run(); err != nil {
			t.Fatal(err)
		}
	}
	return p, readers[0], readers[1]
}

// win has one validator win so many draws.
func win(t *testing.T, p *process, draws int) {
	t.Helper()
	c := p.dial(t)
	sendLine(t, c, "100")
	wantNext(t, c, balancePrompt, " stakes 100 tokens\n")
	for range draws {
		sendLine(t, c, "72")
		wantNext(t, c, " proposed with BPM 72", "(you)")
	}
}

// wantBlocks checks that the text is whole blocks in order, and returns how many.
func wantBlocks(t *testing.T, text []byte) int {
	t.Helper()
	block := regexp.MustCompile(`^\(main\.Block\) \{\n Index: \(int\) (\d+),\n(?: .*\n){5}\}\n`)
	count, last := 0, -1
	for len(text) > 0 {
		match := block.FindSubmatch(text)
		if match == nil {
			t.Fatalf("after %d blocks: %.1000q", count, text)
		}
		index, _ := strconv.Atoi(string(match[1]))
		if index <= last {
			t.Fatalf("block %d after block %d", index, last)
		}
		last = index
		count++
		text = text[len(match[0]):]
	}
	return count
}

// wantLines checks that the text is whole lines of the log.
func wantLines(t *testing.T, text string) {
	t.Helper()
	for _, line := range strings.SplitAfter(text, "\n") {
		if line != "" && !regexp.MustCompile(`^20../../.. ..:..:.. [[:print:]]+\n$`).MatchString(line) {
			t.Errorf("logged %q", line)
		}
	}
}

// The program goes on when nobody reads the blocks, as after | head.
func TestNobodyReadsTheBlocks(t *testing.T) {
	t.Parallel()
	reader, blocks, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	reader.Close()
	cmd := program(t, "ROUND_INTERVAL=300ms", "CHAIN_FILE=")
	cmd.Stdout = blocks
	p := startCommand(t, cmd)
	blocks.Close()
	c := p.dial(t)
	sendLine(t, c, "100\n72")
	wantNext(t, c, balancePrompt, " stakes 100 tokens\n", " proposed with BPM 72", "winning validator: ")
	p.Process.Signal(syscall.SIGTERM)
	<-p.logged
	if err := p.Wait(); err != nil {
		t.Error(err)
	}
	if log := p.stderr.take(); !strings.Contains(log, "blocks left out of standard output: 2; write /dev/stdout: broken pipe\n") {
		t.Errorf("logged %s", log)
	}
}

// A client that has half-closed and reads only seconds after the draw receives the winner
// and the end, and is not reset.
func TestHalfClosedReadsLate(t *testing.T) {
	t.Parallel()
	p := start(t, "CHAIN_FILE=", "ROUND_INTERVAL=200ms")
	other := p.dial(t)
	sendLine(t, other, "1")
	wantNext(t, other, balancePrompt, " stakes 1 tokens\n") // and it will hear of the first draw
	c := p.dial(t)
	sendLine(t, c, "100\n72")
	c.CloseWrite()
	wantNext(t, other, "winning validator: ")
	<-time.After(3 * time.Second)
	received, err := io.ReadAll(c)
	if err != nil || !strings.HasSuffix(string(received), " (you) with 100 of 100 tokens\n") {
		t.Errorf("received %q, %v", received, err)
	}
}

// However many come and go, no more descriptors are open than MAX_VALIDATORS, the hundred
// that are told that the server is full, and a few.
func TestDescriptorsAreBounded(t *testing.T) {
	t.Parallel()
	p := start(t, "CHAIN_FILE=", "MAX_VALIDATORS=50")
	before := p.files()
	if before == 0 {
		t.Skip("no /proc")
	}
	var storm sync.WaitGroup
	for i := range 4 {
		storm.Go(func() {
			for n := range 1000 {
				conn, err := net.Dial("tcp", p.address)
				if err != nil {
					t.Error(err)
					return
				}
				if n%4 == i {
					conn.(*net.TCPConn).CloseWrite() // and it is open until it has received the last line
					go io.Copy(io.Discard, conn)
				} else {
					conn.Close()
				}
			}
		})
	}
	ended := make(chan struct{})
	go func() {
		storm.Wait()
		close(ended)
	}()
	most := 0
	for open := true; open; {
		select {
		case <-ended:
			open = false
		default:
			most = max(most, p.files())
		}
	}
	if most -= before; most > 50+100+10 {
		t.Errorf("%d descriptors more than before were open", most)
	}
	// Those of the storm that are not accepted yet are gone soon, and everybody finds a place.
	for received := []byte(nil); string(received) != balancePrompt; {
		c := p.dial(t)
		c.CloseWrite()
		var err error
		if received, err = io.ReadAll(c); err != nil {
			t.Fatal(err)
		}
	}
}

// With no descriptors left those connected are served, and others when there is room.
func TestNoDescriptors(t *testing.T) {
	t.Parallel()
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Skip(err)
	}
	cmd := program(t, "ROUND_INTERVAL=500ms")
	cmd.Args = []string{"sh", "-c", `ulimit -n 40 && exec "$0"`, cmd.Path}
	cmd.Path = shell
	p := startCommand(t, cmd)
	connected := p.dial(t)
	sendLine(t, connected, "100")
	wantNext(t, connected, balancePrompt, " stakes 100 tokens\n")
	var others []net.Conn
	for range 60 {
		conn, err := net.Dial("tcp", p.address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		others = append(others, conn)
	}
	sendLine(t, connected, "72")
	wantNext(t, connected, " tokens so far, draw in ", "winning validator: ")
	for _, conn := range others[:40] {
		conn.Close()
	}
	for _, conn := range others[40:] {
		conn.SetDeadline(time.Now().Add(waitLimit))
		wantNext(t, bufio.NewReader(conn), balancePrompt)
	}
	if log := p.stderr.take(); !strings.Contains(log, "too many open files") {
		t.Errorf("logged %s", log)
	}
}

// In memory only there is no file.
func TestNoFile(t *testing.T) {
	t.Parallel()
	p := start(t, "CHAIN_FILE=")
	p.Process.Signal(syscall.SIGTERM)
	p.Wait()
	if files, err := os.ReadDir(p.Dir); err != nil || len(files) != 0 {
		t.Errorf("%v, %v are in its directory", err, files)
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	cmd := program(t)
	cmd.Args = append(cmd.Args, "-h")
	out, err := cmd.Output()
	if err != nil || !strings.Contains(string(out), "nc localhost 9000") || !strings.HasSuffix(string(out), envExample) {
		t.Errorf("-h: %v, %s", err, out)
	}
	cmd = program(t)
	cmd.Args = append(cmd.Args, "9000")
	out, err = cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 2 || string(out) != "proof-of-stake takes no arguments but -h, and was given [\"9000\"]; settings go before it, as in PORT=9100 proof-of-stake\n" {
		t.Errorf("with an argument: %v, %s", err, out)
	}
}

// What stops the start is said in one line, with exit status 1.
func TestCannotStart(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := fmt.Sprint(taken.Addr().(*net.TCPAddr).Port)
	if other, err := net.Listen("tcp", "localhost:9100"); err == nil { // if not, somebody else has it, which is as good
		defer other.Close()
	}
	for _, test := range []struct {
		env  []string
		want string
	}{
		{[]string{"PORT=high"}, `cannot use "high" for PORT (from the environment): it must be a whole number from 0 to 65535`},
		{[]string{"HOST=localhost", "PORT=" + port}, `cannot listen on port ` + port + `: it is in use; choose another: PORT=9100`},
		{[]string{"HOST=localhost", "PORT=9100"}, `cannot listen on port 9100: it is in use; choose another: PORT=9200`},
		{[]string{"PORT=0", "HOST=localhost", "CHAIN_FILE=none/x.jsonl"}, `cannot use "none/x.jsonl" for CHAIN_FILE (from the environment): no such file or directory`},
		{[]string{"PORT=0", "HOST=localhost", "CHAIN_FILE=a\x1b[31m/x.jsonl"}, `cannot use "a\x1b[31m/x.jsonl" for CHAIN_FILE (from the environment): no such file or directory`},
		{[]string{"PORT=0", "HOST=localhost", "CHAIN_FILE=/dev/null"}, `cannot use "/dev/null" for CHAIN_FILE (from the environment): it is not a regular file`},
		{[]string{"HOST=256.0.0.1"}, `cannot listen on port 9000 with "256.0.0.1" for HOST (from the environment), which must be a name or an address of this machine, or empty for all of them: "listen tcp: lookup 256.0.0.1: `},
		{[]string{"HOST=a\x1b[31mb"}, `cannot listen on port 9000 with "a\x1b[31mb" for HOST (from the environment), which must be `},
		{[]string{"HOST=fe80::1%a\x1b[31mb"}, `cannot listen on port 9000 with "fe80::1%a\x1b[31mb" for HOST (from the environment), which must be `},
	} {
		status, out := cannotStart(t, program(t, test.env...))
		if status != 1 || !strings.Contains(out, test.want) || strings.Count(out, "\n") != 1 || strings.Contains(out, "\x1b") {
			t.Errorf("%q: exit status %d, %q, want %s", test.env, status, out, test.want)
		}
	}
}

// HOST is named only if it is set, and another port is never the same.
func TestListenError(t *testing.T) {
	for _, test := range []struct {
		port int
		host string
		err  error
		want string
	}{
		{9000, "", syscall.EADDRINUSE, "cannot listen on port 9000: it is in use; choose another: PORT=9100"},
		{9100, "", syscall.Errno(10048), "cannot listen on port 9100: it is in use; choose another: PORT=9200"},
		{9000, "", syscall.EMFILE, "cannot listen on port 9000: bind: too many open files"},
		{80, "", syscall.EACCES, "cannot listen on port 80: bind: permission denied"},
		{9000, "he\tre", syscall.EADDRINUSE, "cannot listen on port 9000: it is in use; choose another: PORT=9100"},
		{9000, "he\tre", syscall.EADDRNOTAVAIL, `cannot listen on port 9000 with "he\tre" for HOST (from .env), which must be a name or an address of this machine, or empty for all of them: "bind: cannot assign requested address"`},
	} {
		set := settings{port: test.port, host: setting{"HOST", test.host, " (from .env)"}}
		if err := listenError(set, os.NewSyscallError("bind", test.err)); err.Error() != test.want {
			t.Errorf("%v\nwant %s", err, test.want)
		}
	}
}

// TestSoak has thousands of validators do anything at random, for as long as the
// environment's SOAK says.
func TestSoak(t *testing.T) {
	duration, err := time.ParseDuration(os.Getenv("SOAK"))
	if err != nil {
		t.Skip("SOAK is not set to a duration")
	}
	const bots = 2000
	file := filepath.Join(t.TempDir(), "chain.jsonl")
	p := start(t, "CHAIN_FILE="+file, "ROUND_INTERVAL=500ms", "BROADCAST_INTERVAL=2s", "BROADCAST_BLOCKS=100")

	// The observer receives every winner but takes no part; the others receive some.
	conn, err := net.Dial("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	observer := bufio.NewReader(conn)
	io.WriteString(conn, "1\n")
	wantNext(t, observer, balancePrompt, " stakes 1 tokens\n")
	var observed []string
	var observing sync.WaitGroup
	observing.Go(func() { observed = readWinners(observer) })
	var mu sync.Mutex
	var received [][]string // what each session of a bot has received
	files := p.files()
	run := func(d time.Duration) {
		ctx, stop := context.WithTimeout(t.Context(), d)
		defer stop()
		var running sync.WaitGroup
		for range bots {
			running.Go(func() {
				for ctx.Err() == nil {
					if winners := bot(ctx, p.address); len(winners) > 0 {
						mu.Lock()
						received = append(received, winners)
						mu.Unlock()
					}
				}
			})
		}
		running.Wait()
		for i := 0; p.files() > files && i < 300; i++ {
			time.Sleep(100 * time.Millisecond) // until all are gone
		}
	}

	run(duration / 4)
	memory := p.memory("VmRSS")
	t.Logf("after a quarter: %d MB, %d files, %d sessions received a winner", memory>>20, p.files(), len(received))
	run(duration * 3 / 4)
	t.Logf("at the end: %d MB, %d files, %d sessions received a winner", p.memory("VmRSS")>>20, p.files(), len(received))
	if p.files() != files {
		t.Errorf("%d files are open, want %d as before", p.files(), files)
	}
	if p.memory("VmRSS") > memory*5/4 && !raceEnabled() {
		t.Error("memory is not back where it was")
	}
	p.Process.Signal(syscall.SIGTERM)
	if err := p.Wait(); err != nil {
		t.Error(err)
	}
	observing.Wait()

	all := blocks(t, open(t, file))
	if len(observed) != len(all)-1 {
		t.Fatalf("%d winners were announced, the chain has %d", len(observed), len(all)-1)
	}
	text := ""
	for i, block := range all[1:] {
		if observed[i] != block.Validator {
			t.Fatalf("announcement %d is of %s, the block of %s", i, observed[i], block.Validator)
		}
		text += block.Validator + " "
	}
	for _, winners := range received {
		if !strings.Contains(text, strings.Join(winners, " ")) {
			t.Fatalf("these winners were announced in a row: %v", winners)
		}
	}
	t.Logf("%d blocks", len(all))
}

// raceEnabled reports whether the race detector is on, whose own memory grows.
func raceEnabled() bool {
	info, _ := debug.ReadBuildInfo()
	return slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// bot is one random session. It returns the winners that were announced to it.
func bot(ctx context.Context, address string) []string {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		time.Sleep(time.Second)
		return nil
	}
	defer conn.Close()
	end := time.Now().Add(time.Duration(rand.Int64N(int64(20 * time.Second))))
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) })()
	conn.SetDeadline(end)
	if rand.IntN(20) == 0 { // says nothing, reads nothing
		select {
		case <-ctx.Done():
		case <-time.After(time.Until(end)):
		}
		return nil
	}
	lines := []string{"100\n", "1\n72\n", "+5\r\n", "1000000000000\n\n\n", "abc\n", "\xff\x1b[2J\n", "7"}
	io.WriteString(conn, lines[rand.IntN(len(lines))])
	go func() {
		for ctx.Err() == nil && time.Now().Before(end) {
			time.Sleep(time.Duration(rand.Int64N(int64(2 * time.Second))))
			lines := []string{"72\n", "-1\n", "\n", "73\r\n74\r\n", "7", "3\n"}
			line := lines[rand.IntN(len(lines))]
			switch rand.IntN(50) {
			case 0:
				line = "junk\n"
			case 1:
				line = strings.Repeat("x", 100_000)
			case 2:
				line = strings.Repeat("72\n", 10_000)
			case 3:
				conn.(*net.TCPConn).CloseWrite()
				return
			case 4:
				conn.(*net.TCPConn).SetLinger(0)
				conn.Close()
				return
			}
			if _, err := io.WriteString(conn, line); err != nil {
				return
			}
		}
	}()
	return readWinners(bufio.NewReader(conn))
}

var winnerLine = regexp.MustCompile("^winning validator: ([0-9a-f]{64}) .*tokens\n$")

// readWinners reads to the end and returns the winners that were announced.
func readWinners(r *bufio.Reader) (winners []string) {
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return winners
		}
		if match := winnerLine.FindStringSubmatch(line); match != nil {
			winners = append(winners, match[1])
		}
	}
}

// memory returns what Linux says of the process's memory, in bytes.
func (p *process) memory(key string) int {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	_, value, _ := strings.Cut(string(status), key+":")
	kB := 0
	fmt.Sscan(value, &kB)
	return kB << 10
}

// files returns how many files the process has open.
func (p *process) files() int {
	files, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.Process.Pid))
	return len(files)
}

// cpu returns for how long the process's threads have run.
func (p *process) cpu() (total time.Duration) {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.Process.Pid))
	for _, thread := range threads {
		text, _ := os.ReadFile(thread)
		ns := 0
		fmt.Sscan(string(text), &ns)
		total += time.Duration(ns)
	}
	return total
}

var settingKeys = []string{"PORT", "HOST", "ROUND_INTERVAL", "BROADCAST_INTERVAL", "BROADCAST_BLOCKS", "CHAIN_FILE", "MAX_VALIDATORS", "MAX_PER_ADDRESS", "MAX_STAKE"}

// inDirectory has the rest of the test run in an empty directory with this .env,
// if it is not empty, and with no settings in the environment.
func inDirectory(t *testing.T, dotenv string) {
	t.Helper()
	t.Chdir(t.TempDir())
	for _, key := range settingKeys {
		t.Setenv(key, "") // so that it is restored
		os.Unsetenv(key)
	}
	if dotenv != "" {
		if err := os.WriteFile(".env", []byte(dotenv), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestDefaults(t *testing.T) {
	inDirectory(t, "")
	got, _, err := readSettings()
	want := settings{
		port:              9000,
		host:              setting{key: "HOST"},
		roundInterval:     30 * time.Second,
		broadcastInterval: time.Minute,
		broadcastBlocks:   3,
		chainFile:         setting{"CHAIN_FILE", "chain.jsonl", ""},
		maxValidators:     10000,
		maxStake:          1_000_000_000_000,
	}
	if err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	defaults, err := godotenv.Unmarshal(envExample)
	if err != nil || len(defaults) != len(settingKeys) {
		t.Errorf(".env.example has %d settings, want %d; %v", len(defaults), len(settingKeys), err)
	}
}

// What README.md, docs/ and .env.example give as defaults and limits is the program's.
func TestDocs(t *testing.T) {
	const readme, protocol, class, example = "README.md", "docs/protocol.md", "docs/class.md", ".env.example"
	texts := make(map[string]string)
	for _, name := range []string{readme, protocol, class, example} {
		texts[name] = string(readFile(t, name))
	}
	inDirectory(t, "")
	defaults, err := godotenv.Unmarshal(envExample)
	if err != nil {
		t.Fatal(err)
	}

	// A row of each setting, with its default and, in protocol.md, what is accepted.
	for _, key := range settingKeys {
		accepted := ""
		t.Setenv(key, "x")
		if _, _, err := readSettings(); err != nil {
			line := regexp.MustCompile("for " + key + " .*").FindString(err.Error())
			accepted = regexp.MustCompile("[0-9]+ to [0-9]+|at least 1ms").FindString(line)
		}
		os.Unsetenv(key)
		if key == "BROADCAST_BLOCKS" {
			accepted = "0 or more"
		} else if comment := commentOf(texts[example], key); !strings.Contains(comment, accepted) {
			t.Errorf("%s says of %s %q, but the program accepts %s", example, key, comment, accepted)
		}
		for _, name := range []string{readme, protocol} {
			row := regexp.MustCompile("(?m)^\\| `" + key + "` \\| ([^|]*) \\|(.*)").FindStringSubmatch(texts[name])
			if row == nil {
				t.Errorf("%s has no row for the setting %s", name, key)
			} else if want := cmp.Or(defaults[key], "empty"); row[1] != want {
				t.Errorf("%s gives %q as the default of %s, which is %s", name, row[1], key, want)
			} else if name == protocol && !strings.Contains(row[2], accepted) {
				t.Errorf("%s says of %s %q, but the program accepts %s", name, key, row[2], accepted)
			}
		}
	}

	// Each number in the place of N; at least one of the sentences is there.
	digits := func(n int) int { return len(strconv.Itoa(n)) }
	seconds := func(d time.Duration) string { return fmt.Sprint(math.Ceil(d.Seconds())) }
	for _, limit := range []struct {
		name, sentences string
		want            any
	}{
		{readme, "at most N digits", digits(maxBPM)},
		{class, "at most N digits", digits(maxBPM)},
		{protocol, "at most N digits|more than N digits|a BPM [|] N digits", digits(maxBPM)},
		{protocol, "A BPM is from −N to|A BPM is from −[0-9]+ to N", maxBPM},
		{readme, "whole number from 1 to N", maxStake},
		{protocol, "at most 10\\^N tokens", digits(maxStake) - 1},
		{protocol, "a line from a client[^|]*[|] N bytes|cut to N bytes", lineconn.MaxLine},
		{protocol, "too long as soon as it has N bytes", lineconn.MaxLine + 1},
		{protocol, "N messages|announcements and broadcasts that wait[^|]*[|] N", lineconn.MaxQueue},
		{protocol, "when N replies|replies that wait[^|]*[|] N", lineconn.MaxQueue},
		{protocol, "at most N clients|and N more that are told", maxRefusals},
		{protocol, "no token balance within N", balanceLimit},
		{protocol, "time for the stake [|] N minutes", balanceLimit.Minutes()},
		{protocol, "keep-alive for N s|The N seconds are the system's|without an acknowledgement [|] N seconds", seconds(lineconn.Timeout)},
		{protocol, "block[^.|]* has at most N bytes|a block in the file [|] N bytes", maxBlock},
		{protocol, "has not answered within N;", stopLimit},
		{protocol, "the stop [|] N seconds", seconds(stopLimit + flushLimit + flushLimit/4)},
		{readme, "nc localhost N", defaults["PORT"]},
	} {
		text := strings.Join(strings.Fields(texts[limit.name]), " ")
		pattern := regexp.MustCompile(strings.ReplaceAll(limit.sentences, "N", "([0-9][0-9.hms]*)"))
		matches := pattern.FindAllStringSubmatch(text, -1)
		if matches == nil {
			t.Errorf("%s does not say %q, which is %v", limit.name, limit.sentences, limit.want)
		}
		for _, match := range matches {
			if number := strings.Join(match[1:], ""); number != fmt.Sprint(limit.want) {
				t.Errorf("%s says %q, but it is %v", limit.name, match[0], limit.want)
			}
		}
	}
}

// commentOf returns the comment above a key in .env.example, as one line.
func commentOf(example, key string) string {
	above, _, _ := strings.Cut(example, "\n"+key+"=")
	comment := above[strings.LastIndex(above, "\n\n")+1:]
	return strings.Join(strings.Fields(strings.ReplaceAll(comment, "#", "")), " ")
}

// First the environment, then .env, then the defaults; set but empty is set.
func TestPrecedence(t *testing.T) {
	inDirectory(t, "PORT=1\nROUND_INTERVAL=1s\nCHAIN_FILE=mine.jsonl\nHOST=localhost\nMAX_PER_ADDRESS=7\nUNRELATED=x")
	t.Setenv("PORT", "2")
	t.Setenv("CHAIN_FILE", "")
	got, _, err := readSettings()
	want := settings{
		port:              2,
		host:              setting{"HOST", "localhost", " (from .env)"},
		roundInterval:     time.Second,
		broadcastInterval: time.Minute,
		broadcastBlocks:   3,
		chainFile:         setting{"CHAIN_FILE", "", " (from the environment)"},
		maxValidators:     10000,
		maxPerAddress:     7,
		maxStake:          1_000_000_000_000,
	}
	if err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
}

// HOST takes an IPv6 address with or without its brackets.
func TestBrackets(t *testing.T) {
	for value, want := range map[string]string{"::1": "::1", "[::1]": "::1", "[::1": "[::1", "::1]": "::1]", "[": "["} {
		inDirectory(t, "HOST="+value)
		if set, _, err := readSettings(); err != nil || set.host.value != want {
			t.Errorf("HOST=%s: %q, %v, want %q", value, set.host.value, err, want)
		}
	}
}

func TestBadSettings(t *testing.T) {
	const duration = ": it must be a duration of at least 1ms, such as 30s or 1m30s"
	const brackets = ": it must be a name or an address of this machine; only an IPv6 address may have brackets"
	for _, test := range []struct{ key, value, want string }{
		{"PORT", "", ": it must be a whole number from 0 to 65535"},
		{"PORT", "-1", ": it must be a whole number from 0 to 65535"},
		{"PORT", "65536", ": it must be a whole number from 0 to 65535"},
		{"PORT", "0x50", ": it must be a whole number from 0 to 65535"},
		{"ROUND_INTERVAL", "", duration},
		{"ROUND_INTERVAL", "0", duration},
		{"ROUND_INTERVAL", "-1s", duration},
		{"ROUND_INTERVAL", "30", duration},
		{"ROUND_INTERVAL", "999us", duration},
		{"BROADCAST_INTERVAL", "a minute\n", duration},
		{"BROADCAST_BLOCKS", "-1", ": it must be a whole number from 0 to 9223372036854775807"},
		{"MAX_VALIDATORS", "0", ": it must be a whole number from 1 to 1000000"},
		{"MAX_VALIDATORS", "1000001", ": it must be a whole number from 1 to 1000000"},
		{"MAX_PER_ADDRESS", "-1", ": it must be a whole number from 0 to 1000000"},
		{"MAX_PER_ADDRESS", "1000001", ": it must be a whole number from 0 to 1000000"},
		{"MAX_STAKE", "0", ": it must be a whole number from 1 to 1000000000000"},
		{"MAX_STAKE", "1000000000001", ": it must be a whole number from 1 to 1000000000000"},
		{"MAX_STAKE", "a\x1b[31m\u202eb", ": it must be a whole number from 1 to 1000000000000"},
		{"HOST", "[]", brackets},
		{"HOST", "[localhost]", brackets},
		{"HOST", "[127.0.0.1]", brackets},
		{"HOST", "[a\x1b[31mb]", brackets},
	} {
		t.Run(test.key+"="+test.value, func(t *testing.T) {
			inDirectory(t, "")
			t.Setenv(test.key, test.value)
			want := fmt.Sprintf("cannot use %q for %s (from the environment)%s", test.value, test.key, test.want)
			if _, _, err := readSettings(); err == nil || err.Error() != want {
				t.Errorf("%v, want %s", err, want)
			}
			os.Unsetenv(test.key)
			writeFile(t, ".env", []byte(test.key+"='"+test.value+"'\n"))
			want = fmt.Sprintf("cannot use %q for %s (from .env)%s", test.value, test.key, test.want)
			if _, _, err := readSettings(); err == nil || err.Error() != want {
				t.Errorf("%v, want %s", err, want)
			}
		})
	}
	t.Run("what cannot be in .env", func(t *testing.T) {
		inDirectory(t, "")
		t.Setenv("PORT", "9000\r")
		t.Setenv("HOST", "[a\x9b31mb]")
		want := `cannot use "9000\r" for PORT (from the environment): it must be a whole number from 0 to 65535` + "\n" + `cannot use "[a\x9b31mb]" for HOST (from the environment)` + brackets
		if _, _, err := readSettings(); err == nil || err.Error() != want {
			t.Errorf("%v\nwant %s", err, want)
		}
	})
	t.Run("two", func(t *testing.T) {
		inDirectory(t, "PORT=x")
		t.Setenv("MAX_VALIDATORS", "y")
		_, _, err := readSettings()
		if err == nil || strings.Count(err.Error(), "\n") != 1 || !strings.Contains(err.Error(), `"x" for PORT (from .env)`) || !strings.Contains(err.Error(), `"y" for MAX_VALIDATORS (from the environment)`) {
			t.Errorf("two faults: %v", err)
		}
	})
}

// Whatever a file is called is no fault, and what godotenv makes of a value is the value.
func TestFileNames(t *testing.T) {
	inDirectory(t, "")
	for _, name := range []string{"my chain (1).jsonl", "Prüfung\u00a01.jsonl", "u\u0308bung.jsonl", "第１\u3000課.jsonl", `C:\chain.jsonl`, "$PWD/x # y", "a\u200b\t\n\x1b[31m", "\xfc"} {
		t.Setenv("CHAIN_FILE", name)
		if set, _, err := readSettings(); err != nil || set.chainFile.value != name {
			t.Errorf("CHAIN_FILE=%q: %q, %v", name, set.chainFile.value, err)
		}
	}
	for written, want := range map[string]string{
		`C:\chain.jsonl`:         `C:\chain.jsonl`,
		`"C:\new.jsonl"`:         "C:\new.jsonl",
		"'a $PWD # \u202eb'":     "a $PWD # \u202eb",
		"$HOST-$PWD/x.jsonl":     "localhost-/x.jsonl",
		"   # in memory only":    "# in memory only",
		"a.jsonl\t# see note #5": "a.jsonl\t# see note",
		"a.jsonl # in class":     "a.jsonl",
	} {
		inDirectory(t, "HOST=localhost\nCHAIN_FILE="+written+"\n")
		if set, _, err := readSettings(); err != nil || set.chainFile != (setting{"CHAIN_FILE", want, " (from .env)"}) {
			t.Errorf("CHAIN_FILE=%s: %q, %v, want %q", written, set.chainFile, err, want)
		}
	}
}

// A fault in .env is named by its line, and nothing else of the file is shown.
func TestBadDotenv(t *testing.T) {
	for _, test := range []struct{ dotenv, want string }{
		{"PORT 9000", `cannot read .env: line 1 is not KEY=VALUE: "PORT 9000"`},
		{"SECRET=a\nPORT 9000\nSECRET=b\n", `cannot read .env: line 2 is not KEY=VALUE: "PORT 9000"`},
		{"SECRET=a\n\x1b[2J\nSECRET=b\n", `cannot read .env: line 2 is not KEY=VALUE: "\x1b[2J"`},
		{"\xff\xfeP\x00=\x001\x00", "cannot read .env: it is not in UTF-8, but perhaps in UTF-16; save it as UTF-8"},
		{"SECRET=hush\nPORT=${SECRET}x\n", `cannot use "hushx" for PORT (from .env): it must be a whole number from 0 to 65535`},
		{"PORT " + strings.Repeat("x", 100), `cannot read .env: line 1 is not KEY=VALUE: "PORT ` + strings.Repeat("x", 59) + `"`},
	} {
		inDirectory(t, test.dotenv)
		if _, _, err := readSettings(); err == nil || err.Error() != test.want {
			t.Errorf("%q: %v\nwant %s", test.dotenv, err, test.want)
		}
		if text := readFile(t, ".env"); string(text) != test.dotenv {
			t.Errorf("%q has become %q", test.dotenv, text)
		}
	}
}

// A key that is no setting is named, and nothing in it reaches a terminal unquoted.
func TestUnknownKeys(t *testing.T) {
	inDirectory(t, "PORT=1\nPROT\f2=hush\nHOTS=hush\n")
	_, warnings, err := readSettings()
	const rest = " in .env is no setting; the settings are in .env.example, or: proof-of-stake -h"
	if want := []string{"HOTS" + rest, `PROT\f2` + rest}; err != nil || !slices.Equal(warnings, want) {
		t.Errorf("%q, %v, want %q", warnings, err, want)
	}
}

// A .env that its editor has called otherwise gets a warning, also if the start fails.
func TestMisnamedDotenv(t *testing.T) {
	t.Parallel()
	for _, name := range []string{".env.txt", ".env.text"} {
		want := "warning: " + name + " is not read; to have its settings read, rename it to .env\n"
		cmd := program(t, "CHAIN_FILE=")
		file := filepath.Join(cmd.Dir, name)
		writeFile(t, file, []byte("ROUND_INTERVAL=1s\n"))
		p := startCommand(t, cmd)
		p.Process.Signal(syscall.SIGTERM)
		<-p.logged
		p.Wait()
		if log := p.stderr.take(); strings.Count(log, want) != 1 || !strings.Contains(log, "a draw every 30s") {
			t.Errorf("logged %s, want %s", log, want)
		}
		if text := readFile(t, file); string(text) != "ROUND_INTERVAL=1s\n" {
			t.Errorf("%s has become %q", name, text)
		}

		for _, setting := range []string{"HOST=256.0.0.1", "CHAIN_FILE=."} {
			cmd = program(t, "PORT=0", setting)
			writeFile(t, filepath.Join(cmd.Dir, name), []byte("ROUND_INTERVAL=1s\n"))
			if status, out := cannotStart(t, cmd); status != 1 || strings.Count(out, want) != 1 {
				t.Errorf("%s: exit status %d, logged %s, want %s", setting, status, out, want)
			}
		}

		cmd = program(t, "CHAIN_FILE=")
		for _, name := range []string{name, ".env"} {
			writeFile(t, filepath.Join(cmd.Dir, name), nil)
		}
		p = startCommand(t, cmd)
		p.Process.Signal(syscall.SIGTERM)
		<-p.logged
		p.Wait()
		if log := p.stderr.take(); strings.Contains(log, "warning") {
			t.Errorf("beside a .env: logged %s", log)
		}
	}
}

// HOST takes an IPv6 address with or without brackets; on an IPv4 address it is listened
// with IPv4 alone; the log says where HOST is from, and joins by the address listened on.
func TestHost(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ setting, want string }{ // %d is the port
		{"", "listening on [::]:%d; join with: nc localhost %d\n"},
		{"0.0.0.0", "listening on 0.0.0.0:%d; join with: nc 127.0.0.1 %d; HOST is \"0.0.0.0\" (from .env)\n"},
		{"::", "listening on [::]:%d; join with: nc localhost %d; HOST is \"::\" (from .env)\n"},
		{"127.0.0.1", "listening on 127.0.0.1:%d; join with: nc 127.0.0.1 %d; HOST is \"127.0.0.1\" (from .env)\n"},
		{"::ffff:127.0.0.1", "listening on 127.0.0.1:%d; join with: nc 127.0.0.1 %d; HOST is \"::ffff:127.0.0.1\" (from .env)\n"},
		{"localhost", "listening on 127.0.0.1:%d; join with: nc 127.0.0.1 %d; HOST is \"localhost\" (from .env)\n"},
		{"::1", "listening on [::1]:%d; join with: nc ::1 %d; HOST is \"::1\" (from .env)\n"},
		{"[::1]", "listening on [::1]:%d; join with: nc ::1 %d; HOST is \"::1\" (from .env)\n"},
	} {
		t.Run("HOST="+test.setting, func(t *testing.T) {
			t.Parallel()
			if strings.Contains(test.want, "[::") {
				listener, err := net.Listen("tcp", "[::1]:0")
				if err != nil {
					t.Skip(err)
				}
				listener.Close()
			}
			if addr, _ := net.ResolveIPAddr("ip", "localhost"); test.setting == "localhost" && addr.String() != "127.0.0.1" {
				t.Skipf("localhost is %v", addr)
			}
			cmd := program(t, "PORT=0", "CHAIN_FILE=")
			writeFile(t, filepath.Join(cmd.Dir, ".env"), []byte("HOST="+test.setting+"\n"))
			stderr, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			log := bufio.NewReader(stderr)
			line, _ := log.ReadString('\n')
			command := regexp.MustCompile(`join with: nc (\S+) (\d+)`).FindStringSubmatch(line)
			if command == nil {
				t.Fatalf("logged %q", line)
			}
			port, _ := strconv.Atoi(command[2])
			if want := fmt.Sprintf(test.want, port, port); !strings.HasSuffix(line, " "+want) {
				t.Errorf("logged %q, want %q", line, want)
			}
			others := ""
			for next := " from other machines: "; strings.Contains(next, " from other machines: "); others += next {
				next = readUntil(t, log, "\n")
			}
			if want := " the chain is in memory only, since CHAIN_FILE is empty\n"; !strings.HasSuffix(others, want) {
				t.Errorf("logged %q\nwant %q at its end", others, want)
			}
			commands := regexp.MustCompile(`from other machines: nc (\S+) (\d+)\n`).FindAllStringSubmatch(others, -1)
			address := netip.MustParseAddrPort(regexp.MustCompile(`listening on ([^;]+);`).FindStringSubmatch(line)[1])
			if addrs, _ := net.InterfaceAddrs(); len(commands) != len(reachable(address.Addr(), addrs)) || address.Addr().IsLoopback() && commands != nil {
				t.Errorf("listening on %v it logged %s", address, others)
			}
			for _, command := range append(commands, command) {
				conn, err := net.Dial("tcp", net.JoinHostPort(command[1], command[2]))
				if err != nil {
					t.Errorf("%q does not join: %v", command[0], err)
					continue
				}
				conn.Close()
			}
			cmd.Process.Signal(syscall.SIGTERM)
			io.Copy(io.Discard, log)
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

// parseAddrs returns the addresses of a machine's interfaces.
func parseAddrs(t *testing.T, text string) []net.Addr {
	t.Helper()
	addrs := []net.Addr{&net.UnixAddr{}} // of a kind that is not known yet
	for _, text := range strings.Fields(text) {
		ip, network, err := net.ParseCIDR(text)
		if err != nil {
			t.Fatal(err)
		}
		addrs = append(addrs, &net.IPNet{IP: ip, Mask: network.Mask})
	}
	return addrs
}

func TestReachable(t *testing.T) {
	for _, test := range []struct {
		listening string
		addrs     string // of the interfaces
		want      string
	}{
		{"::", "127.0.0.1/8 ::1/128 2001:db8::1/64 192.168.1.20/24 fe80::1/64 fd00::1/64 169.254.3.4/16 203.0.113.9/24", "[192.168.1.20 203.0.113.9]"},
		{"::", "127.0.0.1/8 ::1/128 fe80::1/64 fd00::1/64 169.254.3.4/16 2001:db8::1/64", "[fd00::1 2001:db8::1]"},
		{"::", "fd00::1/64 fd00::2/64 fd00::3/64 fd00::4/64 fd00::5/64 fd00::6/64", "[fd00::1 fd00::2 fd00::3 fd00::4 fd00::5]"},
		{"::", "fd00::1/64 fd00::2/64 fd00::3/64 fd00::4/64 fd00::5/64 fd00::6/64 10.0.0.1/8", "[10.0.0.1]"},
		{"0.0.0.0", "127.0.0.1/8 10.0.0.1/8", "[10.0.0.1]"},
		{"0.0.0.0", "127.0.0.1/8 fd00::1/64", "[]"},
		{"::", "127.0.0.1/8", "[]"},
		{"::", "10.0.0.1/8 10.0.0.2/8 10.0.0.3/8 10.0.0.4/8 10.0.0.5/8 10.0.0.6/8", "[10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.4 10.0.0.5]"},
		{"192.168.1.20", "192.168.1.20/24 10.0.0.1/8", "[192.168.1.20]"},
		{"fd00::1", "192.168.1.20/24 fd00::1/64", "[fd00::1]"},
		{"127.0.0.1", "127.0.0.1/8 10.0.0.1/8", "[]"},
		{"127.0.1.1", "127.0.0.1/8 10.0.0.1/8", "[]"},
		{"::1", "::1/128 10.0.0.1/8", "[]"},
		{"169.254.3.4", "169.254.3.4/16 10.0.0.1/8", "[]"},
		{"fe80::1%eth0", "fe80::1/64 10.0.0.1/8", "[]"},
	} {
		addrs := parseAddrs(t, test.addrs)
		if got := fmt.Sprint(reachable(netip.MustParseAddr(test.listening), addrs)); got != test.want {
			t.Errorf("listening on %s with %s: %s, want %s", test.listening, test.addrs, got, test.want)
		}
	}
}

// A setting is refused with where it is from, and its value is shown in quotes only.
func TestRefuse(t *testing.T) {
	pathError := &fs.PathError{Op: "open", Path: "a\x1b[31m", Err: syscall.EACCES}
	for _, test := range []struct {
		source string
		err    error
		want   string
	}{
		{" (from .env)", pathError, `cannot use "a\x1b[31m" for CHAIN_FILE (from .env): permission denied`},
		{"", fmt.Errorf("cannot go on: %w", pathError), `cannot use "a\x1b[31m" for CHAIN_FILE: permission denied`},
		{"", errors.New("line 1: it is empty"), `cannot use "a\x1b[31m" for CHAIN_FILE: line 1: it is empty`},
	} {
		if err := (setting{"CHAIN_FILE", "a\x1b[31m", test.source}).refuse(test.err); err.Error() != test.want {
			t.Errorf("%v\nwant %s", err, test.want)
		}
	}
}
