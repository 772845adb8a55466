# Sourced by run: sessions with the real nc, telnet, plink and less.

# serve NAME SETTINGS... starts a server with its log in NAME.log; its port is $port.
serve() {
	start "$1" "PORT=0 HOST=localhost $2 exec ./proof-of-stake 2>'$work/$1.log'"
	soon 20 listening "$work/$1.log" >/dev/null || fail 'the server does not start'
	port=$(listening "$work/$1.log")
}

# hear FD TEXT reads from FD until TEXT has come.
hear() {
	local heard='' char
	while [[ $heard != *"$2"* ]]; do
		IFS= read -r -d '' -n 1 -t 20 -u "$1" char || fail "waited for '$2', heard '$heard'"
		heard+=$char
	done
	printf '%s' "$heard"
}

# nc and telnet through a round, a wrong BPM, a half-close, the block's hash, the stop.
nc_and_telnet() {
	serve session "ROUND_INTERVAL=2s BROADCAST_INTERVAL=3s CHAIN_FILE='$work/chain.jsonl'"
	local server=$group address client hash
	mkfifo "$work"/{nc,telnet}.{in,pipe}
	start nc "exec nc localhost $port <'$work/nc.in' >'$work/nc.pipe'"
	start telnet "exec telnet localhost $port <'$work/telnet.in' >'$work/telnet.pipe'"
	exec 3>"$work/nc.in" 4<"$work/nc.pipe" 5>"$work/telnet.in" 6<"$work/telnet.pipe"

	hear 4 'Enter token balance:' >/dev/null
	echo 100 >&3
	address=$(hear 4 'Enter a new BPM:' | sed -n 's/.*validator \([0-9a-f]*\) stakes 100 tokens.*/\1/p')
	hear 6 'Enter token balance:' >/dev/null
	echo 300 >&5
	hear 6 'stakes 300 tokens' >/dev/null
	echo 72 >&3
	hear 4 'block 1 proposed with BPM 72: 100 of 100 tokens so far, draw in ' >/dev/null
	hear 4 "winning validator: $address (you) with 100 of 100 tokens" >/dev/null
	hear 6 "winning validator: $address with 100 of 100 tokens" >/dev/null
	for client in 4 6; do
		hear "$client" '[{"Index":0,' >/dev/null
		hear "$client" "\"Validator\":\"$address\"}]" >/dev/null
	done
	echo hello >&5
	hear 6 'got "hello": 300 staked tokens forfeited' >/dev/null

	[[ $(printf '200\n65\n' | nc -N localhost "$port") == *'winning validator: '* ]] || fail 'half-closed, it heard no winner'
	hash=$(sed -n 2p "$work/chain.jsonl" | jq -cj '.Hash=""' | sha256sum | cut -d' ' -f1)
	[[ $(sed -n 2p "$work/chain.jsonl" | jq -r .Hash) == "$hash" ]] || fail "block 1 should have the hash $hash"

	kill -TERM "$server"
	hear 4 'server shutting down' >/dev/null
	wait "$server" || fail "exit status $?"
	[[ $(whole "$work/session.out") == 3 ]] || fail 'three blocks were not printed'
	pass 'nc and telnet, from the stake to the stop'
}

# In a terminal, telnet's Ctrl-C ends it at once, and its block is drawn all the same.
interrupted_telnet() {
	window telnet-interrupt "telnet localhost $port; echo it has ended"
	see telnet-interrupt 'Enter token balance:'
	type_in telnet-interrupt 100
	see telnet-interrupt 'stakes 100 tokens'
	local address
	address=$(screen telnet-interrupt | sed -n 's/.*validator \([0-9a-f]*\) stakes.*/\1/p')
	soon 20 grep -q "block 1: " "$work/clients.log" || fail 'no first draw' # so that the next is seconds away
	type_in telnet-interrupt 72
	see telnet-interrupt 'block 2 proposed with BPM 72'
	press telnet-interrupt C-c
	soon 5 shows telnet-interrupt '^it has ended' || fail 'Ctrl-C does not end telnet at once'
	! grep -q 'block 2: ' "$work/clients.log" || fail 'telnet did not end before the draw'
	soon 20 grep -q "block 2: validator $address wins with 100 tokens" "$work/clients.log" ||
		fail 'after Ctrl-C in telnet its block was not in the draw'
	pass "telnet's Ctrl-C ends it at once; its stake and block stay for the draw"
}

