package telnet

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unsafe"
)

const limit = 64 // as the server's

// An event is what a call of Next has returned.
type event struct {
	text string
	end  End
	read int  // bytes of the input up to here
	crlf bool // what CRLF reports then
}

// String shows the event as the text and its end, which of a line is \n or \r\n as CRLF has it.
func (e event) String() string {
	ends := []string{"", "<timing mark>", "\n", "<too long>", "<end of input>", "<interrupt>"}
	if e.end == LineEnd && e.crlf {
		return e.text + "\r\n"
	}
	return e.text + ends[e.end]
}

func transcript(events []event) string {
	var all strings.Builder
	for _, e := range events {
		all.WriteString(e.String())
	}
	return all.String()
}

// play gives the parts to a Filter, as a server does that reads each of them into what an
// unfinished line leaves of a buffer. The last event is the unfinished line, if nothing has
// ended the input.
func play(t *testing.T, limit int, parts ...[]byte) (events []event) {
	var f Filter
	buffer := make([]byte, limit+2)
	line := buffer[:0]
	sent := bytes.Join(parts, nil)
	received := 0
	for _, part := range parts {
		for len(part) > 0 {
			line = buffer[:copy(buffer, line)]
			n := copy(buffer[len(line):], part)
			input := buffer[len(line):][:n]
			part = part[n:]
			received += n
			for len(input) > 0 {
				var end End
				line, input, end = f.Next(line, input, limit)
				read := received - len(input)
				if !bytes.Equal(input, sent[read:received]) {
					t.Fatalf("%q: the rest of the input is %q after %d bytes", sent, input, read)
				}
				if len(line) > 0 && &line[:cap(line)][cap(line)-1] != &buffer[limit+1] {
					t.Fatalf("%q: the line was moved to another array after %d bytes", sent, read)
				}
				if end == None && len(input) > 0 {
					t.Fatalf("%q: nothing ends the line after %d bytes, but %q is left", sent, read, input)
				}
				if end != None {
					events = append(events, event{string(line), end, read, f.CRLF()})
				}
				if end == LineEnd {
					line = input[:0]
				}
				if end > LineEnd {
					return events
				}
			}
		}
	}
	return append(events, event{string(line), None, received, f.CRLF()})
}

// The oracle matches regular expressions against all of the input. They are for text with
// a rune for each byte.
var (
	commands = regexp.MustCompile(`(?s)\x{ff}\x{fa}(?:[^\x{ff}]|\x{ff}[^\x{f0}])*(?:\x{ff}\x{f0}|\x{ff}?$)|` +
		`\x{ff}[\x{fb}-\x{fe}](?:.|$)|` +
		`\x{ff}(?:.|$)|` +
		`.`)

	// Neither a control byte nor a digit ends an escape sequence as its last character.
	character = `(?:[\x{f0}-\x{f4}][\x{80}-\x{bf}]{0,3}|[\x{e0}-\x{ef}][\x{80}-\x{bf}]{0,2}|[\x{c2}-\x{df}][\x{80}-\x{bf}]?|[^\x00-\x1f\x7f0-9])`
	keys      = regexp.MustCompile(`(?s)\r[\n\x00]?|` +
		`\x1b\[\[?[\x20-\x3f]*[\x40-\x7e]?|` +
		`\x1bO[0-9]*` + character + `?|` +
		`\x1b` + character + `?|` +
		`.`)
)

// runes returns a rune for each byte, and inBytes a byte for each rune.
func runes(p []byte) string {
	var s []rune
	for _, b := range p {
		s = append(s, rune(b))
	}
	return string(s)
}

func inBytes(s string) (p []byte) {
	for _, r := range s {
		p = append(p, byte(r))
	}
	return p
}

// needsCRLF is the oracle of CRLF: whether there is a CR or a command in what was sent.
func needsCRLF(sent []byte) bool {
	for _, match := range commands.FindAllString(runes(sent), -1) {
		if match == "\r" || len([]rune(match)) > 1 && match != "\u00ff\u00ff" {
			return true
		}
	}
	return false
}

