package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"
)

// expandedPool is the tutorial's pool: each candidate once for each of its tokens.
func expandedPool(stakes []int64) (pool []int) {
	for i, stake := range stakes {
		for range stake {
			pool = append(pool, i)
		}
	}
	return pool
}

func newPool(stakes ...int64) (p lotteryPool) {
	for _, stake := range stakes {
		p.stakes = append(p.stakes, stake)
		p.total += stake
	}
	return p
}

func TestPoolIsTheTutorials(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	sizes := make(map[int]bool)
	for range 300 {
		stakes := make([]int64, 1+random.IntN(20))
		for i := range stakes {
			stakes[i] = 1 + random.Int64N(40)
		}
		pool := newPool(stakes...)
		want := expandedPool(stakes)
		if pool.total != int64(len(want)) {
			t.Fatalf("stakes %v: total is %d, want %d", stakes, pool.total, len(want))
		}
		for ticket := range want {
			if got := pool.winner(int64(ticket)); got != want[ticket] {
				t.Fatalf("stakes %v: ticket %d is of candidate %d, want %d", stakes, ticket, got, want[ticket])
			}
		}
		sizes[len(stakes)] = true
	}
	if len(sizes) != 20 {
		t.Errorf("pools of %d sizes were tried, want 20", len(sizes))
	}
}

// A million stakes as large as may be, at the ends of each.
func TestPoolOfTheLargest(t *testing.T) {
	pool := lotteryPool{stakes: make([]int64, 1_000_000)}
	for i := range pool.stakes {
		pool.stakes[i] = maxStake
		pool.total += maxStake
	}
	for _, i := range []int64{0, 1, 500_000, 999_999} {
		for _, ticket := range []int64{i * maxStake, (i+1)*maxStake - 1} {
			if got := pool.winner(ticket); got != int(i) {
				t.Errorf("ticket %d is of candidate %d, want %d", ticket, got, i)
			}
		}
	}
	for range 1000 {
		if ticket := drawTicket(pool.total); ticket < 0 || ticket >= pool.total {
			t.Fatalf("ticket %d of %d", ticket, pool.total)
		}
	}
}

// The shares of wins fit the stakes: chi-square over 9 degrees of freedom. By
// chance it is above 60 once in a billion runs.
func TestSharesFitStakes(t *testing.T) {
	const draws = 200_000
	pool := newPool(1, 2, 3, 5, 8, 13, 21, 34, 55, 89)
	wins := make([]float64, len(pool.stakes))
	for range draws {
		wins[pool.winner(drawTicket(pool.total))]++
	}
	chiSquare := 0.0
	for i, stake := range pool.stakes {
		expected := draws * float64(stake) / float64(pool.total)
		chiSquare += (wins[i] - expected) * (wins[i] - expected) / expected
	}
	if chiSquare > 60 {
		t.Errorf("chi-square is %.1f, want at most 60; wins %v for stakes %v", chiSquare, wins, pool.stakes)
	}
}

// A recorder is an announcer that records the winners, and a standard output.
type recorder struct {
	winners []string
	tokens  int64 // that were in the last draw
	printed int   // how many winners there were when a block was last printed
}

func (r *recorder) announce(winner *validator, tokens int64) {
	r.winners = append(r.winners, winner.address)
	r.tokens = tokens
}

func (r *recorder) broadcast(chain []byte) {}

func (r *recorder) Write(p []byte) (int, error) {
	r.printed = len(r.winners)
	return len(p), nil
}

func testLottery(t testing.TB) *lottery {
	l := newLottery(newBlockchain(t), io.Discard, log.New(io.Discard, "", 0))
	l.roundInterval = time.Hour
	return l
}

// joinMany returns validators with these stakes.
func joinMany(l *lottery, stakes ...int64) (vs []*validator) {
	for _, stake := range stakes {
		vs = append(vs, l.join(stake, ""))
	}
	return vs
}

