# Sourced by run: runs the commands that README.md and docs/ show, as they show them, and checks
# what they print. A command is a line that begins with "$ " in a fenced block, and code in the text
# that has a blank in it or is a program in this directory; but in docs/protocol.md such code is
# what the server says. The commands of docs/service.md are run by service.sh.
#
# They run in a copy of the checkout. Its .env shortens the rounds; it counts less than what a
# command sets.

# These are not run here.
skipped=(
	'make test' # run has run it
	'make check'
	'make bench' # takes minutes
	'set localecho' # is for Windows
	'sudo ufw allow 9000/tcp' # would change this machine
	'sudo iptables -I INPUT -s 192.168.1.23 -p tcp --dport 9000 -j DROP'
)

# commands_in FILE prints its commands, one a line.
commands_in() {
	awk -v inline="$([[ $1 == docs/protocol.md ]] || echo 1)" '
		/^```/ { fenced = !fenced; next }
		fenced { if (sub(/^\$ /, "")) print; next }
		!inline { next }
		{
			parts = split($0, part, "`")
			if (NF && parts % 2 == 0) { print "code that goes over the end of line " NR; next }
			for (i = 2; i < parts; i += 2)
				if (part[i] ~ / / || part[i] ~ /^\.\// || part[i] == "make") print part[i]
		}' "$1"
}

copy=$work/copy
server='' # the group of the server on port 9000, if it runs
second='' # and of the one on port 9100

# stop_server stops the server on port 9000, and stop_second the other one.
stop_server() {
	[[ -z $server ]] || interrupt "$server"
	server=''
}
stop_second() {
	[[ -z $second ]] || interrupt "$second"
	second=''
}

# serve_as COMMAND LOG starts a server with the command, after the end of the one on its port. Its
# log is in the file LOG, or is its standard error.
serve_as() {
	local port=9000 name=server
	if [[ $1 =~ PORT=9100 ]]; then
		port=9100 name=second
	fi
	stop_"$name"
	log=${2:-$work/$name.err}
	rm -f "$log"
	start "$name" "$1"
	declare -g "$name=$group"
	soon 60 listening "$log" >/dev/null || fail "'$1' starts no server"
	[[ $(listening "$log") == "$port" ]] || fail "'$1' does not listen on port $port"
}

# chain_has COUNT succeeds if the chain has so many blocks.
chain_has() { (($(wc -l <chain.jsonl) >= $1)); }
need_server() { [[ -n $server ]] || serve_as 'make run'; }
need_chain() {
	need_server
	until chain_has 3; do printf '100\n72\n' | timeout 30 nc -N localhost 9000 >/dev/null || fail 'no block joins the chain'; done
}
latest_three() { [[ $(grep '^\[{' "$work/listener.out" | tail -n 1 | jq -c '[length, .[0].Index > 0]') == '[3,true]' ]]; }
# rounds_of CANDIDATES LOG COUNT succeeds if the log has so many rounds of these candidates.
rounds_of() { (($(grep -c "candidates: $1" "$2") >= $3)); }

# projected COUNT succeeds if so many blocks, and nothing else, are on the projector.
projected() {
	(($(wc -l <"$work/projector.out") >= $1)) &&
		! grep -Evq '^\[[0-9]+,-?[0-9]+,"[0-9a-f]{8}",("[0-9a-f]{8}"|""),("[0-9a-f]{8}"|"")\]$' "$work/projector.out"
}

# need_class joins thirty validators, all from this machine and hence without MAX_PER_ADDRESS.
need_class() {
	gone "$thirty" || return 0
	serve_as 'MAX_STAKE=1000 make run 2>server.log' server.log
	start thirty 'bash docs/validators.sh $(seq 10 10 300)'
	thirty=$group
	soon 30 rounds_of '30, tokens: 4650' server.log 3 || fail "the thirty are not in one draw: $(tail -n 5 server.log)"
}

# half_close COMMAND runs a command whose one client hears that it has won.
half_close() {
	need_server
	sleep 2 # until whoever came before is out of the draw
	output=$(timeout 30 bash -c "$1") || fail "'$1' does not end"
	[[ $output == *'(you) with 100 of 100 tokens' ]] || fail "'$1' says $output"
}