// oracle returns the events that the input must give.
func oracle(limit int, sent []byte) (events []event) {
	text := ""      // the input without commands
	var ends []int  // where in the input each byte of the text ends
	var marks []int // where in the input each timing mark ends
	end := 0        // of a match
	for _, match := range commands.FindAllString(runes(sent), -1) {
		end += len([]rune(match))
		switch {
		case len([]rune(match)) == 1 && match != "\u00ff":
		case match == "\u00ff\u00ff":
			match = "\u00ff"
		case match == "\u00ff\u00f7":
			match = "\b"
		case match == "\u00ff\u00f8":
			match = "\x15"
		case match == "\u00ff\u00f4", match == "\u00ff\u00f3":
			match = "\x03"
		case match == "\u00ff\u00fd\x06":
			marks = append(marks, end)
			continue
		default:
			continue
		}
		text += match
		ends = append(ends, end)
	}

	line := ""
	add := func(end End, read int) {
		events = append(events, event{string(inBytes(line)), end, read, needsCRLF(sent[:read])})
	}
	addMarks := func(read int) {
		for len(marks) > 0 && marks[0] < read {
			add(TimingMark, marks[0])
			marks = marks[1:]
		}
	}
	at := 0
	for _, match := range keys.FindAllString(text, -1) {
		read := ends[at]
		at += len([]rune(match))
		addMarks(read)
		switch match {
		case "\x03":
			add(Interrupt, read)
			return events
		case "\x04":
			add(EndOfInput, read)
			return events
		case "\x15", "\x17":
			line = ""
		case "\b", "\x7f":
			last := 0 // where the last character of the line begins
			for i := range string(inBytes(line)) {
				last = i
			}
			line = string([]rune(line)[:last])
		case "\n", "\r", "\r\n", "\r\x00":
			add(LineEnd, read)
			line = ""
		default:
			if match[0] < ' ' && match != "\t" {
				break // an escape sequence, or a control byte that does nothing
			}
			line += match
			if len([]rune(line)) > limit {
				add(TooLong, read)
				return events
			}
		}
	}
	addMarks(len(sent) + 1)
	add(None, len(sent))
	return events
}

// check compares the Filter with the oracle, for the input as a whole, in two
// parts wherever it can be cut, and byte by byte. It returns the events.
func check(t *testing.T, limit int, sent []byte, cuts ...int) []event {
	t.Helper()
	want := oracle(limit, sent)
	same := func(how string, parts ...[]byte) {
		t.Helper()
		if got := play(t, limit, parts...); !slices.Equal(got, want) {
			t.Fatalf("%q, limit %d, %s: got\n%#v\nwant\n%#v", sent, limit, how, got, want)
		}
	}
	same("at once", sent)
	for _, cut := range cuts {
		same(fmt.Sprintf("cut at %d", cut), sent[:cut], sent[cut:])
	}
	var single [][]byte
	for i := range sent {
		single = append(single, sent[i:i+1])
	}
	same("byte by byte", single...)
	return want
}

func everywhere(sent []byte) (cuts []int) {
	for cut := range sent {
		cuts = append(cuts, cut)
	}
	return cuts
}

