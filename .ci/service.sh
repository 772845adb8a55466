# Sourced by run: does what docs/service.md shows, with its own files and in its order. Instead
# of systemd and docker, functions do what its unit and its Dockerfile say. /usr/local/bin,
# /var/lib and /var/log are in a directory, and the ports 9000 and 9100 in a network namespace.

page=docs/service.md
host=$work/host
network=pos-service-$$
service='' # the group of the server that systemctl has started

# file_in KIND prints the block of the page that begins with ```KIND.
file_in() { sed -n "/^\`\`\`$1\$/,/^\`\`\`\$/p" "$page" | sed '1d;$d' | grep . || fail "$page has no $1"; }

# here prints its input with the directories in $host.
here() { sed "s,/\(usr/local/bin\|var/lib\|var/log\)/,$host&,g"; }

on_host() { (cd "$host" && eval "$(here <<<"${1#sudo }")") || fail "'$1' fails"; }

# inside COMMAND is how a server's shell runs a command in the network namespace.
inside() { echo "exec ip netns exec $network $1"; }
on_port() { timeout 20 ip netns exec "$network" nc -N localhost "$1"; }
is_open() { ip netns exec "$network" nc -z localhost "$1"; }

# check_wins PORT WHERE proposes a block, which must win.
check_wins() { [[ $(printf '100\n72\n' | on_port "$1") == *'(you) with 100 of 100 tokens'* ]] || fail "nobody wins $2"; }

# end GROUP sends SIGTERM to the group, whose exit status must be 0.
end() {
	local status=0
	kill -TERM -- "-$1"
	wait "$1" || status=$?
	((status == 0)) || fail "the exit status after SIGTERM is $status"
}

blocks() { wc -l <"$(of_unit WorkingDirectory)/chain.jsonl"; }

# has_started COUNT succeeds if the service has started with so many blocks.
has_started() { grep -q "blocks: $1\$" "$work/service.log"; }

unit() {
	file_in ini | here >"$work/proof-of-stake.service"
	local faults
	faults=$(systemd-analyze verify "$work/proof-of-stake.service" 2>&1) || true
	[[ -z $faults ]] || fail "of the unit systemd says: $faults"
}
of_unit() { sed -n "s/^$1=//p" "$work/proof-of-stake.service" | grep . || fail "the unit has no $1"; }

# systemctl VERB does with the unit's server what systemd does.
systemctl() {
	local directory
	directory=$(of_unit WorkingDirectory)
	[[ $directory == "$host/var/lib/$(of_unit StateDirectory)" ]] || fail 'the working directory is not the state directory'
	[[ $1 == start || $1 == enable ]] || end "$service"
	[[ $1 != stop ]] || return 0
	mkdir -p "$directory"
	chown 12345:12345 "$directory"
	: >"$work/service.log"
	start service "cd '$directory'; ulimit -n $(of_unit LimitNOFILE); export $(of_unit Environment) ROUND_INTERVAL=500ms
		$(inside "setpriv --reuid=12345 --regid=12345 --clear-groups $(of_unit ExecStart)") >/dev/null 2>>'$work/service.log'"
	service=$group
	soon 20 grep -q ' a draw every ' "$work/service.log" || fail 'the service does not start'
}

# image makes the directory that is the image's root.
image() {
	local step words owner target
	root=$work/root user='' directory='' entrypoint=''
	mkdir "$root"
	while read -r step words; do
		case $step in
		FROM) [[ $words == scratch ]] ;;
		COPY)
			owner=root:root
			[[ $words != --chown=* ]] || owner=${words%% *} owner=${owner#*=} words=${words#* }
			target=$root${words#* }
			[[ $target != */ ]] || target+=${words% *}
			cp -r "$host/${words% *}" "$target" && chown -R "$owner" "$target"
			;;
		USER) user=$words && [[ $user == [1-9]*:[1-9]* ]] ;;
		WORKDIR) directory=$words && mkdir -p "$root$words" ;; # root's, as some builders make it
		VOLUME) [[ $words == "$directory" ]] ;;
		ENTRYPOINT) entrypoint=$(jq -r '.[0]' <<<"$words") ;;
		*) false ;;
		esac || fail "a Dockerfile with '$step $words'"
	done < <(file_in dockerfile)
}

