package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/joho/godotenv"
)

// The test binary can be the program, so that it is tested as users meet it.
func TestMain(m *testing.M) {
	if os.Getenv("BE_PROOF_OF_STAKE") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// program returns the program as a command in an empty directory, with no
// settings but env.
func program(t testing.TB, env ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Dir = t.TempDir()
	cmd.Env = append([]string{"BE_PROOF_OF_STAKE=1", "PATH=" + os.Getenv("PATH")}, env...)
	return cmd
}

// A process is the program running.
type process struct {
	*exec.Cmd
	address        string
	stdout, stderr buffer
	logged         chan struct{} // closed when stderr has all of it
}

var listening = regexp.MustCompile(`listening on (127\.0\.0\.1:[0-9]+); join with: nc localhost [0-9]+\n`)

// start starts the program on a free port and waits until it listens.
func start(t testing.TB, env ...string) *process {
	t.Helper()
	p := &process{Cmd: program(t, append(env, "PORT=0", "HOST=localhost")...), logged: make(chan struct{})}
	stderr, err := p.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.Stdout = &p.stdout
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Process.Kill()
		p.Wait()
	})
	log := bufio.NewReader(stderr)
	for p.address == "" {
		line, err := log.ReadString('\n')
		if err != nil {
			t.Fatalf("it does not listen: %v", err)
		}
		if match := listening.FindStringSubmatch(line); match != nil {
			p.address = match[1]
		}
	}
	go func() {
		io.Copy(&p.stderr, log)
		close(p.logged)
	}()
	return p
}