// What a client types, and the lines that it means. Each is tried in all ways of cutting it.
func TestNext(t *testing.T) {
	for _, c := range []struct{ sent, want string }{
		{"", ""},
		{"72", "72"},
		{"100\n72\n\n 73\t\n-1", "100\n72\n\n 73\t\n-1"},
		{strings.Repeat("100\n", 100), strings.Repeat("100\n", 100)},

		// Line ends.
		{"100\r\n72\r\n\r\n", "100\r\n72\r\n\r\n"},
		{"100\r\x0072\r\x00\r\x00", "100\r\n72\r\n\r\n"},
		{"100\r72\r\r", "100\r\n72\r\n\r\n"},
		{"100\n72\r73\n", "100\n72\r\n73\r\n"}, // each reply follows what was sent before it
		{"1\r\n\n2\r\x00\n3\n\r4", "1\r\n\r\n2\r\n\r\n3\r\n\r\n4"},
		{"1\r\r\n2\r \n3\r\x08\n4", "1\r\n\r\n2\r\n \r\n3\r\n\r\n4"},
		{"1\r\xff\xf1\n2\r\xff\xfb\x01\xff\xfa\n\xff\xf0\x003\n", "1\r\n2\r\n3\r\n"}, // commands between CR and LF
		{"1\r\x1b\n2\r\xff\xf7\n3", "1\r\n\r\n2\r\n\r\n3"},
		{"\x007\x00\x002\x00\n\x00", "72\n"},

		// Control characters that do nothing, and Tab.
		{"\x01\x02\x05\x06\a7\v\f\x0e\x0f\x10\x11\x12\x13\x14\x162\x18\x19\x1a\x1c\x1d\x1e\x1f\n", "72\n"},
		{"\t7\t2\x01\t\b3\x1a\n", "\t7\t23\n"},
		{"7\x1b[\x012\x1bO\x1a3\x1b\t\x1b\xe2\x05\x824\r\x01\n", "723\t\x824\r\n\r\n"},

		// Erasing.
		{"73\b2\n", "72\n"},
		{"73\x7f2\n", "72\n"},
		{"73\xff\xf72\n", "72\r\n"},
		{"\b\x7f7\b\b\b72\n\b73\n", "72\n73\n"},
		{"7é\b2€\x7f\U0001f600\b\n", "72\n"},
		{"7\xe2\x82\b\b2\xff\xff\b\x80\b\xf0\x9f\x98\b\b\b\n", "72\n"}, // of invalid UTF-8, each byte
		{"\xe2\xff\xf1\x82\xff\xf1\xac\b7\n", "7\r\n"},
		{"99\x1572\n98\x1773\n97\xff\xf874\n\x15\x17\xff\xf8\n", "72\n73\n74\r\n\r\n"},

		// Escape sequences.
		{"7\x1b[A2\x1b[15~\x1b[1;5D\x1b[[A\x1b[ ?@\n", "72\n"},
		{"7\x1b[[[2\x1b[[~\x1b[[1[\x1b[1[[\n", "72[\n"},
		{"7\x1bOA\x1bO1;2\x1bO12\x1b\n\x1bO[\x1bO3é3\n", "72\n3\n"},
		{"7\x1bé\x1b€2\x1b\U0001f600\x1ba\x1b \x1b/\x1b:\n", "72\n"},
		{"9\x1b\x7f79\x1b[\x7f28\x1b[1\x7f39\x1bO\x7f\x1bO1\x7f4é\x1b\xf0\x9f\x7f5\x1b\x7f\x7f\n", "72\n"}, // Backspace after Esc
		{"\x1b0\x1b9\x1b5A\x1b1;2\n\x1b72\n", "095A1;2\n72\n"},                                             // a number after Esc
		{"\x1b\x801\x1b\xc02\x1b\xf53\x1b\xff\xff4\x1b\xc2\xc25\x1b\xe2\x826\x1b\xf0\x9f\x987\n", "1234\xc2567\n"},
		{"\x1b[7\x7f2\x1b[é3\x1b[1\x7f\x1b[\xff\xff\n", "2é\xff\n"},
		{"72\x1b\n73\x1b[\n74\x1b[1\r75\x1bO\n76\x1bO1\n77\x1bé\x1b\xe2\n", "72\n73\n74\r\n75\r\n76\r\n77\r\n"}, // Enter after Esc
		{"79\x1b\b2\x1b[\x157\x1b[1\x1b[A3\x1b\x1b[A\x1bO\x00O\x1b\xe2\x00\x82\n", "73O\x82\n"},
		{"1\x1b\xff\xf1[A2\x1b[\xff\xfb\x01A3\x1b\xff\xf7\n", "12\r\n"}, // commands in a sequence

		// Interrupt and end of the input.
		{"100\n7\x032\n", "100\n7<interrupt>"},
		{"100\n7\xff\xf42\n", "100\n7<interrupt>"},
		{"100\n\xff\xf372\n", "100\n<interrupt>"},
		{"7\x1b\x032", "7<interrupt>"},
		{"7\x1b[1\xff\xf42", "7<interrupt>"},
		{"100\n72\x0473\n", "100\n72<end of input>"},
		{"100\r\x04\n", "100\r\n<end of input>"},
		{"72\x1b[\x04", "72<end of input>"},

		// Telnet's commands.
		{"\xff\xfb\x1f\xff\xfb\x20\xff\xfb\x18\xff\xfb\x27\xff\xfd\x01\xff\xfb\x03\xff\xfd\x03100\n", "100\r\n"}, // as PuTTY
		{"100\n7\xff\xf12\n", "100\n72\r\n"},
		{"1\xff\xfb\x010\xff\xfc\xff0\xff\xfd\n\xff\xfe\xff\n", "100\r\n"},                                         // options that look like something else
		{"7\xff\xfa\x18\x00xterm\xff\xff\xf0\xff\xf4\n\x03\xff\xfa\x1b\xff\xf02\xff\xf0\n", "72\r\n"},              // a subnegotiation with all in it
		{"\xff\xed\xff\x06\xff\xfb\x06\xff\xfc\x06\xff\xfe\x06\xff\xfd\x05\xff\xfd\a\xff\xfd\xff\x061\n", "1\r\n"}, // near a timing mark
		{"\xff\xff\xff\xff1\n", "\xff\xff1\n"},
		{"1\xff\xff\xf4\n\xf0\n", "1\xff\xf4\n\xf0\n"},
		{"72\xff", "72"},
		{"72\xff\xfb", "72"},
		{"72\xff\xfa\n73\n", "72"},

		// Timing marks.
		{"100\n\xff\xed\xff\xfd\x0672\n", "100\n<timing mark>72\r\n"}, // Ctrl-Z in GNU telnet
		{"\xff\xfd\x06", "<timing mark>"},
		{"7\xff\xfd\x062\n", "7<timing mark>72\r\n"},
		{"79\xff\xfd\x06\b2\xff\xfd\x06\x15\xff\xfd\x0673\n", "79<timing mark>72<timing mark><timing mark>73\r\n"},
		{"7\xff\xfd\x06" + strings.Repeat("\xff\xfd\x06", 64) + "2\n", strings.Repeat("7<timing mark>", 65) + "72\r\n"},
		{"7\r\xff\xfd\x06\n2\r\xff\xfd\x06\xff\xfd\x06\x00\n", "7\r\n<timing mark>2\r\n<timing mark><timing mark>\r\n"},
		{"7\x1b\xff\xfd\x06[\xff\xfd\x061\xff\xfd\x06~2\n", "7<timing mark>7<timing mark>7<timing mark>72\r\n"},
		{"7\x1bO\xff\xfd\x061\xff\xfd\x06A\x1b\xe2\x82\xff\xfd\x06\xac2\n", "7<timing mark>7<timing mark>7<timing mark>72\r\n"},
		{"7\xff\xfd\xff\xfd\x06\xff\xfa\x18\xff\xfd\x06\xff\xf02\n", "7\xfd2\r\n"}, // of another command
		{"7\xff\xfd\x03\x06\xff\xff\xfd\x062\n", "7\xff\xfd2\r\n"},
		{"7\xff\xfd", "7"},
		{"7\xff\xfd\x06\xff\xfd\x06\x032\xff\xfd\x06", "7<timing mark>7<timing mark>7<interrupt>"},
		{"72\xff\xfd\x06\x04\xff\xfd\x06", "72<timing mark>72<end of input>"},

		// Lines that are too long, or nearly.
		{strings.Repeat("0", 62) + "72\n", strings.Repeat("0", 62) + "72\n"},
		{strings.Repeat("0", 62) + "72\r\n1", strings.Repeat("0", 62) + "72\r\n1"},
		{"x\b" + strings.Repeat("0", 62) + "\x00\x1b[A72\b3\n", strings.Repeat("0", 62) + "73\n"},
		{strings.Repeat("0", 63) + "123\n", strings.Repeat("0", 63) + "12<too long>"},
		{strings.Repeat("0", 64) + "1\b\n", strings.Repeat("0", 64) + "1<too long>"},
		{"\t" + strings.Repeat("\a", 65) + strings.Repeat("0", 62) + "\x1b7\n", "\t" + strings.Repeat("0", 62) + "7\n"},
		{strings.Repeat("0", 64) + "\xff\xfd\x061", strings.Repeat("0", 64) + "<timing mark>" + strings.Repeat("0", 64) + "1<too long>"},
		{strings.Repeat("0", 64) + "\t\xff\xfd\x06", strings.Repeat("0", 64) + "\t<too long>"},
		{strings.Repeat("é", 33) + "\b\n", strings.Repeat("é", 32) + "\xc3<too long>"},
		{"\n" + strings.Repeat("\xff\xff", 65) + "\n", "\n" + strings.Repeat("\xff", 65) + "<too long>"},
	} {
		events := check(t, limit, []byte(c.sent), everywhere([]byte(c.sent))...)
		if got := transcript(events); got != c.want {
			t.Errorf("%q: got  %q\nwant %q", c.sent, got, c.want)
		}
	}
}

