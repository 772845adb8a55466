// Package telnet turns what terminals send into the lines that people meant to type. It
// knows the line ends, the keys that erase, the escape sequences of other keys, and
// telnet's commands. It agrees to no option, so telnet clients keep their defaults. The one
// command to be answered asks for a timing mark (RFC 860), since some clients throw away
// all output until they have the answer.
//
// The input passes two layers. The lower one takes out telnet's commands (RFC 854, and RFC
// 855 for subnegotiations); those that stand for a key become its control character. The
// upper one edits the line. Enter is LF, CR LF, CR NUL (as RFC 1123, section 3.3.1, demands)
// or CR. Escape sequences (ECMA-48: those that CSI and SS3 begin, and others) do nothing.
package telnet

import "unicode/utf8"

// A Filter turns the bytes that a client sends into lines. Its zero value is ready to
// use. It keeps its place in a command and in an escape sequence, but no text.
type Filter struct {
	command byte        // of the lower layer: IAC, or after it SB, WILL, WONT, DO or DONT; 0 outside of commands
	escape  escapeState // of the upper layer
	crlf    bool
}

// CRLF reports whether the client has sent a CR or a telnet command so far. To such
// clients a line must end with \r\n, since at \n some of them stay in the column.
func (f *Filter) CRLF() bool { return f.crlf }

// An End says why Next returned.
type End byte

const (
	None       End = iota // the input is used up; the line goes on
	TimingMark            // telnet's DO TIMING-MARK, which WontTimingMark answers; the line goes on
	LineEnd               // Enter
	TooLong               // the line holds more bytes than the limit
	EndOfInput            // Ctrl-D: the line is the last one
	Interrupt             // Ctrl-C, or telnet's IP or BRK: the line does not count
)

// WontTimingMark is the answer to TimingMark: IAC WONT TIMING-MARK.
const WontTimingMark = "\xff\xfc\x06"

const (
	nul   = 0x00
	ctrlC = 0x03
	ctrlD = 0x04
	bs    = 0x08
	ctrlU = 0x15
	ctrlW = 0x17
	esc   = 0x1b
	del   = 0x7f
)

// Next reads the input up to the next End, and returns the line's text and what is left of
// the input. The line is what the call before has returned if that ended with None or
// TimingMark, otherwise empty; Next appends to it and erases from it. It is too long as soon
// as it holds limit+1 bytes. After TooLong, EndOfInput and Interrupt the input is over: Next
// must not be called again.
//
// Line and input may share an array in which the line ends where the input begins, or
// before: Next never appends more bytes than it has read.
func (f *Filter) Next(line, input []byte, limit int) (text, rest []byte, end End) {
	for len(input) > 0 {
		b := input[0]
		input = input[1:]
		if f.command != 0 || b == iac {
			if f.command == do && b == timingMark {
				f.command = 0
				return line, input, TimingMark
			}
			var ok bool
			if b, ok = f.decode(b); !ok {
				continue
			}
		}
		if f.escape != noEscape && f.ignore(b) {
			continue
		}
		switch b {
		case '\n':
			return line, input, LineEnd
		case '\r':
			f.crlf = true
			f.escape = afterCR
			return line, input, LineEnd
		case ctrlC:
			return line, input, Interrupt
		case ctrlD:
			return line, input, EndOfInput
		case bs, del:
			_, size := utf8.DecodeLastRune(line)
			line = line[:len(line)-size]
		case ctrlU, ctrlW:
			line = line[:0]
		case esc:
			f.escape = afterESC
		default:
			if b < ' ' && b != '\t' {
				continue // other control characters do nothing
			}
			line = append(line, b)
			n := printable(input[:min(len(input), limit+1-len(line))]) // for speed; see docs/measurements.md
			line = append(line, input[:n]...)
			input = input[n:]
			if len(line) > limit {
				return line, input, TooLong
			}
		}
	}
	return line, input, None
}

// printable returns how many bytes at the beginning of p are printable ASCII.
func printable(p []byte) int {
	for i, b := range p {
		if b < ' ' || b >= del {
			return i
		}
	}
	return len(p)
}

const (
	se  = 240 // end of subnegotiation
	brk = 243 // break
	ip  = 244 // interrupt process
	ec  = 247 // erase character
	el  = 248 // erase line
	sb  = 250 // subnegotiation; anything follows, then IAC SE
	do  = 253 // an option follows, as after WILL (251), WONT and DONT
	iac = 255 // interpret as command

	timingMark = 6 // an option
	subIAC     = 1 // no command: what Filter.command is after SB and IAC
)

// decode takes the bytes of a command, from IAC on. It returns the byte that a command
// stands for, if it stands for one and b completes it.
func (f *Filter) decode(b byte) (decoded byte, ok bool) {
	command := f.command
	f.command = 0
	switch command {
	case 0:
		f.command = iac
	case iac:
		if b == iac { // no command but the byte itself
			return iac, true
		}
		f.crlf = true
		switch {
		case b == ec:
			return bs, true
		case b == el:
			return ctrlU, true
		case b == ip, b == brk:
			return ctrlC, true
		case b >= sb: // SB, WILL, WONT, DO or DONT
			f.command = b
		}
	case sb:
		f.command = sb
		if b == iac {
			f.command = subIAC
		}
	case subIAC:
		if b != se {
			f.command = sb
		}
	}
	return 0, false
}

// An escapeState says where in an escape sequence the input is, or that it is after a CR.
type escapeState byte

const (
	noEscape escapeState = iota
	lacks1               // in the character that ends a sequence, which lacks 1 byte
	lacks2               // or 2
	lacks3               // or 3
	afterESC             // ESC
	afterCSI             // ESC [
	inCSI                // ESC [, perhaps [ (the Linux console's), bytes from 20 to 3f
	afterSS3             // ESC O, perhaps digits
	afterCR
)

// ignore takes the bytes after an ESC or a CR. It reports whether b still belongs to the
// escape sequence or the line end.
func (f *Filter) ignore(b byte) bool {
	state := f.escape
	f.escape = noEscape
	switch {
	case state == afterCR:
		return b == '\n' || b == nul
	case b < ' ', b == del, state == afterESC && '0' <= b && b <= '9': // ends any sequence
		return false
	case state == afterESC && b == '[':
		f.escape = afterCSI
	case state == afterCSI && b == '[', (state == afterCSI || state == inCSI) && b <= '?':
		f.escape = inCSI
	case state == afterCSI || state == inCSI:
		return b < del
	case state == afterESC && b == 'O', state == afterSS3 && '0' <= b && b <= '9':
		f.escape = afterSS3
	case state <= lacks3 && utf8.RuneStart(b):
		return false
	case state <= lacks3:
		f.escape = state - 1
	case 0xc2 <= b && b <= 0xdf: // a sequence's last character, if it is UTF-8
		f.escape = lacks1
	case 0xe0 <= b && b <= 0xef:
		f.escape = lacks2
	case 0xf0 <= b && b <= 0xf4:
		f.escape = lacks3
	}
	return true
}