// dial connects to the program; a read that takes 20 seconds is given up.
func (p *process) dial(t testing.TB) *bufio.ReadWriter {
	t.Helper()
	conn, err := net.Dial("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriterSize(conn, 0))
}

// readUntil reads up to and including text.
func readUntil(t testing.TB, r io.ByteReader, text string) string {
	t.Helper()
	var heard []byte
	for !bytes.HasSuffix(heard, []byte(text)) {
		b, err := r.ReadByte()
		if err != nil {
			t.Fatalf("heard %q and then %v, want %q", heard, err, text)
		}
		heard = append(heard, b)
	}
	return string(heard)
}

// say sends a line.
func say(t testing.TB, c *bufio.ReadWriter, line string) {
	t.Helper()
	c.WriteString(line + "\n")
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
}

func TestProgram(t *testing.T) {
	p := start(t, "ROUND_INTERVAL=300ms", "BROADCAST_INTERVAL=1s", "CHAIN_FILE=")
	one, two := p.dial(t), p.dial(t)
	readUntil(t, one, "Enter token balance:")
	say(t, one, "100")
	heard := readUntil(t, one, "\n\nEnter a new BPM:")
	address := strings.Fields(heard)[1]
	say(t, two, "300")
	readUntil(t, two, " stakes 300 tokens\n\nEnter a new BPM:")
	say(t, one, "72")
	readUntil(t, one, "block 1 proposed, draw in 0s\n\nEnter a new BPM:")
	for _, c := range []*bufio.ReadWriter{one, two} {
		readUntil(t, c, "\nwinning validator: "+address+"\n\nEnter a new BPM:")
		text := readUntil(t, c, "]\n\nEnter a new BPM:")
		var chain []Block
		if err := json.Unmarshal([]byte(strings.TrimSuffix(text, bpmPrompt)), &chain); err != nil || len(chain) != 2 {
			t.Errorf("%v in %q", err, text)
		}
	}
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*bufio.ReadWriter{one, two} {
		readUntil(t, c, "\nserver shutting down\n")
		if _, err := c.ReadByte(); err != io.EOF {
			t.Errorf("after the last words: %v, want EOF", err)
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
// anybody has heard of.
func TestKill(t *testing.T) {
	file := filepath.Join(t.TempDir(), "chain.jsonl")
	winner := regexp.MustCompile("winning validator: ([0-9a-f]{64})\n")
	known, heardOf := 0, 0 // blocks before, winners in all
	for kills := range 36 {
		p := start(t, "ROUND_INTERVAL=2ms", "CHAIN_FILE="+file)
		heard := make([]buffer, 3)
		var playing sync.WaitGroup
		for i := range heard {
			conn, err := net.Dial("tcp", p.address)
			if err != nil {
				t.Fatal(err)
			}
			playing.Go(func() {
				defer conn.Close()
				r := bufio.NewReader(io.TeeReader(conn, &heard[i]))
				for line := "100\n"; ; line = "72\n" {
					if _, err := r.ReadString(':'); err != nil {
						return
					}
					io.WriteString(conn, line)
				}
			})
		}
		time.AfterFunc(time.Duration(rand.Int64N(int64(100*time.Millisecond))), func() { p.Process.Kill() })
		p.Wait()
		playing.Wait()

		all := blocks(t, open(t, file))
		for i := range heard {
			next := known
			for _, match := range winner.FindAllStringSubmatch(heard[i].take(), -1) {
				for next < len(all) && all[next].Validator != match[1] {
					next++
				}
				if next++; next > len(all) {
					t.Fatalf("kill %d: client %d has heard of %s, which is not in the file at its place", kills, i, match[1])
				}
				heardOf++
			}
		}
		known = len(all)
	}
	if heardOf == 0 {
		t.Error("no winner was heard of")
	}
	t.Logf("%d blocks, %d announcements", known, heardOf)
}

// The chain goes on where it stopped; a file that is damaged stops the start.
func TestRestart(t *testing.T) {
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
	if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), "cannot use the chain in CHAIN_FILE: "+file+", line 3: its Hash is ") || bytes.Count(out, []byte("\n")) != 1 {
		t.Errorf("with a damaged file: %v, %s", cmd.ProcessState, out)
	}
	if !bytes.Equal(readFile(t, file), text) {
		t.Error("the damaged file has changed")
	}
}

// A server whose file is taken away says so and stops.
func TestFileTakenAway(t *testing.T) {
	file := filepath.Join(t.TempDir(), "chain.jsonl")
	p := start(t, "ROUND_INTERVAL=50ms", "CHAIN_FILE="+file)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	c := p.dial(t)
	say(t, c, "100\n72")
	heard := readUntil(t, c, "\nserver shutting down\n")
	if strings.Contains(heard, "winning") {
		t.Errorf("heard %q", heard)
	}
	<-p.logged
	p.Wait()
	if log := p.stderr.take(); p.ProcessState.ExitCode() != 1 || !strings.Contains(log, "the chain cannot go on: stat "+file+": no such file") {
		t.Errorf("%v, logged %s", p.ProcessState, log)
	}
}

// In memory only there is no file.
func TestNoFile(t *testing.T) {
	p := start(t, "CHAIN_FILE=")
	p.Process.Signal(syscall.SIGTERM)
	p.Wait()
	if files, err := os.ReadDir(p.Dir); err != nil || len(files) != 0 {
		t.Errorf("%v, %v are in its directory", err, files)
	}
}

func TestHelp(t *testing.T) {
	cmd := program(t)
	cmd.Args = append(cmd.Args, "-h")
	out, err := cmd.Output()
	if err != nil || !strings.Contains(string(out), "nc localhost 9000") || !strings.HasSuffix(string(out), envExample) {
		t.Errorf("-h: %v, %s", err, out)
	}
	cmd = program(t)
	cmd.Args = append(cmd.Args, "9000")
	out, err = cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 2 || string(out) != "proof-of-stake takes no arguments but -h, got [\"9000\"]\n" {
		t.Errorf("with an argument: %v, %s", err, out)
	}
}

// What stops the start is said in one line, with exit status 1.
func TestCannotStart(t *testing.T) {
	taken, err := net.Listen("tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := fmt.Sprint(taken.Addr().(*net.TCPAddr).Port)
	for _, test := range []struct {
		env  []string
		want string
	}{
		{[]string{"PORT=high"}, `cannot use "high" for PORT: want a whole number from 0 to 65535`},
		{[]string{"HOST=localhost", "PORT=" + port}, "cannot listen on PORT " + port + ` of HOST "localhost", which must be`},
		{[]string{"HOST=256.0.0.1"}, `cannot listen on PORT 9000 of HOST "256.0.0.1", which must be`},
	} {
		cmd := program(t, test.env...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(out), test.want) || strings.Count(string(out), "\n") != 1 {
			t.Errorf("%q: %v, %s", test.env, err, out)
		}
	}
}

var settingKeys = []string{"PORT", "HOST", "ROUND_INTERVAL", "BROADCAST_INTERVAL", "BROADCAST_BLOCKS", "CHAIN_FILE", "MAX_VALIDATORS"}

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
	got, err := readSettings()
	want := settings{
		port:              9000,
		roundInterval:     30 * time.Second,
		broadcastInterval: time.Minute,
		chainFile:         "chain.jsonl",
		maxValidators:     10000,
	}
	if err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	defaults, err := godotenv.Unmarshal(envExample)
	if err != nil || len(defaults) != len(settingKeys) {
		t.Errorf(".env.example has %d settings, want %d; %v", len(defaults), len(settingKeys), err)
	}
}

// First the environment, then .env, then the defaults; set but empty is set.
func TestPrecedence(t *testing.T) {
	inDirectory(t, "PORT=1\nROUND_INTERVAL=1s\nCHAIN_FILE=mine.jsonl\nHOST=localhost\nUNRELATED=x")
	t.Setenv("PORT", "2")
	t.Setenv("CHAIN_FILE", "")
	got, err := readSettings()
	want := settings{
		port:              2,
		host:              "localhost",
		roundInterval:     time.Second,
		broadcastInterval: time.Minute,
		maxValidators:     10000,
	}
	if err != nil || got != want {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
}

func TestBadSettings(t *testing.T) {
	const duration = ": want a duration of at least 1ms, such as 30s or 1m30s"
	for _, test := range []struct{ key, value, want string }{
		{"PORT", "", ": want a whole number from 0 to 65535"},
		{"PORT", "-1", ": want a whole number from 0 to 65535"},
		{"PORT", "65536", ": want a whole number from 0 to 65535"},
		{"PORT", "0x50", ": want a whole number from 0 to 65535"},
		{"ROUND_INTERVAL", "", duration},
		{"ROUND_INTERVAL", "0", duration},
		{"ROUND_INTERVAL", "-1s", duration},
		{"ROUND_INTERVAL", "30", duration},
		{"ROUND_INTERVAL", "999us", duration},
		{"BROADCAST_INTERVAL", "a minute\n", duration},
		{"BROADCAST_BLOCKS", "-1", ": want a whole number from 0 to 9223372036854775807"},
		{"MAX_VALIDATORS", "0", ": want a whole number from 1 to 1000000"},
		{"MAX_VALIDATORS", "1000001", ": want a whole number from 1 to 1000000"},
	} {
		t.Run(test.key+"="+test.value, func(t *testing.T) {
			inDirectory(t, "")
			t.Setenv(test.key, test.value)
			want := fmt.Sprintf("cannot use %q for %s%s", test.value, test.key, test.want)
			if _, err := readSettings(); err == nil || err.Error() != want {
				t.Errorf("%v, want %s", err, want)
			}
		})
	}
	t.Run("two", func(t *testing.T) {
		inDirectory(t, "PORT=x")
		t.Setenv("MAX_VALIDATORS", "y")
		_, err := readSettings()
		if err == nil || strings.Count(err.Error(), "\n") != 1 || !strings.Contains(err.Error(), `"x" for PORT`) || !strings.Contains(err.Error(), `"y" for MAX_VALIDATORS`) {
			t.Errorf("two faults: %v", err)
		}
	})
}

// A fault in .env is named by its line, and nothing else of the file is shown.
func TestBadDotenv(t *testing.T) {
	for _, test := range []struct{ dotenv, want string }{
		{"PORT 9000", `line 1 is not KEY=VALUE: "PORT 9000"`},
		{"SECRET=a\nPORT 9000\nSECRET=b\n", `line 2 is not KEY=VALUE: "PORT 9000"`},
		{"SECRET=a\r\nPORT 9000\r\nSECRET=b\r\n", `line 2 is not KEY=VALUE: "PORT 9000"`},
		{"SECRET='a\nb'\n\n# comment\nHOST=\"x\nSECRET=c\n", `line 5 is not KEY=VALUE: "HOST=\"x"`},
		{"SECRET=a\n\x1b[2J\nSECRET=b\n", `line 2 is not KEY=VALUE: "\x1b[2J"`},
	} {
		inDirectory(t, test.dotenv)
		if _, err := readSettings(); err == nil || err.Error() != "cannot read .env: "+test.want {
			t.Errorf("%q: %v\nwant %s", test.dotenv, err, test.want)
		}
	}
	inDirectory(t, "")
	if err := os.Mkdir(".env", 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := readSettings(); !errors.Is(err, syscall.EISDIR) || !strings.Contains(err.Error(), ".env") {
		t.Errorf("a directory: %v", err)
	}
}