// The client needs \r\n from the end of its first command on, also while it types a line.
func TestCRLF(t *testing.T) {
	for _, c := range []struct {
		sent string
		want int // the bytes after which CRLF is true
	}{
		{"1\n2\r3", 4},
		{"\r", 1},
		{"1\xff\xf12", 3},
		{"\xff\xff\xff\xff\xff\xfb\x01", 6},
		{"\xff\xfa\x01\xff\xf0", 2},
		{"72\xff\xfd\x063", 4},
		{"\x1b\xff\xf7", 3},
		{"\x1b[A\b\x15\x1b\x00\xff\xff\n\xff", 100},
	} {
		var f Filter
		for i := range c.sent {
			if f.CRLF() != (i >= c.want) {
				t.Errorf("%q: CRLF is %v after %d bytes", c.sent, f.CRLF(), i)
			}
			if needsCRLF([]byte(c.sent[:i])) != f.CRLF() {
				t.Errorf("%q: the oracle of CRLF differs after %d bytes", c.sent, i)
			}
			f.Next(nil, []byte(c.sent[i:i+1]), limit)
		}
		if f.CRLF() != (len(c.sent) >= c.want) {
			t.Errorf("%q: CRLF is %v at the end", c.sent, f.CRLF())
		}
	}
}

// All short inputs of the bytes that mean something, and their neighbors.
func TestNextShort(t *testing.T) {
	alphabet := []byte("\x00\x01\x03\x04\x06\b\t\n\r\x15\x17\x1b \x7f09?@AO[~\x80\xbf\xc0\xc2\xdf\xe0\xef\xf0\xf4\xf5\xf7\xf8\xfa\xfb\xfd\xfe\xff")
	for _, before := range []string{"5", "5\x1b", "5\x1b[", "5\x1bO", "5\x1b\xf0", "5\r", "5\xff", "5\xff\xfd", "5\xff\xfa", "5\xff\xfa\xff"} {
		for b := range 256 {
			for _, after := range []string{"6\n", "\x80\x81\x82\x83", "A\r7", "\xff\xf06\n"} {
				check(t, limit, []byte(before+string(inBytes(string(rune(b))))+after))
			}
		}
		for _, b := range alphabet {
			for _, c := range alphabet {
				check(t, limit, append([]byte(before), b, c, '8', '\n'))
			}
		}
	}
}

