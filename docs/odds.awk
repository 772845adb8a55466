# Reads the server's log. For each validator that has joined it prints how many rounds the
# validator has won, beside how many it could expect: in each round its stake / the tokens in
# the draw, as if it had proposed a block in every round from its join until it left.

/ joins from / { stake[$4] = $9 }

/ wins with / {
	rounds++
	won[$6]++
	for (v in stake) if (!(v in gone)) expected[v] += stake[v] / $NF
	for (v in leaving) gone[v]
}

/ counts until the next draw$/ { leaving[$4] }
/ it forfeits its / { gone[$4] }

END {
	for (v in stake)
		printf "%s stakes %d: won %d of %d, expected %.1f\n",
			substr(v, 1, 8), stake[v], won[v], rounds, expected[v] | "sort -k 3nr"
}
