package dotenv

import (
	"errors"
	"io/fs"
	"maps"
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

// The values are what godotenv says; only how the text is encoded, and how its lines end,
// is not left to it.
func TestRead(t *testing.T) {
	type env = map[string]string
	for _, test := range []struct {
		text string
		want env
	}{
		{"", env{}},
		{"# nothing\n\n", env{}},
		{"PORT=1", env{"PORT": "1"}},
		{"\ufeffPORT=1\nHOST=\n", env{"PORT": "1", "HOST": ""}},
		{"\ufeff# \r\nPORT=1\r\nexport HOST=\"a\"\r\n", env{"PORT": "1", "HOST": "a"}},
		{"# comment\rPORT=1\rHOST=a # b\r", env{"PORT": "1", "HOST": "a"}},
		{"PORT=1\r\n# comment\rHOST=a\n", env{"PORT": "1", "HOST": "a"}},
		{"A: x y # comment\nB='x # y' # comment\nA=z#\n", env{"A": "z#", "B": "x # y"}},
		{"A='one\ntwo'\nB=\"one\r\ntwo\"", env{"A": "one\ntwo", "B": "one\ntwo"}},
		{`A=C:\new\` + "\n" + `B='$A\n'` + "\nC=a$b$ # $A", env{"A": `C:\new\`, "B": `$A\n`, "C": "a$b$"}},
		{"A=$PWD/x\nB=${A}y", env{"A": "/x", "B": "/xy"}},
		{`A="x\ny"` + "\n" + `B="C:\dir"` + "\n" + `C="\$B"`, env{"A": "x\ny", "B": "C:dir", "C": "$B"}},
		{"A=# x\nB=a # b # c\n", env{"A": "# x", "B": "a # b"}},
		{"A=\ufdd0\ufeffx\n", env{"A": "\ufdd0\ufeffx"}},
	} {
		name := write(t, test.text)
		if got, err := Read(name); err != nil || !maps.Equal(got, test.want) {
			t.Errorf("%q: %q, %v\nwant %q", test.text, got, err, test.want)
		}
		wantText(t, name, test.text)
	}
}

// The error names the line at fault and shows nothing else of the file.
func TestBadText(t *testing.T) {
	const encoding = "it is not in UTF-8, but perhaps in UTF-16; save it as UTF-8"
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
		{"SECRET=a\rPORT 9000\rSECRET=b\r", `line 2 is not KEY=VALUE: "PORT 9000"`},
		{"\xff\xfeP\x00=\x001\x00", encoding},
		{"\xfe\xff\x00P\x00=\x001", encoding},
		{"P\x00=\x001\x00", encoding},
		{"\x00P\x00=\x001", encoding},
		{"SECRET=a\nCHAIN_FILE=M\xfcller.jsonl\n", encoding},
	} {
		name := write(t, test.text)
		if _, err := Read(name); err == nil || err.Error() != test.want {
			t.Errorf("%q: %v\nwant %s", test.text, err, test.want)
		}
		wantText(t, name, test.text)
	}
}

// What the system says of a name is the error.
func TestNoFile(t *testing.T) {
	t.Chdir(t.TempDir())
	if _, err := Read(".env"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a file: %v", err)
	}
	if err := os.Mkdir(".env", 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".env", strings.Repeat("x", 1000), "/proc/self/mem"} {
		var refused *fs.PathError
		if _, err := Read(name); !errors.As(err, &refused) || name != "/proc/self/mem" && errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%.20s: %v", name, err)
		}
	}
}

// A link to a file is as good as the file, and so is a pipe, as which password managers
// have a .env.
func TestLinkAndPipe(t *testing.T) {
	name := write(t, "PORT=1\n")
	link := name + ".link"
	if err := os.Symlink(name, link); err != nil {
		t.Skip(err)
	}
	pipe := name + ".pipe"
	if err := exec.Command("mkfifo", pipe).Run(); err != nil {
		t.Skip(err)
	}
	go os.WriteFile(pipe, []byte("PORT=1\n"), 0)
	for _, name := range []string{link, pipe} {
		if values, err := Read(name); err != nil || values["PORT"] != "1" {
			t.Errorf("%s: %q, %v", name, values, err)
		}
	}
}