// pieces are what people's terminals send, and what comes near it.
var pieces = []string{
	"1", "72", "-5", " ", "\t", "\n", "\n", "\r\n", "\r\x00", "\r", "\x00", "\b", "\x7f", "\xff\xf7", "\x15", "\x17", "\xff\xf8",
	"\x1b", "\x1b[", "\x1b[A", "\x1b[[B", "\x1b[15;2~", "\x1bO", "\x1bOP", "\x1bO5Q", "\x1bx", "\x1bé", "\x1b\U0001f600", "[", "O", ";", "~",
	"é", "€", "\U0001f600", "\xc3", "\xe2", "\x82", "\x80", "\xf0\x9f", "\xff\xff", "\xff", "\xff\xfb\x01", "\xff\xfb", "\xff\xfe\r",
	"\xff\xfa\x18\x00xterm\n\xff\xf0", "\xff\xfa\xff", "\xf0", "\xff\xf0", "\xff\xf1", "\xff\xf9", "\x01", "\a",
	"\xff\xfd\x06", "\xff\xed\xff\xfd\x06", "\xff\xfd\x06\xff\xfd\x06", "\xff\xfd", "\xff\xfb\x06", "\x06", "\x1a", "\x1f", "\x1b7",
	"0000000000000000000000000000000", "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
}

// These end the input, so they are rarer.
var endings = []string{"\x03", "\x04", "\xff\xf4", "\xff\xf3"}

