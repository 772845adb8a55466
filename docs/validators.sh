#!/usr/bin/env bash
# Joins the server on port PORT of this machine, 9000 if PORT is not set, with one validator
# for each stake that is given: bash docs/validators.sh 100 300. Each of them proposes a block
# in every round. They end when the server stops, or with Ctrl-C.
port=${PORT:-9000}

for stake; do
	(
		exec 3<>"/dev/tcp/localhost/$port" || exit
		printf '%s\n%d\n' "$stake" $((60 + RANDOM % 40)) >&3
		while IFS= read -r line <&3; do
			[[ $line != 'winning validator: '* ]] || echo $((60 + RANDOM % 40)) >&3
		done
	) &
done
wait
