package dotenv

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// write returns the name of a file with this text.
func write(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), ".env")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// wantText checks that the file still has this text.
func wantText(t *testing.T, name, text string) {
	t.Helper()
	if got, err := os.ReadFile(name); err != nil || string(got) != text {
		t.Errorf("%q has become %q, %v", text, got, err)
	}
}

func TestRead(t *testing.T) {
	type env = map[string]string
	for _, test := range []struct {
		text            string
		values, changed env
	}{
		{"", env{}, env{}},
		{"# nothing\n\n", env{}, env{}},
		{"PORT=1", env{"PORT": "1"}, env{}},
		{"\ufeffPORT=1\nHOST=\n", env{"PORT": "1", "HOST": ""}, env{}},
		{"\ufeff# \r\nPORT=1\r\nexport HOST=\"a\"\r\n", env{"PORT": "1", "HOST": "a"}, env{}},
		{"A: x y # comment\nB='x # y' # comment\nA=z#\n", env{"A": "z#", "B": "x # y"}, env{}},
		{"A='one\ntwo'\nB=\"one\r\ntwo\"", env{"A": "one\ntwo", "B": "one\ntwo"}, env{}},
		{`A=C:\new\` + "\n" + `B='$A\n'` + "\nC=a$b$ # $A", env{"A": `C:\new\`, "B": `$A\n`, "C": "a$b$"}, env{}},
		{"A=$PWD/x\nB=${A}", env{"A": "/x", "B": "/x"}, env{"A": "$PWD/x", "B": "${A}"}},
		{`A="$B"` + "\n" + `C="\$B"` + "\n" + `D=\$B`, env{"A": "", "C": "$B", "D": "$B"}, env{"A": "$B", "C": `\$B`, "D": `\$B`}},
		{`A="x\ny"` + "\n" + `B="C:\dir"`, env{"A": "x\ny", "B": "C:dir"}, env{"A": `x\ny`, "B": `C:\dir`}},
		{`A="x\"y"` + "\n" + `B="\\x"` + "\n" + `C="x\'y"`, env{"A": `x"y`, "B": `\x`, "C": "x'y"}, env{"A": `x\"y`, "B": `\\x`, "C": `x\'y`}},
		{"A=$B\nA=1\n", env{"A": "1"}, env{}},
		{"A=# x\nB=a # b # c\nC=a\t# b #c\nD=a#b c#\n", env{"A": "# x", "B": "a # b", "C": "a\t# b", "D": "a#b c#"}, env{"A": "# x", "B": "a # b", "C": "a\t# b"}},
		{"A='# x'\nB=\"a # b\" # c # d\n", env{"A": "# x", "B": "a # b"}, env{}},
		{"B='$A'\nA=$B\n", env{"A": "$A", "B": "$A"}, env{"A": "$B"}},
	} {
		name := write(t, test.text)
		values, changed, err := Read(name)
		if err != nil || !maps.Equal(values, test.values) || !maps.Equal(changed, test.changed) {
			t.Errorf("%q: %q, %q, %v\nwant %q, %q", test.text, values, changed, err, test.values, test.changed)
		}
		wantText(t, name, test.text)
	}
}

// Whatever is written, unquoted or in quotes of either kind, it is either the value or what
// changed says.
func TestChanged(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var text strings.Builder
	written := make(map[string]string)
	for i := range 5000 {
		value := "x"
		for range random.IntN(8) {
			value += []string{"$", `\`, "{", "}", "(", "A1", "n", "r", "ü", `\"`, `\'`, "#"}[random.IntN(12)]
		}
		value += "x"
		quote := []string{"", "'", `"`}[random.IntN(3)]
		key := fmt.Sprintf("A%d", i)
		written[key] = value
		fmt.Fprintf(&text, "%s=%s%s%s\n", key, quote, value, quote)
	}
	values, changed, err := Read(write(t, text.String()))
	if err != nil || len(values) != len(written) {
		t.Fatalf("%d values, %v", len(values), err)
	}
	for key, want := range written {
		was, ok := changed[key]
		if ok && (was != want || values[key] == want) || !ok && values[key] != want {
			t.Errorf("%s=%s is %q; changed: %t, %q", key, want, values[key], ok, was)
		}
	}
	if len(changed) < 500 || len(changed) > 4500 {
		t.Errorf("%d of %d values are changed", len(changed), len(values))
	}
}

// The error names the line at fault and shows nothing else of the file.
func TestBadText(t *testing.T) {
	const encoding = "it is not in UTF-8, but perhaps in UTF-16; save it as UTF-8"
	const returns = "it has lines that end with a carriage return alone; save it with Unix line ends (LF)"
	const hint = "; a key has letters, digits, _ and . only, and a quote before a value needs one after it"
	for _, test := range []struct{ text, want string }{
		{"PORT", `line 1 is not KEY=VALUE: "PORT"`},
		{"PORT 9000", `line 1 is not KEY=VALUE: "PORT 9000"`},
		{"\ufeffPORT 9000", `line 1 is not KEY=VALUE: "PORT 9000"`},
		{"SECRET=a\n\ufeffPORT=1\n", `line 2 is not KEY=VALUE: "\ufeffPORT=1"` + hint},
		{"SECRET=a\nPORT 9000\nSECRET=b\n", `line 2 is not KEY=VALUE: "PORT 9000"`},
		{"SECRET=a\r\nPORT 9000\r\nSECRET=b\r\n", `line 2 is not KEY=VALUE: "PORT 9000"`},
		{"SECRET='a\nb'\n\n# comment\nHOST=\"x\nSECRET=c\n", `line 5 is not KEY=VALUE: "HOST=\"x"` + hint},
		{"SECRET=a\nHOST=\"x\nSECRET=\"b\"\n", `line 2 is not KEY=VALUE: "HOST=\"x"` + hint},
		{"SECRET=a\n\x1b[2J\nSECRET=b\n", `line 2 is not KEY=VALUE: "\x1b[2J"`},
		{"SECRET=a\nROUND-INTERVAL=1s\n", `line 2 is not KEY=VALUE: "ROUND-INTERVAL=1s"` + hint},
		{"A='x'y\n", `line 1 is not KEY=VALUE: "A='x'y"` + hint},
		{"# comment\rPORT=1\r", returns},
		{"PORT=1\r\n# comment\rHOST=a\r\n", returns},
		{"\xff\xfeP\x00=\x001\x00", encoding},
		{"\xfe\xff\x00P\x00=\x001", encoding},
		{"P\x00=\x001\x00", encoding},
		{"\x00P\x00=\x001", encoding},
		{"SECRET=a\nCHAIN_FILE=M\xfcller.jsonl\n", encoding},
	} {
		name := write(t, test.text)
		if _, _, err := Read(name); err == nil || err.Error() != test.want {
			t.Errorf("%q: %v\nwant %s", test.text, err, test.want)
		}
		wantText(t, name, test.text)
	}
}

// What is no regular file is refused, and not waited for.
func TestNoRegularFile(t *testing.T) {
	t.Chdir(t.TempDir())
	if _, _, err := Read(".env"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
	for _, test := range []struct {
		name  string
		make  func() error
		error string
	}{
		{"a directory", func() error { return os.Mkdir(".env", 0o700) }, "it is a directory, and must be a regular file"},
		{"a pipe", func() error { return exec.Command("mkfifo", ".env").Run() }, "it is a pipe or a device, and must be a regular file"},
		{"a device", func() error { return os.Symlink(os.DevNull, ".env") }, "it is a pipe or a device, and must be a regular file"},
		{"a link to nothing", func() error { return os.Symlink("none", ".env") }, "it is a symbolic link to a file that does not exist"},
	} {
		if err := test.make(); err != nil {
			t.Logf("%s is not tried: %v", test.name, err)
			continue
		}
		if _, _, err := Read(".env"); err == nil || err.Error() != test.error {
			t.Errorf("%s: %v, want %s", test.name, err, test.error)
		}
		if err := os.Remove(".env"); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := Read(strings.Repeat("x", 1000)); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("with too long a name: %v", err)
	}
}

// A link to a regular file is as good as the file.
func TestLink(t *testing.T) {
	name := write(t, "PORT=1\n")
	link := name + ".link"
	if err := os.Symlink(name, link); err != nil {
		t.Skip(err)
	}
	if values, _, err := Read(link); err != nil || values["PORT"] != "1" {
		t.Errorf("%q, %v", values, err)
	}
}

func TestNotReadable(t *testing.T) {
	const memory = "/proc/self/mem" // is a regular file, and its first byte cannot be read
	if _, err := os.Stat(memory); err == nil {
		if _, _, err := Read(memory); err == nil {
			t.Errorf("%s can be read", memory)
		}
	}
	name := write(t, "PORT=1\n")
	if err := os.Chmod(name, 0); err != nil {
		t.Fatal(err)
	}
	if file, err := os.Open(name); err == nil {
		file.Close()
		t.Skip("this user may read anything")
	}
	want := "open " + name + ": permission denied; let the user who runs this program read it"
	if _, _, err := Read(name); err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}
