// Package dotenv reads files of KEY=VALUE lines, such as .env, that people have written
// with whatever editor they have. The format is godotenv's, without its expansion.
package dotenv

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"
	"unicode/utf8"

	"github.com/joho/godotenv"
)

// Read returns the value of each key in the file. godotenv expands $NAME, and escapes such
// as \n in double quotes; for each key whose value is another one because of that, changed
// has the value as it is written, without its quotes. It also has what godotenv takes for
// the value if that is not in quotes and a # in it may be meant to begin a comment.
//
// The error says what to do, and shows no more of the file than the line at fault. It is
// fs.ErrNotExist if there is no file of that name.
func Read(name string) (values, changed map[string]string, err error) {
	text, err := readText(name)
	if err != nil {
		return nil, nil, err
	}
	values, err = godotenv.Unmarshal(text)
	if err != nil {
		return nil, nil, lineError(text)
	}
	written, _ := godotenv.Unmarshal(inert.Replace(text)) // the same keys, so no error either
	changed = make(map[string]string)
	for key, value := range written {
		value = asWritten.Replace(value)
		quoted := strings.Contains(text, `'`+value+`'`) || strings.Contains(text, `"`+value+`"`)
		if value != values[key] || comment.MatchString(value) && !quoted {
			changed[key] = value
		}
	}
	return values, changed, nil
}

// comment matches a value that a comment may begin in.
var comment = regexp.MustCompile(`(^|\s)#`)

// readText returns what is in the file, and a newline after it, without which godotenv
// would accept a last line that has no =.
func readText(name string) (string, error) {
	info, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(name); err == nil {
			return "", errors.New("it is a symbolic link to a file that does not exist")
		}
	}
	if err != nil {
		return "", err
	}
	if info.IsDir() {
		return "", errors.New("it is a directory, and must be a regular file")
	}
	if !info.Mode().IsRegular() { // reading a pipe might never end
		return "", errors.New("it is a pipe or a device, and must be a regular file")
	}
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrPermission) {
		err = fmt.Errorf("%w; let the user who runs this program read it", err)
	}
	if err != nil {
		return "", err
	}
	// Without a byte order mark, the zero bytes tell UTF-16 from UTF-8.
	if !utf8.Valid(text) || bytes.IndexByte(text, 0) >= 0 {
		return "", errors.New("it is not in UTF-8, but perhaps in UTF-16; save it as UTF-8")
	}
	if bytes.Count(text, []byte("\r")) > bytes.Count(text, []byte("\r\n")) { // which would end no comment
		return "", errors.New("it has lines that end with a carriage return alone; save it with Unix line ends (LF)")
	}
	return strings.TrimPrefix(string(text), "\ufeff") + "\n", nil
}

// lineError is the error for a text that godotenv cannot parse. godotenv's own would quote
// the rest of the file, secrets and all.
func lineError(text string) error {
	good := text
	for _, err := godotenv.Unmarshal(good); err != nil; _, err = godotenv.Unmarshal(good) {
		good = good[:strings.LastIndex(strings.TrimSuffix(good, "\n"), "\n")+1]
	}
	line, _, _ := strings.Cut(text[len(good):], "\n")
	hint := ""
	if strings.Contains(line, "=") {
		hint = "; a key has letters, digits, _ and . only, and a quote before a value needs one after it"
	}
	return fmt.Errorf("line %d is not KEY=VALUE: %.64q%s", strings.Count(good, "\n")+1, strings.TrimSpace(line), hint)
}

// In a text from inert, noncharacters of Unicode stand for $ and \, and for the quotes after
// a \, which do not end a value, so that godotenv expands nothing. asWritten is the inverse.
var (
	inert     = strings.NewReplacer(`\"`, "\ufdd0\ufdd1", `\'`, "\ufdd0\ufdd2", `\`, "\ufdd0", `$`, "\ufdd3")
	asWritten = strings.NewReplacer("\ufdd0", `\`, "\ufdd1", `"`, "\ufdd2", `'`, "\ufdd3", `$`)
)
