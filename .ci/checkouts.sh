# Sourced by run: checkouts as other people have them, and other numbers of processors.

# git makes no line end CR LF, even if it is told to.
carriage_returns() {
	git clone -q -c core.autocrlf=true . "$work/crlf"
	(
		cd "$work/crlf"
		[[ -z $(git ls-files -z | xargs -0 grep -lI $'\r') ]] || fail 'with core.autocrlf there are carriage returns'
		[[ -z $(gofmt -l .) ]] || fail 'with core.autocrlf gofmt finds faults'
		make build && go test -run '^(TestDefaults|TestHelp|Fuzz.*)$' . >/dev/null || fail 'with core.autocrlf the tests fail'
	)
	pass 'a clone with core.autocrlf'
}

# make works in a checkout of which git says that its owner is dubious.
owner() {
	if ((EUID)); then
		echo "session: only root can give a checkout to another user"
		return
	fi
	git clone -q . "$work/owner"
	chown -R 12345:12345 "$work/owner"
	(
		export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null GOFLAGS=-buildvcs=auto
		! git -C "$work/owner" status >/dev/null 2>&1 || fail 'git does not mind the owner of a checkout'
		make -C "$work/owner" build || fail "make build fails in another user's checkout"
		[[ $(make -n -C "$work/owner" test | grep '^go ') == "$(make -n test | grep '^go ')" ]] ||
			fail "make test is another command in another user's checkout"
	)
	pass "another user's checkout"
}

# make builds this checkout for this machine, whatever the environment has for go.
environment() {
	mkdir "$work/workspace"
	git clone -q . "$work/workspace/checkout"
	echo 'go 1.25' >"$work/workspace/go.work" # which does not name the checkout
	(
		cd "$work/workspace/checkout"
		export GOOS=windows GOARCH=arm64 GOFLAGS=-mod=vendor GO111MODULE=off
		make build && [[ $(./proof-of-stake -h) == 'Usage: proof-of-stake'* ]] || fail 'make build fails with another system in the environment'
		[[ $(make -n test | grep '^go ') == 'go test -race '* ]] || fail 'make test has no race detector with another system in the environment'
	)
	pass 'a go.work above, and another system in the environment'
}

processors() {
	local tests
	tests=$(grep -o '^func Test[A-Za-z]*' lottery_test.go | cut -d' ' -f2 | paste -sd'|')
	go test -cpu 1,2,4 -run "^($tests)\$" . || fail 'the tests of the lottery depend on the number of processors'
	pass 'the tests of the lottery on 1, 2 and 4 processors'
}

carriage_returns
owner
environment
processors
