# Without it, go fails in a checkout that belongs to another user.
NOVCS := -buildvcs=false
# Not every system has the race detector.
RACE = $(shell go list $(NOVCS) -race . >/dev/null 2>&1 && echo -race)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
FUZZTIME := 1m

help:
	@echo 'make run    build the server and run it; Ctrl-C stops it'
	@echo 'make build  build ./proof-of-stake'
	@echo 'make test   run the tests, with the race detector where there is one'
	@echo 'make check  test, and look for faults: gofmt, vet for four systems, staticcheck, a little fuzzing'
	@echo 'make bench  measure, beside a bare server; takes minutes'
	@echo 'make fuzz   fuzz each target for FUZZTIME, $(FUZZTIME) if not set, or 10000x for so many inputs'
	@echo 'make soak   two thousand random validators for some minutes'

# Silent, so that the standard output of make run is the chain alone.
run: build
	@./proof-of-stake

build:
	@go build $(NOVCS) .

test:
	go test $(RACE) -timeout 5m -p 4 -parallel 8 ./...

# A number of inputs, since go test -fuzz may fail with 'context deadline exceeded' at the
# end of a time.
check: test
	test -z "$$(gofmt -l . | tee /dev/stderr)"
	go vet ./...
	GOOS=windows go vet ./...
	GOOS=darwin go vet ./...
	GOOS=freebsd go vet ./...
	go run $(STATICCHECK) ./...
	$(MAKE) fuzz FUZZTIME=2000x

bench:
	go test -run '^$$' -bench . -timeout 1h ./...

fuzz:
	@for package in $$(go list $(NOVCS) ./...); do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "go test -fuzz $$target $$package" && \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x $$package || exit 1; \
		done; \
	done

soak:
	SOAK=5m go test -run '^TestSoak$$' -timeout 10m -v .

.PHONY: help run build test check bench fuzz soak
