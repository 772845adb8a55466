#!/usr/bin/env bash
# Joins the server on port PORT of this machine, 9000 if PORT is not set, with one validator
# for each stake that is given: bash docs/validators.sh 100 300. Each of them proposes a block
# in every round. They end when the server stops, or with Ctrl-C.

bpm() { echo $((60 + RANDOM % 40)); }

for stake; do
	(
		exec 3<>"/dev/tcp/localhost/${PORT:-9000}" || exit
		printf '%s\n' "$stake" "$(bpm)" >&3
		grep --line-buffered -o '^winning' <&3 | while read -r; do bpm >&3; done
	) &
done
wait