func TestRounds(t *testing.T) {
	l, results := testLottery(t), new(recorder)
	l.stdout = results
	draw := func() { l.pickWinner(time.Now(), results) }
	want := func(winners ...string) {
		t.Helper()
		if fmt.Sprint(results.winners) != fmt.Sprint(winners) || results.printed != len(winners) {
			t.Fatalf("winners %v, %d before their blocks were printed; want %v", results.winners, results.printed, winners)
		}
		results.winners, results.printed = nil, 0
	}

	draw() // nobody there
	want()
	vs := joinMany(l, 10, maxStake, 1)
	draw() // nobody has proposed
	want()
	if p := l.propose(vs[0], 72); p.index != 1 || !p.added {
		t.Errorf("propose: %d, %v", p.index, p.added)
	}
	if p := l.propose(vs[0], 73); p.index != 1 || p.added {
		t.Errorf("propose again: %d, %v", p.index, p.added)
	}
	draw() // one candidate
	want(vs[0].address)
	if got := l.chain.head; got.BPM != 72 || got.Index != 1 {
		t.Errorf("the block is %v", got)
	}
	draw() // its candidate was for one round
	want()

	// Disqualified between its block and the draw: first, last and only candidate.
	for _, v := range vs {
		l.propose(v, 72)
	}
	l.disqualify(vs[1])
	l.disqualify(vs[2])
	draw()
	want(vs[0].address)
	l.propose(vs[0], 72)
	l.disqualify(vs[0])
	draw()
	want()
	if len(l.validators) != 0 || l.tokens != 0 {
		t.Errorf("%d validators with %d tokens are left", len(l.validators), l.tokens)
	}

	// Gone between its block and the draw.
	v := joinMany(l, 5)[0]
	l.propose(v, 72)
	gone := l.leave(v)
	draw()
	want(v.address)
	<-gone
	if len(l.validators) != 0 || l.tokens != 0 {
		t.Errorf("%d validators with %d tokens are left", len(l.validators), l.tokens)
	}
	blocks(t, l.chain)
}

// The time to the draw is that to the next tick, however long ticks have to wait.
func TestDrawIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := testLottery(t)
		v := joinMany(l, 1)[0]
		time.Sleep(150 * time.Minute)
		if p := l.propose(v, 72); p.drawIn != 30*time.Minute {
			t.Errorf("draw in %v, want 30m", p.drawIn)
		}
	})
}

// Disqualifying in any order keeps the pool what the candidates make it.
func TestDisqualifyKeepsPool(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		l := testLottery(t)
		stakes := make(map[*validator]int64)
		for range 1 + random.IntN(12) {
			stake := 1 + random.Int64N(9)
			v := joinMany(l, stake)[0]
			if random.IntN(4) > 0 {
				l.propose(v, 72)
			}
			stakes[v] = stake
		}
		for v := range stakes {
			if random.IntN(2) == 0 {
				l.disqualify(v)
				delete(stakes, v)
			}
		}
		want := int64(0)
		candidates := 0
		for v, stake := range stakes {
			if l.round.has(v) {
				candidates++
				want += stake
				if got := l.round.pool.stakes[v.index]; got != stake {
					t.Fatalf("the pool has a stake of %d, want %d", got, stake)
				}
			}
		}
		if len(l.round.tempBlocks) != candidates || len(l.round.pool.stakes) != candidates || l.round.pool.total != want {
			t.Fatalf("%d candidates, %d stakes, total %d, want %d, %d, %d", len(l.round.tempBlocks),
				len(l.round.pool.stakes), l.round.pool.total, candidates, candidates, want)
		}
	}
}

// A clock that is set during a round changes neither the round nor the chain.
func TestClockIsSet(t *testing.T) {
	for _, by := range []time.Duration{-time.Hour, time.Hour} {
		name, _ := newChainFile(t, 1)
		l, results := newLottery(open(t, name), io.Discard, log.New(io.Discard, "", 0)), new(recorder)
		l.roundInterval = 30 * time.Second
		v := joinMany(l, 1)[0]

		tick := time.Now()
		if err := l.pickWinner(setClock(tick, by), results); err != nil {
			t.Fatal(err)
		}
		drawIn := l.propose(v, 72).drawIn
		if want := l.roundInterval - time.Since(tick); drawIn < want || drawIn > l.roundInterval {
			t.Errorf("with the clock set by %v: draw in %v, want from %v to %v", by, drawIn, want, l.roundInterval)
		}
		l.round.tempBlocks[0].proposed = setClock(time.Now(), by)
		l.pickWinner(time.Now(), results)
		l.propose(v, 73)
		l.pickWinner(time.Now(), results)
		if again := blocks(t, openCopy(t, name)); len(again) != 3 || len(results.winners) != 2 {
			t.Errorf("with the clock set by %v: %d blocks, want 3", by, len(again))
		}
	}
}

