# Reads the server's log. For each validator that is still there, but for at most 20 with the
# largest stakes, it prints how many it has won of the rounds since it joined, beside how many it
# could expect: in each round its stake / the stakes of all that have joined and not left, as if
# they all had proposed a block in every round. The log has only rounds with a winner, so whoever
# leaves is counted in the next of these. LC_ALL=C has it print a point and no comma.

$5 == "joins" { stake[$4] = $9 }

$7 == "wins" {
	won[$6]++
	all = 0
	for (v in stake) if (!(v in gone)) all += stake[v]
	for (v in stake) if (!(v in gone)) { rounds[v]++; expected[v] += stake[v] / all }
	for (v in leaving) gone[v]
}

/ counts until the next draw$/ { leaving[$4] }
/ it forfeits its / { gone[$4] }

END {
	for (v in stake)
		if (!(v in leaving) && !(v in gone))
			printf "%s stakes %s: won %d of %d, expected %.1f\n",
				substr(v, 1, 8), stake[v], won[v], rounds[v], expected[v] | "sort -k 3nr | head -n 20"
}
