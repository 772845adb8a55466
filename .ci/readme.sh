# Sourced by run: runs the commands that README.md shows, as it shows them, and checks
# what they print. README's commands are the lines that begin with "$ " in its fenced blocks,
# and the code in its text that has a blank in it or is a program in this directory.
#
# They run in a copy of the checkout. Its .env shortens the rounds; it counts less than what a
# command sets.

# These are not run here.
skipped=(
	'make test'  # run has run it
	'make bench' # takes minutes
)

readme_commands() {
	awk '
		/^```/ { fenced = !fenced; next }
		fenced { if (sub(/^\$ /, "")) print; next }
		{
			parts = split($0, part, "`")
			if (NF && parts % 2 == 0) { print "code that goes over the end of line " NR; next }
			for (i = 2; i < parts; i += 2)
				if (part[i] ~ / / || part[i] ~ /^\.\// || part[i] == "make") print part[i]
		}' README.md | awk '!seen[$0]++'
}

copy=$work/copy
server='' # the group of the server on port 9000, if it runs

stop_server() {
	[[ -z $server ]] || interrupt "$server"
	server=''
}

# serve_as COMMAND LOG starts a server with the command, after the end of the one before it. Its
# log is in the file LOG, or is its standard error.
serve_as() {
	local port=9000
	[[ $1 =~ PORT=([0-9]+) ]] && port=${BASH_REMATCH[1]}
	[[ $port != 9000 ]] || stop_server
	rm -f server.log
	start readme-server "$1"
	log=${2:-$work/readme-server.err}
	soon 60 listening "$log" >/dev/null || fail "'$1' starts no server"
	[[ $(listening "$log") == "$port" ]] || fail "'$1' does not listen on port $port"
	[[ $port != 9000 ]] || server=$group
}

# chain_has COUNT succeeds if the chain has so many blocks.
chain_has() { (($(wc -l <chain.jsonl) >= $1)); }
need_server() { [[ -n $server ]] || serve_as 'make run'; }
need_chain() {
	need_server
	chain_has 2 || printf '100\n72\n' | nc -N localhost 9000 >/dev/null
	soon 10 chain_has 2 || fail 'no block joins the chain'
}
latest_five() { [[ $(grep '^\[{' "$work/readme-client.out" | tail -n 1 | jq -c '[length, .[0].Index > 0]') == '[5,true]' ]]; }
joined() { (($(grep -c ' joins with ' server.log) == $1)); }
rounds_of_two() { (($(grep -c 'candidates: 2,' server.log) >= 100)); }