// setClock returns t as a clock set by d would show it: another time of day,
// the same reading of the monotonic clock.
func setClock(t time.Time, d time.Duration) time.Time {
	wall := (*uint64)(unsafe.Pointer(&t)) // time.Time begins with 1 bit, 33 bits of seconds and 30 of nanoseconds
	*wall += uint64(d/time.Second) << 30
	return t
}

// While a block is written the next round is open. If that fails nothing is
// announced, both rounds are one, and a validator that has a candidate in it is not removed.
func TestDrawFails(t *testing.T) {
	name, _ := newChainFile(t, 1)
	var logged bytes.Buffer
	l, results := newLottery(open(t, name), io.Discard, log.New(&logged, "", 0)), new(recorder)
	l.roundInterval = time.Hour
	file := &hookedFile{chainFile: l.chain.file}
	l.chain.file = file

	vs := joinMany(l, 1, 20, 300, 4000, 50000, 600000)
	logged.Reset()
	first, second, late, leaver, cheat, visitor := vs[0], vs[1], vs[2], vs[3], vs[4], vs[5]
	for _, v := range []*validator{first, second, cheat} {
		l.propose(v, 72)
	}
	gone, visitorGone := l.leave(second), l.leave(visitor)
	file.sync = func() error {
		for _, v := range []*validator{late, first} {
			if p := l.propose(v, 73); p.index != 2 || !p.added {
				t.Errorf("propose: %d, %v, want block 2", p.index, p.added)
			}
		}
		l.leave(leaver)
		l.disqualify(cheat)
		return errors.New("input/output error")
	}
	if err := l.pickWinner(time.Now(), results); err != nil {
		t.Fatal(err)
	}
	if len(results.winners) != 0 || logged.String() != "no winner: block 1 cannot be written; its 3 candidates go into the next draw: input/output error\n" {
		t.Errorf("winners %v, logged %q", results.winners, &logged)
	}
	select {
	case <-gone:
		t.Error("who left is gone before the draw")
	default:
	}
	<-visitorGone
	bpms := make(map[string]int)
	for _, c := range l.round.tempBlocks {
		bpms[c.validator.address] = c.bpm
	}
	if len(bpms) != 3 || len(l.round.tempBlocks) != 3 || bpms[first.address] != 72 || bpms[second.address] != 72 || bpms[late.address] != 73 || l.round.pool.total != 321 {
		t.Errorf("candidates %v with %d tokens", l.round.tempBlocks, l.round.pool.total)
	}
	if p := l.propose(late, 74); p.index != 1 || p.added {
		t.Errorf("propose: %d, %v, want block 1 as before", p.index, p.added)
	}

	file.sync = func() error {
		if p := l.propose(late, 75); p.index != 2 || !p.added {
			t.Errorf("propose: %d, %v, want block 2", p.index, p.added)
		}
		return nil
	}
	for range 2 {
		if err := l.pickWinner(time.Now(), results); err != nil {
			t.Fatal(err)
		}
		file.sync = func() error { return nil }
	}
	<-gone
	if len(results.winners) != 2 || results.winners[1] != late.address || l.chain.head.BPM != 75 {
		t.Errorf("winners %v, the last with %d", results.winners, l.chain.head.BPM)
	}
	if len(l.validators) != 2 || l.tokens != 301 {
		t.Errorf("%d validators with %d tokens, want 2 with 301", len(l.validators), l.tokens)
	}
	blocks(t, l.chain)
}

// An onBroadcast is an announcer that is called for broadcasts.
type onBroadcast func()

func (onBroadcast) announce(*validator, int64) {}
func (f onBroadcast) broadcast(chain []byte)   { f() }

// Where a draw and a broadcast are due at the same instant the draw comes first, though its
// tick may arrive later. That is rare, hence so many.
func TestTicksOfOneInstant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := testLottery(t)
		l.roundInterval, l.broadcastInterval = time.Second, time.Second
		ctx, stop := context.WithCancel(t.Context())
		broadcasts := 0
		if err := l.run(ctx, onBroadcast(func() {
			if since := time.Since(l.lastTick); since > time.Second/2 {
				t.Fatalf("broadcast %d is %v after a draw", broadcasts, since)
			}
			if broadcasts++; broadcasts == 200_000 {
				stop()
			}
		})); err != nil {
			t.Fatal(err)
		}
	})
}

