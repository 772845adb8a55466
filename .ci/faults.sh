# Sourced by run: a client that vanishes from its network, and a disk that does not answer.

server_host=pos-server-$$ client_host=pos-client-$$ # network namespaces

# newcomer prints what somebody hears who connects from the server's own host.
newcomer() { timeout 5 ip netns exec "$server_host" nc -N 10.77.0.1 9000 </dev/null || true; }
has_place() { [[ $(newcomer) == 'Enter token balance:' ]]; }

# vanish starts a server with room for one validator, and takes the network from under it.
vanish() {
	ip netns add "$server_host"
	namespaces+=("$server_host")
	ip netns add "$client_host"
	namespaces+=("$client_host")
	ip link add veth0 netns "$server_host" type veth peer name veth0 netns "$client_host"
	ip -n "$server_host" address add 10.77.0.1/24 dev veth0
	ip -n "$client_host" address add 10.77.0.2/24 dev veth0
	ip -n "$server_host" link set lo up
	ip -n "$server_host" link set veth0 up
	ip -n "$client_host" link set veth0 up
	start vanish "HOST=10.77.0.1 MAX_VALIDATORS=1 ROUND_INTERVAL=1s CHAIN_FILE= exec ip netns exec $server_host ./proof-of-stake >/dev/null"
	soon 20 listening "$work/vanish.err" >/dev/null || fail 'the server in a namespace does not start'
	start vanishing "(echo 100; sleep 120) | ip netns exec $client_host nc 10.77.0.1 9000"
	soon 20 grep -q 'stakes 100 tokens' "$work/vanishing.out" || fail 'nobody joins through the network'
	[[ $(newcomer) == 'server full, try again later' ]] || fail 'the server is not full'
	ip -n "$client_host" link set veth0 down
	vanished_at=$(date +%s)
}

# vanished checks that who has vanished was dropped within a minute, after 45 s, and that the
# place is free.
vanished() {
	local line after
	soon $((vanished_at + 60 - $(date +%s))) grep -q 'dropped: it has stopped reading or is no longer there' "$work/vanish.err" ||
		fail 'the server does not notice within a minute that a client has vanished'
	line=$(grep 'dropped: ' "$work/vanish.err")
	after=$(($(date -d "${line:0:19}" +%s) - vanished_at))
	((40 <= after && after <= 60)) || fail "who has vanished was dropped after $after s"
	soon 20 has_place || fail 'the place of who has vanished is not free'
	pass "a client that vanishes is gone after $after s, and its place free"
}

# no_answer stops a server whose disk hangs. Its clients are told at once, and it ends.
no_answer() {
	serve no-answer "ROUND_INTERVAL=1s CHAIN_FILE='$work/no-answer.jsonl'"
	local server=$group began status=0
	start strace "exec strace -f -p $server -e trace=fsync -e inject=fsync:delay_enter=15000000"
	soon 20 grep -q attached "$work/strace.err" || fail 'strace does not attach'
	start client "(echo 100; echo 72; sleep 60) | exec nc localhost $port"
	soon 20 grep -q fsync "$work/strace.err" || fail 'no block is written'
	began=$SECONDS
	kill -TERM "$server"
	soon 3 grep -q 'server shutting down' "$work/client.out" || fail 'clients hear of the stop only when the disk answers'
	soon 5 grep -q 'the disk has not answered' "$work/no-answer.log" || fail 'the log does not say why the stop takes so long'
	((SECONDS - began <= 5)) || fail "it ends only after $((SECONDS - began)) s"
	wait "$server" || status=$? # until strace lets it go
	((status == 1)) || fail "it ended with status $status"
	! grep -q 'winning validator' "$work/client.out" || fail 'a block was announced that may not be on disk'
	pass 'a disk that does not answer holds up a stop for less than five seconds, and nobody is told of its block'
}