# container runs the image twice, as process 1 of a user without a name.
container() {
	local blocks
	for blocks in 1 2; do
		start container "PORT=9100 ROUND_INTERVAL=500ms $(inside "unshare --pid --fork --root='$root' --wd='$directory' \
			--setgid=${user#*:} --setuid=${user%:*} '$entrypoint'")"
		soon 20 grep -qs "blocks: $blocks\$" "$work/container.err" || fail "a container does not start with block $((blocks - 1))"
		check_wins 9100 'in a container'
		end "$group"
	done
}

# copies starts servers on copies of a chain that grows meanwhile.
copies() {
	serve copied "ROUND_INTERVAL=2ms CHAIN_FILE='$work/copied.jsonl'"
	local server=$group i
	start copied-client "$(proposer copied 0.002)"
	soon 20 drawn_at_least copied 50 || fail 'no blocks to copy'
	for i in {1..50}; do cp "$work/copied.jsonl" "$work/copy$((i % 5)).jsonl"; done
	end "$server"
	for i in {0..4}; do
		serve "copy$i" "CHAIN_FILE='$work/copy$i.jsonl'"
		end "$group"
	done
}

# rotates REDIRECTION has logrotate rotate the log of a server that runs. No line may be lost.
rotates() {
	local log=$host/var/log/proof-of-stake.log i
	rm -rf "${log%/*}" "$work/rotate.state"
	mkdir -p "${log%/*}"
	file_in logrotate | here >"$work/logrotate"
	start rotated "PORT=0 HOST=localhost CHAIN_FILE= exec ./proof-of-stake >/dev/null $1'$log'"
	soon 20 listening "$log" >/dev/null || fail 'the server whose log is rotated does not start'
	port=$(listening "$log")
	for i in {1..10}; do
		echo "line $i" | nc -N localhost "$port" >/dev/null
		soon 20 grep -aq "\"line $i\"" "$log" || fail "the log has no line $i"
		((i != 5)) || logrotate -f -s "$work/rotate.state" "$work/logrotate" || fail 'logrotate fails'
	done
	end "$group"
	[[ $(zcat -f "$log.1.gz" "$log" | grep -ao '"line [0-9]*"') == "$(seq -f '"line %g"' 10)" ]] || fail 'lines of the log are lost'
	zeros=$(tr -dc '\0' <"$log" | wc -c)
}

run_service_command() {
	local command=$1 before server i
	case $command in
	'CGO_ENABLED=0 go build '*)
		bash -c "$command" || fail "'$command' fails"
		mkdir -p "$host/usr/local/bin"
		cp proof-of-stake "$host"
		;;
	'sudo install '* | 'sudo cp backup.jsonl '* | 'mkdir chain')
		on_host "$command"
		;;
	'sudo systemctl enable '*)
		unit
		systemctl enable
		check_wins 9000 'in the service'
		;;
	'sudo systemctl restart '*)
		before=$(blocks)
		start client "(echo 100; sleep 60) | $(inside 'nc localhost 9000')"
		soon 20 grep -qs 'stakes 100 tokens' "$work/client.out" || fail 'nobody joins the service'
		on_host 'sudo install proof-of-stake /usr/local/bin/' # while it runs
		systemctl restart
		soon 20 grep -q 'server shutting down' "$work/client.out" || fail 'a client does not hear of the restart'
		has_started "$before" || fail 'the chain does not go on after the restart'
		check_wins 9000 'after the restart'
		;;
	'docker build '*) image ;;
	'docker run '*) container ;;
	'nohup '*' 2>>server.log &')
		start nohup "cd '$host' && export PORT=0 CHAIN_FILE= && $command wait \$!"
		soon 20 listening "$host/server.log" >/dev/null || fail "'$command' starts no server"
		server=$(pgrep -g "$group" -x proof-of-stake) || fail "'$command' starts no process"
		kill -HUP "$server"
		sleep 0.5
		echo 0 | nc -N localhost "$(listening "$host/server.log")" | grep -q '1000000000000, got "0"' || fail 'with nohup, SIGHUP stops it'
		kill -TERM "$server"
		wait "$group" || fail 'with nohup, SIGTERM does not stop it'
		rotates '2>>'
		((zeros == 0)) || fail "with 2>> the log has $zeros zero bytes"
		rotates '2>'
		((zeros > 0)) || fail 'with 2> the log has no zero bytes'
		;;
	'sudo cp '*' backup.jsonl')
		on_host "$command"
		truncate -s -100 "$host/backup.jsonl" # a part of the last line
		copies
		;;
	'sudo systemctl stop '*)
		check_wins 9000 'after the backup'
		systemctl stop
		;;
	'sudo systemctl start '*)
		before=$(wc -l <"$host/backup.jsonl")
		systemctl start
		grep -q 'dropped the last [0-9]* bytes' "$work/service.log" || fail 'the log does not say what was cut off the backup'
		has_started "$before" || fail "the restored chain has not $before blocks"
		check_wins 9000 'on the backup'
		;;
	'nc -zw 5 localhost 9000')
		before=$(wc -l <"$work/service.log")
		for i in {1..5}; do ip netns exec "$network" bash -c "$command" || fail "'$command' fails"; done
		sleep 0.5
		[[ $(wc -l <"$work/service.log") == "$before" ]] || fail "the log tells of '$command'"
		end "$service"
		! ip netns exec "$network" bash -c "$command" || fail "'$command' succeeds without a server"
		;;
	'docker stop '* | 'docker start '* | 'sudo ufw '*) # container does the one, the other would change this machine
		return
		;;
	*)
		fail "$page shows '$command', and .ci/service.sh does not know what it should do"
		;;
	esac
	pass "service: $command"
}

