# Sourced by run: what its sessions have in common. Everything that they start is in
# a process group that they remember, or in a tmux server of their own, and ends
# with the script.

work=$(mktemp -d)
groups=()
namespaces=()
passed=0

cleanup() {
	local group namespace
	exec 2>/dev/null # bash would report each process that is killed
	for group in "${groups[@]}"; do kill -KILL -- "-$group" || true; done
	for namespace in "${namespaces[@]}"; do ip netns delete "$namespace" || true; done
	tmux -S "$work/tmux" kill-server || true
	rm -rf "$work"
}
trap cleanup EXIT

pass() {
	passed=$((passed + 1))
	echo "session: ok: $*"
}

fail() {
	local file window
	set +e
	{
		for file in "$work"/*.log "$work"/*.out "$work"/*.err; do
			[[ -s $file ]] && echo "--- $(basename "$file")" && tail -n 30 "$file"
		done
		tmux -S "$work/tmux" list-windows -F '#{window_name}' 2>/dev/null | while IFS= read -r window; do
			echo "--- window $window"
			screen "$window" | grep . | tail -n 30
		done
		echo "session: $*"
		echo "session: $passed passed, 1 failed"
	} >&2
	exit 1
}

# soon SECONDS COMMAND... tries the command until it succeeds.
soon() {
	local end=$((SECONDS + $1))
	shift
	until "$@"; do
		((SECONDS < end)) || return 1
		sleep 0.1
	done
}

# start NAME COMMAND starts a shell's command in a process group of its own, as a
# terminal does, and with SIGINT not ignored, even if run itself is in the background. Its
# outputs go to NAME.out and NAME.err, its group is $group.
start() {
	rm -f "$work/$1".{out,err} # before anybody looks for what this one says
	set -m
	env --default-signal=INT bash -c "$2" </dev/null >"$work/$1.out" 2>"$work/$1.err" &
	group=$!
	set +m
	groups+=("$group")
}

# gone GROUP succeeds when no process is left in the group. In a container nobody may wait
# for orphans, so those that have ended do not count.
gone() { ps -eo pgid=,stat= | awk -v group="$1" '$1 == group && $2 !~ /^Z/ { left = 1 } END { exit left }'; }

# interrupt GROUP does what Ctrl-C does, and waits.
interrupt() {
	kill -INT -- "-$1" 2>/dev/null || true
	soon 20 gone "$1" || fail "process group $1 goes on after Ctrl-C"
	wait "$1" || true
}

# listening LOG prints the port that the server with this log listens on.
listening() { sed -n 's/.* listening on [^;]*:\([0-9]*\);.*/\1/p' "$1" 2>/dev/null | tail -n 1 | grep .; }

# window NAME COMMAND types the command into a new terminal. NAME.raw is what it shows.
window() {
	tmux -S "$work/tmux" -f /dev/null new-session -d -s "$1" -n "$1" -x 200 -y 50 \
		"cd '$PWD' && PS1='$ ' exec bash --norc --noprofile"
	tmux -S "$work/tmux" pipe-pane -t "$1" "cat >'$work/$1.raw'"
	type_in "$1" "$2"
}

# enter WINDOW KEYS types keys that are no line and then Enter, each as tmux names it.
enter() {
	local window=$1 key
	shift
	for key in "$@" Enter; do press "$window" "$key"; done
}

type_in() { tmux -S "$work/tmux" send-keys -t "$1" -l "$2" && press "$1" Enter; }
press() { tmux -S "$work/tmux" send-keys -t "$1" "$2"; }
screen() { tmux -S "$work/tmux" capture-pane -p -J -S - -t "$1"; }
shows() { screen "$1" | grep -q -- "$2"; }

# see WINDOW PATTERN waits until the pattern is on the screen.
see() { soon 20 shows "$1" "$2" || fail "$1 does not show '$2' within 20 s"; }

# whole FILE checks that the file holds nothing but whole blocks, one after another,
# as spew.Dump prints them, and prints how many.
whole() {
	tr -d '\r' <"$1" | awk '
		BEGIN { split("Index Timestamp BPM Hash PrevHash Validator", keys) }
		{ expected = at == 0 ? "(main.Block) {" : at == 7 ? "}" : " " keys[at] ": " }
		index($0, expected) != 1 { print "line " NR ": " $0; exit 1 }
		at == 1 { if (blocks++ && $3 + 0 != last + 1) { print "block " $3 " after " last; exit 1 }; last = $3 + 0 }
		{ at = (at + 1) % 8 }
		END { if (at) exit 1; print blocks }'
}