# PuTTY negotiates as soon as it connects.
plink_session() {
	window plink "plink -telnet -P $port localhost"
	see plink 'Enter token balance:'
	type_in plink 100
	see plink 'stakes 100 tokens'
	enter plink 7 3 BSpace 2
	see plink 'block 3 proposed with BPM 72: 100 of 100 tokens so far'
	see plink 'winning validator: [0-9a-f]* (you) with 100 of 100 tokens'
	pass 'plink -telnet from joining to a winner'
}

# bpm_of_block INDEX prints the BPM of a block in the chain's file.
bpm_of_block() { sed -n "$(($1 + 1))p" "$work/typed.jsonl" | jq .BPM; }

# wins WINDOW waits until the window's validator has won, and prints the block's index.
wins() {
	soon 20 shows "$1" 'winning validator: [0-9a-f]* (you)' || fail "$1 does not win"
	screen "$1" | sed -n 's/.*block \([0-9]*\) proposed.*/\1/p' | tail -n 1
}

# What people type in the terminals that send each key, and in those that send lines.
typed() {
	serve typed "ROUND_INTERVAL=2s CHAIN_FILE='$work/typed.jsonl'"
	local server=$group window block

	window character "telnet localhost $port"
	see character 'Enter token balance:'
	press character C-]
	see character 'telnet>'
	type_in character 'mode character'
	enter character 1 0 1 BSpace 0
	see character 'stakes 100 tokens'
	see character '^Enter a new BPM:' # and not somewhere else in the line
	enter character 7 3 BSpace Left 2
	see character 'proposed with BPM 72:'
	block=$(wins character)
	[[ $(bpm_of_block "$block") == 72 ]] || fail "block $block has BPM $(bpm_of_block "$block")"
	see character '^winning validator:'
	pass 'telnet in character mode, from joining to winning, with typing errors corrected'

	window raw "socat -,raw,echo=0 TCP:localhost:$port; echo it has ended"
	see raw 'Enter token balance:'
	enter raw 1 0 0
	see raw 'stakes 100 tokens'
	enter raw 9 9 C-u 7 4 Up
	see raw 'proposed with BPM 74:'
	block=$(wins raw)
	[[ $(bpm_of_block "$block") == 74 ]] || fail "block $block has BPM $(bpm_of_block "$block")"
	see raw '^winning validator:'
	press raw C-c
	see raw 'it has ended'
	pass 'socat, whose terminal handles no key, from joining to Ctrl-C'

	window arrow "nc localhost $port"
	see arrow 'Enter token balance:'
	type_in arrow 100
	see arrow 'stakes 100 tokens'
	enter arrow Up 7 5
	see arrow 'proposed with BPM 75:'
	wins arrow >/dev/null
	pass 'an arrow key in nc costs nothing'

	window control "nc localhost $port"
	see control 'Enter token balance:'
	type_in control 100
	see control 'stakes 100 tokens'
	enter control C-a 7 7
	see control 'proposed with BPM 77:'
	wins control >/dev/null
	pass 'Ctrl-A in nc costs nothing'

	window quoted "plink -telnet -P $port localhost"
	see quoted 'Enter token balance:'
	type_in quoted 100
	see quoted 'stakes 100 tokens'
	enter quoted C-q 7 8
	see quoted 'proposed with BPM 78:'
	wins quoted >/dev/null
	pass 'Ctrl-Q in plink costs nothing'

	window suspended "telnet localhost $port"
	see suspended 'Enter token balance:'
	type_in suspended 100
	see suspended 'stakes 100 tokens'
	press suspended C-z # throws away all output until its timing mark is answered
	type_in suspended 73
	see suspended 'proposed with BPM 73:'
	wins suspended >/dev/null
	pass 'telnet after Ctrl-Z hears the winner'

	window end-of-input "telnet localhost $port; echo it has ended"
	see end-of-input 'Enter token balance:'
	type_in end-of-input 100
	see end-of-input 'stakes 100 tokens'
	type_in end-of-input 76
	see end-of-input 'proposed with BPM 76:'
	enter end-of-input C-d
	wins end-of-input >/dev/null
	see end-of-input 'it has ended'
	! grep -q forfeits "$work/typed.log" || fail 'a key has cost a stake'
	pass "Ctrl-D in telnet ends its input; it still hears of the round's winner"

	window forfeit "nc localhost $port; echo it has ended"
	see forfeit 'Enter token balance:'
	type_in forfeit 100
	see forfeit 'stakes 100 tokens'
	type_in forfeit abc
	see forfeit 'got "abc": 100 staked tokens forfeited; the connection is closed, join again'
	pass 'a forfeit says that the session is over'
	interrupt "$server"
}