# behind PROXY COMMAND runs a proxy on port 9000. What it does by itself is not in the log.
behind() {
	local before
	before=$(wc -l <"$work/behind.err")
	start "$1" "$(inside "$2")"
	soon 20 is_open 9000 || fail "$1 does not listen"
	sleep 2.5 # for haproxy's checks
	check_wins 9000 "behind $1"
	[[ $(tail -n "+$((before + 1))" "$work/behind.err" | grep -Evc ' joins | wins | disconnects') == 0 ]] || fail "the log tells of $1's checks"
	kill -TERM -- "-$group"
	soon 20 gone "$group" || fail "$1 does not stop"
	pass "service: behind $1"
}

proxies() {
	start behind "export HOST=127.0.0.1 PORT=9100 CHAIN_FILE= ROUND_INTERVAL=500ms; $(inside './proof-of-stake >/dev/null')"
	local server=$group
	soon 20 listening "$work/behind.err" >/dev/null || fail 'the server behind the proxies does not start'
	file_in haproxy >"$work/haproxy.cfg"
	behind haproxy "haproxy -q -db -f '$work/haproxy.cfg'"
	printf '%s\n' 'load_module modules/ngx_stream_module.so; daemon off; events {}' "pid $work/nginx.pid; error_log stderr;" \
		"stream { $(file_in nginx) }" >"$work/nginx.conf"
	behind nginx "nginx -c '$work/nginx.conf'"
	[[ $(printf 'PROXY TCP4 127.0.0.1 127.0.0.1 40000 9000\r\n' | on_port 9100) == *'got "PROXY TCP4 '* ]] || fail 'the PROXY protocol is accepted'
	end "$server"
}

# The lines of the log in the page's table are the program's. What a capital word stands for varies.
log_lines() {
	local text
	while read -r text; do
		grep -qF --exclude="*_test.go" -- "$text" ./*.go internal/*/*.go || fail "$page says that the log has '$text'"
	done < <(awk -F ' [|] ' '/^[|] .*`/ { print $1 }' "$page" | grep -o '`[^`]*`' | sed -E 's/[A-Z_]{2,}/\n/g' |
		sed -E 's/^[^a-z]+//; s/[^a-z]+$//; s/^refused: //' | grep ' ')
	pass 'service: the lines of the log'
}

chmod 711 "$work" # for the service's user
ip netns add "$network"
namespaces+=("$network")
ip -n "$network" link set lo up
log_lines
mapfile -t commands < <(sed -n 's/^\$ //p' "$page")
for command in "${commands[@]}"; do run_service_command "$command"; done
proxies
