// Package dotenv reads files of KEY=VALUE lines, such as .env, that people have written
// with whatever editor they have. What the lines mean is godotenv's business.
package dotenv

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"unicode/utf8"

	"github.com/joho/godotenv"
)

// Read returns the value of each key in the file. The error shows no more of the file than
// the line at fault. It is fs.ErrNotExist if there is no such file.
func Read(name string) (map[string]string, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	// Without a byte order mark, the zero bytes tell UTF-16 from UTF-8.
	if !utf8.Valid(text) || bytes.IndexByte(text, 0) >= 0 {
		return nil, errors.New("it is not in UTF-8, but perhaps in UTF-16; save it as UTF-8")
	}
	lines := lineEnds.Replace(strings.TrimPrefix(string(text), "\ufeff")) + "\n" // without the last, godotenv accepts a last line that has no =
	values, err := godotenv.Unmarshal(lines)
	if err != nil {
		return nil, lineError(lines)
	}
	return values, nil
}

// lineEnds replaces the line ends of Windows and of old Macs.
var lineEnds = strings.NewReplacer("\r\n", "\n", "\r", "\n")

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
