# Whatever the environment says, this checkout alone is built, for this machine. Without
# -buildvcs=false, go fails in a checkout that belongs to another user.
export GOWORK := off
export GO111MODULE := on
export GOFLAGS := -buildvcs=false
export GOOS := $(shell go env GOHOSTOS)
export GOARCH := $(shell go env GOHOSTARCH)
# Not every system has the race detector. (Before make 4.4, a shell here has none of the above.)
RACE = $(shell GOWORK=off GO111MODULE=on GOFLAGS="$(GOFLAGS)" GOOS=$(GOOS) GOARCH=$(GOARCH) go list -race . >/dev/null 2>&1 && echo -race)
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
	@go build .

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
	@for package in $$(go list ./...); do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "go test -fuzz $$target $$package" && \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x $$package || exit 1; \
		done; \
	done

soak:
	SOAK=5m go test -run '^TestSoak$$' -timeout 10m -v .

.PHONY: help run build test check bench fuzz soak