// Random mixtures of all that can be sent give what the oracle says, however they are cut.
func TestNextRandom(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	withoutCRLF := slices.DeleteFunc(slices.Clone(pieces), func(piece string) bool {
		return piece != "\xff\xff" && (strings.Contains(piece, "\xff") || strings.Contains(piece, "\r"))
	})
	seen := make(map[string]int)
	for i := range 1500 {
		from := [][]string{pieces, withoutCRLF}[i%2]
		var sent []byte
		for range 1 + random.IntN(30) {
			switch n := random.IntN(100); {
			case n < 4:
				sent = append(sent, endings[random.IntN(len(endings))]...)
			case n == 4:
				sent = append(sent, byte(random.IntN(256)))
			default:
				sent = append(sent, from[random.IntN(len(from))]...)
			}
		}
		limit := []int{limit, limit, limit, limit, 5, 0}[random.IntN(6)]
		for _, e := range check(t, limit, sent, random.IntN(len(sent)), random.IntN(len(sent))) {
			seen[fmt.Sprintf("end %d, CRLF %v, text %v", e.end, e.crlf, e.text != "")]++
		}
	}
	if len(seen) != 6*2*2-2-2 { // all but lines too long without text, and timing marks without CRLF
		t.Errorf("the random inputs are too much alike: %v", seen)
	}
}

// A line may be in an array of its own, which grows.
func TestNextAppends(t *testing.T) {
	var f Filter
	line := make([]byte, 1, 2)
	line[0] = '7'
	input := []byte("2\b34\r\n5")
	line, rest, end := f.Next(line, input, limit)
	if string(line) != "734" || string(rest) != "\n5" || end != LineEnd || string(input) != "2\b34\r\n5" {
		t.Errorf("got %q, %q, %v; the input is %q", line, rest, end, input)
	}
	line, rest, end = f.Next(nil, rest, limit)
	if string(line) != "5" || len(rest) > 0 || end != None {
		t.Errorf("got %q, %q, %v", line, rest, end)
	}
}

// The answer to a timing mark is that there will be none: IAC WONT TIMING-MARK.
func TestWontTimingMark(t *testing.T) {
	if WontTimingMark != "\xff\xfc\x06" {
		t.Errorf("got %q", WontTimingMark)
	}
}

// There is a Filter for each of ten thousand connections.
func TestSize(t *testing.T) {
	if size := unsafe.Sizeof(Filter{}); size > 4 {
		t.Errorf("a Filter has %d bytes", size)
	}
}

// FuzzNext says that a Filter gives what the oracle says, however the input is cut.
func FuzzNext(f *testing.F) {
	for i := range pieces {
		f.Add([]byte("72"+pieces[i]+pieces[(i*7+3)%len(pieces)]+"3\n4"+endings[i%len(endings)]), uint16(i%8), byte(limit))
	}
	f.Fuzz(func(t *testing.T, sent []byte, cut uint16, limit byte) {
		check(t, int(limit), sent, min(int(cut), len(sent)))
	})
}

// BenchmarkNext takes lines of digits, beside a loop that cuts and copies them.
func BenchmarkNext(b *testing.B) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, digits := range []int{0, 2, 15, 64, -15} {
		name := fmt.Sprintf("%d digits", digits)
		if digits < 0 {
			name = fmt.Sprintf("up to %d digits", -digits)
		}
		var sent []byte
		for len(sent) < 4000 {
			n := digits
			if n < 0 {
				n = 1 + random.IntN(-n)
			}
			sent = append(sent, strings.Repeat("7", n)+"\n"...)
		}
		run := func(name string, lines func()) {
			b.Run(name, func(b *testing.B) {
				for b.Loop() {
					lines()
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(sent)), "ns/byte")
				b.ReportMetric(0, "ns/op")
			})
		}
		var buffer [limit + 2]byte
		run(name+"/Next", func() {
			var f Filter
			for rest := sent; len(rest) > 0; {
				_, rest, _ = f.Next(buffer[:0], rest, limit)
			}
		})
		run(name+"/Cut", func() {
			var line []byte
			for rest := sent; len(rest) > 0; {
				line, rest, _ = bytes.Cut(rest, []byte("\n"))
				copy(buffer[:], line)
			}
		})
	}
}