run_command() {
	local command=$1 output before
	case $command in
	'make run')
		serve_as "$command"
		grep -q 'the chain is in "chain.jsonl"' "$log" || fail 'no chain.jsonl'
		soon 20 grep -q '^}' "$work/server.out" || fail 'no block is printed'
		[[ $(whole "$work/server.out") == 1 ]] || fail "standard output of '$command' is not the chain"
		;;
	'nc localhost 9000')
		need_server
		start client "(echo 100; sleep 0.5; echo 72; sleep 60) | $command"
		soon 15 grep -q 'winning validator: .* (you) with 100 of 100 tokens' "$work/client.out" || fail "no winner in '$command'"
		interrupt "$group"
		;;
	'telnet localhost 9000')
		need_server
		window telnet-readme "$command"
		see telnet-readme 'Enter token balance:'
		type_in telnet-readme 100
		see telnet-readme 'stakes 100 tokens'
		enter telnet-readme C-d
		see telnet-readme 'closed by foreign host'
		;;
	'rlwrap nc localhost 9000')
		need_server
		window rlwrap "$command"
		see rlwrap 'Enter token balance:'
		type_in rlwrap 100
		see rlwrap 'stakes 100 tokens'
		type_in rlwrap 71
		see rlwrap 'winning validator: .*(you)'
		enter rlwrap Up BSpace 3
		see rlwrap 'proposed with BPM 73:'
		press rlwrap C-c
		see rlwrap '[$] *$'
		;;
	printf*' | nc -N localhost 9000')
		half_close "$command"
		;;
	'nc -q 60 localhost 9000') # the traditional one
		half_close "printf '100\n72\n' | ${command/nc/nc.traditional}"
		;;
	'PORT=9100 make run')
		stop_server
		serve_as "$command"
		stop_second
		;;
	'PORT=9100 CHAIN_FILE=second.jsonl make run')
		need_server
		serve_as "$command"
		[[ -s second.jsonl ]] || fail 'no second.jsonl'
		gone "$server" && fail 'the first server does not go on'
		stop_second
		;;
	'HOST=localhost make run')
		serve_as "$command"
		grep -Eq 'listening on (127\.0\.0\.1|\[::1\]):' "$log" || fail 'it does not listen on localhost only'
		;;
	'ROUND_INTERVAL=5s make run')
		serve_as "$command"
		grep -q 'a draw every 5s' "$log" || fail 'rounds do not take 5 s'
		stop_server
		;;
	'go run main.go')
		output=$(bash -c "$command" 2>&1) && fail "'$command' runs, though README says that it does not"
		[[ $output == *undefined:* ]] || fail "'$command' says $output"
		;;
	'go run .')
		serve_as "$command"
		stop_server
		;;
	make)
		[[ $(bash -c "$command") == *'make run '* ]] || fail "'make' does not say what there is"
		;;
	'./proof-of-stake -h')
		[[ $(bash -c "$command") == *"$(<.env.example)" ]] || fail "'$command' does not end with .env.example"
		;;
	'cp .env.example .env')
		mv .env kept
		bash -c "$command"
		serve_as 'make run'
		grep -q 'a draw every 30s, a broadcast of the chain every 1m0s' "$log" || fail '.env.example is not the defaults'
		stop_server
		mv kept .env
		;;
	'shasum -a 256')
		[[ $(bash -c "$command" <README.md) == "$(sha256sum <README.md)" ]] || fail "'$command' is not sha256sum"
		;;
	'sed -n 2p chain.jsonl'*'sha256sum')
		need_chain
		hash=$(bash -c "$command")
		[[ ${hash%  -} == "$(sed -n 2p chain.jsonl | jq -r .Hash)" ]] || fail "block 1 hashes to $hash"
		;;
	*'jq -r .Hash')
		[[ "$(bash -c "$command")  -" == "$hash" ]] || fail "block 1 should have the hash $hash"
		;;
	'cp chain.jsonl backup.jsonl')
		bash -c "$command"
		CHAIN_FILE=backup.jsonl serve_as 'make run'
		grep -q 'the chain is in "backup.jsonl"' "$log" || fail 'a server does not start on the backup'
		stop_server
		;;

	# The lesson. Its commands belong together, in this order.
	'MAX_STAKE=1000 make run 2>server.log' | 'MAX_PER_ADDRESS=3 MAX_STAKE=1000 make run 2>server.log')
		need_chain
		serve_as "$command" server.log
		[[ ! -s $work/server.err ]] || fail 'there is more on standard error'
		soon 20 grep -q "blocks: $(wc -l <chain.jsonl)\$" server.log || fail 'the chain does not go on'
		soon 20 grep -q '^}' "$work/server.out" || fail 'the terminal shows no block'
		if [[ $command == MAX_PER_ADDRESS* ]]; then
			soon 20 gone "$thirty" || fail 'the thirty do not end with the server'
			start pupil 'for fd in 3 4 5; do eval "exec $fd<>/dev/tcp/127.0.0.1/9000"; echo 1 >&$fd; done; sleep 60'
			soon 20 grep -q 'validators: 3, tokens: 3' server.log || fail 'three cannot join from one address'
			[[ $(nc 127.0.0.1 9000 </dev/null) == 'too many connections from your address, try again later' ]] || fail 'a fourth can'
			interrupt "$group"
			return
		fi
		[[ $(echo 1001 | nc -N localhost 9000) == *'must be a whole number from 1 to 1000, got "1001"; the connection is closed, join again' ]] ||
			fail 'a stake of 1001 is accepted'
		;;
	'mv chain.jsonl rehearsal.jsonl')
		stop_server
		interrupt "$projector"
		bash -c "$command"
		;;
	'tail -n +1 -f chain.jsonl | jq '*)
		start projector "$command"
		projector=$group
		soon 20 projected 3 || fail 'the projector does not show the chain'
		;;
	'tail -f server.log')
		start teacher "$command"
		soon 20 grep -q ' listening on ' "$work/teacher.out" || fail "'$command' does not show the log"
		interrupt "$group"
		;;
	'nc 192.168.1.20 9000') # with this machine's address, which the log shows
		output=$(sed -n 's/.* from other machines: //p' server.log | head -n 1)
		start pupil "(echo 50; sleep 0.5; echo seventy; sleep 60) | ${output:-nc localhost 9000}"
		soon 20 grep -q 'got "seventy": 50 staked tokens forfeited' "$work/pupil.out" || fail 'a typo costs no stake'
		interrupt "$group"
		;;
	'bash docs/validators.sh $('*'seq'*)
		start thirty "$command"
		thirty=$group
		soon 30 rounds_of '30, tokens: 4650' server.log 3 || fail "the thirty are not in one draw: $(tail -n 5 server.log)"
		start listener "(echo 1; sleep 60) | nc localhost 9000"
		soon 30 latest_three || fail 'a broadcast is not of the latest three blocks'
		interrupt "$group"
		;;
	*'sort | uniq -c | sort -rn')
		need_class
		before=$(wc -l <chain.jsonl)
		output=$(bash -c "$command" | awk '{ blocks += $1 } $1 > last && NR > 1 { exit 1 } { last = $1 } END { print blocks + 1 }')
		((before <= output && output <= $(wc -l <chain.jsonl))) || fail "'$command' counts $output blocks"
		projected "$before" || fail 'the projector does not show new blocks'
		;;
	'LC_ALL=C awk -f docs/odds.awk server.log')
		output=$(bash -c "$command") || fail "$output"
		awk '{ won += $5; expected += $NF; if (rounds < int($7)) rounds = int($7) }
			int($3) != 310 - 10 * NR { bad = 1 } # the largest stakes of the thirty
			END { exit !(NR == 20 && !bad && won <= rounds && expected > 0.7 * rounds && expected < 1.2 * rounds) }' <<<"$output" ||
			fail "'$command' prints $output"
		;;
	'PORT=9100 ROUND_INTERVAL=200ms CHAIN_FILE= make run 2>fast.log >/dev/null')
		serve_as "$command" fast.log
		;;
	'PORT=9100 bash docs/validators.sh $('*'server.log)')
		start class "$command"
		class=$group
		soon 90 rounds_of "" fast.log 100 || fail 'a hundred rounds take more than a minute and a half'
		grep -q 'candidates: [^,]*, tokens: 4[67]' fast.log || fail 'the class is not in one draw'
		;;
	'LC_ALL=C awk -f docs/odds.awk fast.log')
		stop_second
		soon 20 gone "$class" || fail 'the class does not end with the server'
		output=$(bash -c "$command") || fail "$output"
		echo "$output"
		awk '{ won += $5; expected += $NF; if (rounds < int($7)) rounds = int($7) } int($3) > 150 { large += $5 }
			END { share = large / rounds; exit !(won <= rounds && expected > 0.7 * rounds && expected < 1.2 * rounds && share > 0.5 && share < 0.95) }' <<<"$output" ||
			fail 'that is not what the lesson promises'
		;;
	*'>tampered.jsonl' | 'hash=$('* | *'>forged.jsonl')
		eval "$command"
		;;
	'PORT=9100 CHAIN_FILE=tampered.jsonl make run')
		! cmp -s chain.jsonl tampered.jsonl || fail 'nothing was changed'
		output=$(timeout 30 bash -c "$command" 2>&1) && fail 'a server runs on a changed chain'
		[[ $output == *'line 2: block 1 was changed: its contents hash to '* ]] || fail "of the changed chain it says $output"
		;;
	'PORT=9100 CHAIN_FILE=forged.jsonl make run')
		output=$(timeout 30 bash -c "$command" 2>&1) && fail 'a server runs on a forged chain'
		[[ $output == *"line 3: block 2 does not follow: its PrevHash is "*", the Hash of block 1 is $hash"* ]] || fail "of the forged chain it says $output"
		;;

	'go test -run '*) # the benchmark itself needs a quiet machine
		[[ $(bash -c "${command/-bench/-list}") == Benchmark* ]] || fail "'$command' runs no benchmark"
		;;
	'ulimit -Hn')
		bash -c "$command" >/dev/null
		;;
	*)
		fail "README or docs/ show '$command', and .ci/docs.sh does not know what it should do"
		;;
	esac
}