# proposer is a shell's text: a validator that proposes a block every PAUSE seconds
# without starting a process each time.
proposer() {
	echo "mkfifo '$work/$1.pause'; exec 9<>'$work/$1.pause';" \
		"(echo 100; while ! read -r -t $2 -u 9; do echo 72 || exit; done) | exec nc localhost $port"
}

drawn() { grep -c ' wins ' "$work/$1.log" || true; }
heard() { grep -c '^winning validator: .*(you)' "$work/$1.out" || true; }
heard_at_least() { (($(heard "$1") >= $2)); }
drawn_at_least() { (($(drawn "$1") >= $2)); }

# shown WINDOW succeeds when it has shown all blocks. Ctrl-C would make it discard the rest.
shown() { (($(grep -c 'main[.]Block) {' "$work/$1.raw") == $(drawn "$1") + 1)); }

# stopped_terminal NAME COMMAND checks that a terminal that is stopped with Ctrl-S holds up
# nobody, and gets every block later. The command shares the terminal.
stopped_terminal() {
	window "$1" "{ until grep -q listening '$work/$1.log'; do sleep 0.1; done; $2; } & PORT=0 HOST=localhost ROUND_INTERVAL=20ms CHAIN_FILE= ./proof-of-stake 2>'$work/$1.log'"
	soon 20 listening "$work/$1.log" >/dev/null || fail 'the server in a terminal does not start'
	port=$(listening "$work/$1.log")
	press "$1" C-s
	local heard_so_far size
	start "$1-client" "$(proposer "$1" 0.01)"
	soon 30 heard_at_least "$1-client" 300 || fail 'draws stop when the terminal is stopped'
	sleep 1
	size=$(stat -c %s "$work/$1.raw")
	((size < 300 * 400)) || fail "Ctrl-S did not stop the terminal: $size bytes"
	heard_so_far=$(heard "$1-client")
	soon 20 heard_at_least "$1-client" $((heard_so_far + 50)) || fail 'draws stop when the terminal is stopped'
	press "$1" C-q
	kill -TERM -- "-$group"
	sleep 1 # for the last draw
	soon 20 shown "$1" || fail "not all of $(drawn "$1") blocks and the first are shown"
	press "$1" C-c
	see "$1" '[$] *$'
	grep -q 'shutting down' "$work/$1.log" || fail 'Ctrl-C did not stop the server'
	! grep -q 'left out' "$work/$1.log" || fail 'blocks were left out'
	# The command, the prompts and ^C are on the screen too; bash ends bracketed paste before the first block.
	tr -d '\r' <"$work/$1.raw" | sed -n 's/^\x1b\[?2004l//; /^(main.Block) {/,/^}/p' >"$work/$1.blocks"
	[[ $(whole "$work/$1.blocks") == $(($(drawn "$1") + 1)) ]] ||
		fail "of $(drawn "$1") blocks and the first it printed: $(whole "$work/$1.blocks")"
	pass "$1 holds up no draw; after Ctrl-Q all $(drawn "$1") blocks are there, whole and in order"
}

# A less that shows its first screen holds up nobody. What is too much is counted.
less_that_waits() {
	window less "PORT=0 HOST=localhost ROUND_INTERVAL=2ms CHAIN_FILE= ./proof-of-stake 2>'$work/less.log' | less"
	soon 20 listening "$work/less.log" >/dev/null || fail 'the server before less does not start'
	port=$(listening "$work/less.log")
	start less-client "$(proposer less 0.002)"
	soon 120 drawn_at_least less 3500 || fail 'draws stop when less does not read'
	see less 'main.Block'
	kill -TERM -- "-$group"
	press less G # to the end
	soon 20 grep -q 'blocks left out of standard output: [0-9]' "$work/less.log" ||
		fail 'the log does not say how many blocks less did not get'
	press less C-c
	soon 20 grep -q 'shutting down' "$work/less.log" || fail 'Ctrl-C did not stop the server'
	press less q
	see less '[$] *$'
	pass "less holds up no draw: $(drawn less) blocks;$(sed -n 's/.*\( blocks left out.*\)/\1/p' "$work/less.log" | head -n 1)"
}

sessions() {
	nc_and_telnet
	serve clients 'ROUND_INTERVAL=8s CHAIN_FILE='
	local server=$group
	printf '1\n1\n' | nc -N localhost "$port" >/dev/null & # wins block 1
	wait $!
	interrupted_telnet
	plink_session
	interrupt "$server"
	typed
	stopped_terminal Ctrl-S true
	stopped_terminal non-blocking-Ctrl-S 'dd if=/dev/null oflag=nonblock status=none'
	less_that_waits
}