run_readme_command() {
	local command=$1 output
	case $command in
	'make run')
		serve_as "$command"
		grep -q 'the chain is in "chain.jsonl"' "$log" || fail 'no chain.jsonl'
		soon 5 grep -q '^}' "$work/readme-server.out" || fail 'no block is printed'
		[[ $(whole "$work/readme-server.out") == 1 ]] || fail "standard output of '$command' is not the chain"
		;;
	'nc localhost 9000')
		need_server
		start readme-client "(echo 100; sleep 0.5; echo 72; sleep 60) | $command"
		soon 15 grep -q 'winning validator: .* (you) with 100 of 100 tokens' "$work/readme-client.out" || fail "no winner in '$command'"
		interrupt "$group"
		;;
	'telnet localhost 9000')
		need_server
		window readme-telnet "$command"
		see readme-telnet 5 'Enter token balance:'
		type_in readme-telnet 100
		see readme-telnet 5 'stakes 100 tokens'
		press readme-telnet C-]
		see readme-telnet 5 'telnet>'
		type_in readme-telnet quit
		see readme-telnet 5 'Connection closed'
		;;
	printf*' | nc -N localhost 9000')
		need_server
		sleep 2 # until whoever came before is out of the draw
		output=$(timeout 30 bash -c "$command") || fail "'$command' does not end"
		[[ $output == *'(you) with 100 of 100 tokens' ]] || fail "'$command' says $output"
		;;
	'BROADCAST_BLOCKS=5 make run')
		serve_as "$command"
		start readme-client '(echo 100; while sleep 0.5; do echo 72; done) | nc localhost 9000'
		soon 30 latest_five || fail "with '$command' a broadcast is not of the latest five blocks"
		stop_server
		soon 10 gone "$group" || fail 'the client goes on'
		;;
	'PORT=9100 make run')
		stop_server
		serve_as "$command"
		interrupt "$group"
		;;
	'PORT=9100 CHAIN_FILE=second.jsonl make run')
		need_server
		serve_as "$command"
		[[ -s second.jsonl ]] || fail 'no second.jsonl'
		gone "$server" && fail 'the first server does not go on'
		interrupt "$group"
		;;
	'HOST=localhost make run')
		serve_as "$command"
		grep -Eq 'listening on (127\.0\.0\.1|\[::1\]):' "$log" || fail 'it does not listen on localhost only'
		;;
	'ROUND_INTERVAL=5s make run')
		serve_as "$command"
		grep -q 'a draw every 5s' "$log" || fail 'rounds do not take 5 s'
		;;
	'go run .')
		serve_as "$command"
		stop_server
		;;
	'make run 2>server.log')
		serve_as "$command" server.log
		[[ ! -s $work/readme-server.err ]] || fail 'there is more on standard error'
		;;
	'make run 2>server.log | less')
		stop_server
		rm server.log
		window readme-less "$command"
		soon 60 listening server.log >/dev/null || fail "'$command' starts no server"
		see readme-less 5 'Index: (int)'
		press readme-less C-c
		soon 5 grep -q 'shutting down' server.log || fail 'Ctrl-C does not stop the server'
		press readme-less q
		see readme-less 5 '[$] *$'
		;;
	*'for i in {1..30};'*'nc localhost 9000'*)
		serve_as 'ROUND_INTERVAL=6s make run 2>server.log' server.log
		start thirty "$command"
		soon 20 joined 30 || fail 'thirty validators do not join'
		grep -q 'joins with 300 tokens; validators: ' server.log || fail 'none has 300 tokens'
		soon 20 grep -q 'candidates: 30, tokens: 4650' server.log || fail 'the thirty are not in one draw'
		stop_server
		soon 15 gone "$group" || fail 'the thirty do not end with the server'
		;;
	'ROUND_INTERVAL=200ms CHAIN_FILE= make run 2>server.log')
		serve_as "$command" server.log
		;;
	*'for s in 100 300;'*'nc localhost 9000'*)
		[[ -n $server ]] || fail 'the two have no server'
		start two "$command"
		soon 60 rounds_of_two || fail 'a hundred rounds take more than a minute'
		stop_server
		soon 5 gone "$group" || fail 'the two do not end with the server'
		;;
	awk*server.log)
		output=$(bash -c "$command")
		echo "$output"
		awk '{ won += $4; of = $6; expected += $9; if ($1 == 300) share = $4 / $6 }
			END { exit !(NR == 2 && won == of && of >= 100 && expected == of && share > 0.55 && share < 0.95) }' <<<"$output" ||
			fail 'that is not what README promises'
		;;
	*'>tampered.jsonl')
		need_chain
		stop_server
		bash -c "$command"
		! cmp -s chain.jsonl tampered.jsonl || fail 'nothing was changed'
		;;
	'CHAIN_FILE=tampered.jsonl make run')
		output=$(timeout 30 bash -c "$command" 2>&1) && fail 'a server runs on a changed chain'
		[[ $output == *'line 2: block 1 was changed: its contents hash to '* ]] || fail "of the changed chain it says $output"
		;;
	'find . '*'wc -l')
		local stated lines
		lines=$(bash -c "$command")
		stated=$(grep -FxA1 "\$ $command" README.md | tail -n 1)
		((stated - lines < 100 && lines - stated < 100)) || fail "README says $stated lines, they are $lines"
		;;
	make)
		[[ $(bash -c "$command") == *'make run '* ]] || fail "'make' does not say what there is"
		;;
	'go test -v -run '*)
		output=$(bash -c "$command") || fail "$output"
		[[ $output == *'--- PASS: TestSharesFitStakes'* && $output == *'--- PASS: TestValidateBlock'* ]] || fail "$command: $output"
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
	*'sha256sum')
		need_chain
		hash=$(bash -c "$command")
		;;
	*'jq -r .Hash')
		[[ "$(bash -c "$command")  -" == "$hash" ]] || fail "block 1 should have the hash $hash"
		;;
	"jq -c '[.Index, .BPM, "*)
		[[ $(bash -c "$command" | sed -n 2p) =~ ^\[1,[0-9]+,\"[0-9a-f]{8}\"\]$ ]] || fail "$command: $(bash -c "$command")"
		;;
	*'sort | uniq -c'*)
		output=$(bash -c "$command")
		[[ $(awk '{ blocks += $1 } END { print blocks + 1 }' <<<"$output") == "$(wc -l <chain.jsonl)" ]] || fail "$command: $output"
		;;
	'cp chain.jsonl backup.jsonl'*)
		bash -c "$command"
		CHAIN_FILE=backup.jsonl serve_as 'make run'
		grep -q 'the chain is in "backup.jsonl"' "$log" || fail 'a server does not start on the backup'
		;;
	'ulimit -Hn')
		bash -c "$command" >/dev/null
		;;
	*)
		fail "README shows '$command', and .ci/readme.sh does not know what it should do"
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

for port in 9000 9100; do
	! nc -z localhost "$port" 2>/dev/null ||
		fail "port $port is taken, and README's commands use it: end what listens there and try again"
done
check_names
git ls-files -z | xargs -0 cp --parents -t "$(mkdir "$copy" && echo "$copy")"
mapfile -t commands < <(readme_commands)
((${#commands[@]} > 20)) || fail "README shows only ${#commands[@]} commands"
cd "$copy"
printf '%s\n' ROUND_INTERVAL=1s BROADCAST_INTERVAL=2s >.env
for command in "${commands[@]}"; do
	for skip in "${skipped[@]}"; do [[ $command != "$skip" ]] || continue 2; done
	run_readme_command "$command"
	pass "README: $command"
done
stop_server
cd "$OLDPWD"