// A chain that is lost ends the run, without a word to the validators.
func TestChainIsLost(t *testing.T) {
	name, _ := newChainFile(t, 1)
	l, results := newLottery(open(t, name), io.Discard, log.New(io.Discard, "", 0)), new(recorder)
	l.roundInterval, l.broadcastInterval = time.Millisecond, time.Hour
	l.propose(joinMany(l, 1)[0], 72)
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	if err := l.run(t.Context(), results); !errors.Is(err, errChainLost) || !strings.Contains(err.Error(), name) {
		t.Errorf("run: %v, want %v with the name of the file", err, errChainLost)
	}
	if len(results.winners) != 0 {
		t.Errorf("winners %v", results.winners)
	}
}

// Validators join, propose and leave while winners are drawn: no block is stale, and
// propose adds one candidate a validator to each round.
func TestProposeWhileDrawing(t *testing.T) {
	const rounds, proposers = 5000, 8
	l, results := testLottery(t), new(recorder)
	ctx, stop := context.WithCancel(t.Context())
	var proposing sync.WaitGroup
	for i := range proposers {
		proposing.Go(func() {
			random := rand.New(rand.NewPCG(5, uint64(i)))
			v := joinMany(l, 1+random.Int64N(maxStake))[0]
			for last := 0; ctx.Err() == nil; {
				p := l.propose(v, random.IntN(200))
				if p.added == (p.index == last) || p.index < last {
					t.Errorf("proposed block %d, added: %v, after block %d", p.index, p.added, last)
				}
				last = p.index
				runtime.Gosched() // or one processor alone would hardly draw
				switch random.IntN(10) {
				case 0:
					l.disqualify(v)
					v, last = joinMany(l, 1+random.Int64N(maxStake))[0], 0
				case 1:
					l.leave(v)
					v, last = joinMany(l, 1+random.Int64N(maxStake))[0], 0
				}
			}
		})
	}
	for len(results.winners) < rounds {
		l.pickWinner(time.Now(), results)
		runtime.Gosched()
	}
	stop()
	proposing.Wait()
	chain := blocks(t, l.chain)
	for i, winner := range results.winners {
		if chain[i+1].Validator != winner {
			t.Fatalf("%s was announced for block %d, which is of %s", winner, i+1, chain[i+1].Validator)
		}
	}
	if len(chain) != 1+len(results.winners) {
		t.Errorf("%d blocks for %d winners", len(chain), len(results.winners))
	}
	if len(l.validators) > proposers+len(l.round.leaving) {
		t.Errorf("%d validators are left", len(l.validators))
	}
}

// The draw alone, without its random ticket, beside the bare sum of the stakes.
func BenchmarkDrawAlone(b *testing.B) {
	for _, candidates := range []int{10, 1000, 100_000, 1_000_000} {
		b.Run(strconv.Itoa(candidates), func(b *testing.B) {
			var pool lotteryPool
			for i := range candidates {
				stake := 1 + int64(i)*7919%maxStake
				pool.stakes = append(pool.stakes, stake)
				pool.total += stake
			}
			tickets := make([]int64, 64)
			for i := range tickets {
				tickets[i] = drawTicket(pool.total)
			}
			b.ReportAllocs()
			var drawing, adding time.Duration
			for b.Loop() {
				start := time.Now()
				for _, ticket := range tickets {
					if pool.winner(ticket) >= candidates {
						b.Fatal(ticket)
					}
				}
				drawing += time.Since(start)

				start = time.Now()
				for range tickets {
					sum := int64(0)
					for _, stake := range pool.stakes {
						sum += stake
					}
					if sum != pool.total {
						b.Fatal(sum)
					}
				}
				adding += time.Since(start)
			}
			b.ReportMetric(float64(drawing)/float64(b.N*len(tickets)), "ns/draw")
			b.ReportMetric(float64(drawing)/float64(adding), "sums")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// The random ticket for it.
func BenchmarkTicket(b *testing.B) {
	for b.Loop() {
		drawTicket(1_000_000 * maxStake)
	}
}