# Where README says that the tutorial's names are now, they must be.
check_names() {
	local name file
	while read -r name file; do
		grep -qw -- "$name" "$file" || fail "README says that $name is in $file"
	done < <(awk -F ' [|] ' '/^[|].*[.]go [|]$/ {
		sub(/ [|]$/, "", $3)
		parts = split($2, part, "`")
		for (i = 2; i < parts; i += 2) print part[i], $3
	}' README.md)
	pass 'the names in README are in the files that it says'
}

# Of what docs/odds.awk prints, the rounds and what is expected begin when a validator joins, and
# whoever leaves counts until the next draw.
check_odds() {
	local output
	output=$(sed 's/^/2026\/11\/29 10:04:57 /' <<-'END' | LC_ALL=C awk -f docs/odds.awk
		validator a joins from 127.0.0.1:1 with 300 tokens; validators: 1, tokens: 300
		block 1: validator a wins with 300 tokens; candidates: 1, tokens: 300
		validator b joins from 127.0.0.1:2 with 100 tokens; validators: 2, tokens: 400
		validator c joins from 127.0.0.1:3 with 100 tokens; validators: 3, tokens: 500
		validator c disconnects; its stake counts until the next draw
		block 2: validator b wins with 100 tokens; candidates: 2, tokens: 400
		block 3: validator a wins with 300 tokens; candidates: 2, tokens: 400
	END
	)
	[[ $output == 'a stakes 300: won 2 of 3, expected 2.4
b stakes 100: won 1 of 2, expected 0.5' ]] || fail "docs/odds.awk prints $output" # 1 + 3/5 + 3/4, 1/5 + 1/4
	pass 'docs/odds.awk'
}

# The files that README and docs/ link to are there.
check_links() {
	local file link
	for file in README.md docs/*.md; do
		while read -r link; do
			[[ -e $(dirname "$file")/$link ]] || fail "$file links to $link"
		done < <(grep -o '](\([^)#]*\)' "$file" | cut -c 3- | grep -v '^https:')
	done
	pass 'what README and docs/ link to is there'
}

for port in 9000 9100; do
	! nc -z localhost "$port" 2>/dev/null ||
		fail "port $port is taken, and the commands use it: end what listens there and try again"
done
check_names
check_links
check_odds
git ls-files -z | xargs -0 cp --parents -t "$(mkdir "$copy" && echo "$copy")"
mapfile -t commands < <(for file in README.md docs/*.md; do [[ $file == docs/service.md ]] || commands_in "$file"; done)
((${#commands[@]} > 30)) || fail "README and docs/ show only ${#commands[@]} commands"
cd "$copy"
printf '%s\n' ROUND_INTERVAL=1s BROADCAST_INTERVAL=2s >.env
for command in "${commands[@]}"; do
	for skip in "${skipped[@]}"; do [[ $command != "$skip" ]] || continue 2; done
	run_command "$command"
	pass "docs: $command"
done
stop_server
cd "$OLDPWD"
