# Sourced by run: a client that vanishes from its network, a link that fails for a while, and a
# disk that does not answer.

server_host=pos-server-$$ client_host=pos-client-$$ # network namespaces

# newcomer prints what somebody hears who connects from the server's own host.
newcomer() { timeout 5 ip netns exec "$server_host" nc -N 10.77.0.1 9000 </dev/null || true; }
has_place() { [[ $(newcomer) == 'Enter token balance:' ]]; }

# link SERVER_HOST CLIENT_HOST makes two network namespaces with a link between them: the server
# has 10.77.0.1, the client 10.77.0.2.
link() {
	ip netns add "$1"
	namespaces+=("$1")
	ip netns add "$2"
	namespaces+=("$2")
	ip link add veth0 netns "$1" type veth peer name veth0 netns "$2"
	ip -n "$1" address add 10.77.0.1/24 dev veth0
	ip -n "$2" address add 10.77.0.2/24 dev veth0
	ip -n "$1" link set lo up
	ip -n "$1" link set veth0 up
	ip -n "$2" link set veth0 up
}

# outage has twenty clients join, one each two seconds, and say nothing. Then their link fails for
# 20 s: both ends send to an address that nobody has, so nobody is told.
outage() {
	link "$server_host-2" "$client_host-2"
	start outage "HOST=10.77.0.1 ROUND_INTERVAL=1h BROADCAST_INTERVAL=1h CHAIN_FILE= exec ip netns exec $server_host-2 ./proof-of-stake >/dev/null"
	soon 20 listening "$work/outage.err" >/dev/null || fail 'the second server in a namespace does not start'
	start patient "for i in {1..20}; do
			(echo 100; sleep \$((84 - 2 * i)); echo; sleep 30) | ip netns exec $client_host-2 nc 10.77.0.1 9000 &
			sleep 2
		done; wait"
	start failing "sleep 43
		ip -n $server_host-2 neighbor replace 10.77.0.2 lladdr 02:00:00:00:00:99 nud permanent dev veth0
		ip -n $client_host-2 neighbor replace 10.77.0.1 lladdr 02:00:00:00:00:99 nud permanent dev veth0
		sleep 20
		ip -n $server_host-2 neighbor delete 10.77.0.2 dev veth0
		ip -n $client_host-2 neighbor delete 10.77.0.1 dev veth0"
	outage_at=$SECONDS
}

# answered counts the greetings and the answers to an empty line.
answered() { [[ $(grep -c 'no BPM for block 1 yet' "$work/patient.out") == "$1" ]]; }

# outlived checks that all of them are still there after the outage.
outlived() {
	soon $((outage_at + 110 - SECONDS)) answered 40 ||
		fail "of 20 silent clients $(($(grep -c 'no BPM for block 1 yet' "$work/patient.out") - 20)) are left after a link that failed for 20 s"
	! grep -q dropped "$work/outage.err" || fail 'a client was dropped although its link came back'
	pass 'twenty silent clients outlive a link that fails for 20 s'
}

# vanish starts a server with room for one validator, and takes the network from under it.
vanish() {
	link "$server_host" "$client_host"
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
