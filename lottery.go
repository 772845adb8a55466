package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"log"
	"math/big"
	"sync"
	"time"

	"github.com/davecgh/go-spew/spew"
)

// maxStake is the largest stake in tokens. A million validators with as much
// each have 10^18 tokens, so no total overflows an int64.
const maxStake = 1_000_000_000_000

// A validator takes part in the lottery, from its join until it is disqualified
// or the draw after its leave. The lottery's mutex guards it.
type validator struct {
	address string        // 64 hexadecimal digits
	stake   int64         // tokens, 1 to maxStake
	slot    int           // of its block in the round's tempBlocks, if that block is its own
	gone    chan struct{} // made by leave, closed by the draw after it
}

// A lotteryPool holds the stakes of a round's candidates. It stands for the
// tutorial's pool, in which a validator's address is repeated for each of its
// tokens, but grows with the candidates, never with the tokens.
type lotteryPool struct {
	stakes []int64
	total  int64 // of stakes
}

// winner returns which candidate holds the ticket, 0 <= ticket < total.
func (p lotteryPool) winner(ticket int64) int {
	i := 0
	for ticket >= p.stakes[i] {
		ticket -= p.stakes[i]
		i++
	}
	return i
}

// A candidate is a block as a validator proposes it. It becomes a Block when it
// has won: made at once, as in the tutorial, it would follow a block that may
// no longer be the newest by then.
type candidate struct {
	address  string // of the validator
	bpm      int
	proposed time.Time
}

// A round is what one draw decides on.
type round struct {
	index      int          // of the block that the winner gets
	tempBlocks []candidate  // at most one a validator, in no order
	pool       lotteryPool  // their stakes, in the order of tempBlocks
	departed   []*validator // who left, and is gone after the draw
}

// has reports whether the validator has a candidate in the round.
func (r *round) has(v *validator) bool {
	return v.slot < len(r.tempBlocks) && r.tempBlocks[v.slot].address == v.address
}

// add puts the validator's candidate in.
func (r *round) add(v *validator, c candidate) {
	v.slot = len(r.tempBlocks)
	r.tempBlocks = append(r.tempBlocks, c)
	r.pool.stakes = append(r.pool.stakes, v.stake)
	r.pool.total += v.stake
}

// An audience hears what the lottery has to tell. It must not make the lottery
// wait.
type audience interface {
	announce(winner Block)
	broadcast(chain [][]byte) // what Blockchain.latest returned
}

// A lottery decides, round by round, whose block joins the chain.
type lottery struct {
	roundInterval     time.Duration // between two draws
	broadcastInterval time.Duration // between two broadcasts
	broadcastBlocks   int           // in a broadcast; 0 is the whole chain
	stdout            io.Writer     // gets each block of the chain as spew.Dump prints it
	log               *log.Logger
	chain             *Blockchain // run alone uses it

	mu         sync.Mutex // guards the following, which change together
	validators map[string]*validator
	tokens     int64 // the validators' stakes
	round      round
	lastTick   time.Time // of the draws' ticker
}

// newLottery returns a lottery for the blocks after those of the chain. Its
// intervals are set before it runs.
func newLottery(chain *Blockchain, stdout io.Writer, logger *log.Logger) *lottery {
	return &lottery{
		chain:      chain,
		stdout:     stdout,
		log:        logger,
		round:      round{index: chain.head.Index + 1},
		validators: make(map[string]*validator),
		lastTick:   time.Now(),
	}
}

// newAddress returns an address for a validator. One from the clock, as in the
// tutorial, could come twice and be guessed.
func newAddress() string {
	random := make([]byte, 32)
	rand.Read(random) // never fails
	sum := sha256.Sum256(random)
	return hex.EncodeToString(sum[:])
}

// join returns a new validator, with the number of validators and of their tokens.
func (l *lottery) join(stake int64) (v *validator, validators int, tokens int64) {
	v = &validator{address: newAddress(), stake: stake}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.validators[v.address] = v
	l.tokens += stake
	return v, len(l.validators), l.tokens
}

// propose makes a candidate for the validator, unless it has one in this round.
// It returns the Index that the candidate's block would get, whether the candidate
// is a new one, and the time to the draw.
func (l *lottery) propose(v *validator, bpm int) (index int, added bool, drawIn time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if added = !l.round.has(v); added {
		l.round.add(v, candidate{v.address, bpm, time.Now()})
	}
	return l.round.index, added, l.roundInterval - time.Since(l.lastTick)%l.roundInterval
}

// disqualify puts the validator out at once, with its stake and its candidate.
func (l *lottery) disqualify(v *validator) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r := &l.round; r.has(v) {
		last := len(r.tempBlocks) - 1
		moved := l.validators[r.tempBlocks[last].address]
		moved.slot = v.slot
		r.tempBlocks[v.slot], r.pool.stakes[v.slot] = r.tempBlocks[last], r.pool.stakes[last]
		r.tempBlocks, r.pool.stakes = r.tempBlocks[:last], r.pool.stakes[:last]
		r.pool.total -= v.stake
	}
	l.remove(v)
}

// remove takes the validator and its stake off the books. mu is held.
func (l *lottery) remove(v *validator) {
	delete(l.validators, v.address)
	l.tokens -= v.stake
}

// leave takes note that the validator has nothing more to say. Its stake and
// its candidate stay until the draw; when that is over and announced, the
// channel is closed.
func (l *lottery) leave(v *validator) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	v.gone = make(chan struct{})
	l.round.departed = append(l.round.departed, v)
	return v.gone
}

// run draws a winner at every tick and broadcasts the chain at every tick of
// another ticker, until ctx is done or the chain is lost. Where both tick at once
// the draw comes first. A draw that takes longer than a round skips ticks.
func (l *lottery) run(ctx context.Context, everyone audience) error {
	draws := time.NewTicker(l.roundInterval)
	defer draws.Stop()
	broadcasts := time.NewTicker(l.broadcastInterval)
	defer broadcasts.Stop()

	l.dump(l.chain.head)
	for {
		select {
		case <-ctx.Done():
			return nil
		case tick := <-draws.C:
			if err := l.pickWinner(tick, everyone); err != nil {
				return err
			}
		case <-broadcasts.C:
			select {
			case tick := <-draws.C:
				if err := l.pickWinner(tick, everyone); err != nil {
					return err
				}
			default:
			}
			everyone.broadcast(l.chain.latest(l.broadcastBlocks))
		}
	}
}

// pickWinner ends the round at its tick: it draws the winner, adds its block to
// the chain, announces and prints it, and lets the departed go. While the block
// is being added the next round is open already, since that may take long and
// must not hold up anybody. If adding it fails, both rounds become one, and of the
// departed those with a candidate stay for its draw. The error is errChainLost,
// after which no draw can succeed.
func (l *lottery) pickWinner(tick time.Time, everyone audience) error {
	l.mu.Lock()
	drawn := l.round
	l.round = round{index: drawn.index + min(len(drawn.tempBlocks), 1)}
	l.lastTick = tick
	l.mu.Unlock()

	if len(drawn.tempBlocks) > 0 {
		slot := drawn.pool.winner(drawTicket(drawn.pool.total))
		won := drawn.tempBlocks[slot]
		winner := generateBlock(l.chain.head, won.bpm, won.address, won.proposed)
		switch err := l.chain.append(winner); {
		case errors.Is(err, errChainLost):
			return err
		case err != nil:
			l.log.Printf("nothing drawn, the %d candidates stay for the next draw: %v", len(drawn.tempBlocks), err)
			l.reopen(drawn)
		default:
			l.log.Printf("block %d: validator %s wins with %d tokens; candidates: %d, tokens: %d",
				winner.Index, winner.Validator, drawn.pool.stakes[slot], len(drawn.tempBlocks), drawn.pool.total)
			everyone.announce(winner)
			l.dump(winner)
		}
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	for _, v := range drawn.departed {
		if l.round.has(v) {
			l.round.departed = append(l.round.departed, v)
			continue
		}
		l.remove(v)
		close(v.gone)
	}
	return nil
}

// drawTicket returns a random ticket, 0 <= ticket < total.
func drawTicket(total int64) int64 {
	ticket, _ := rand.Int(rand.Reader, big.NewInt(total)) // rand.Reader never fails
	return ticket.Int64()
}

// reopen takes a draw back: its candidates are in the open round again, instead of
// any that the same validators have proposed since.
func (l *lottery) reopen(drawn round) {
	l.mu.Lock()
	defer l.mu.Unlock()
	since := l.round
	l.round = round{index: drawn.index, departed: since.departed}
	for _, c := range append(drawn.tempBlocks, since.tempBlocks...) {
		if v, in := l.validators[c.address]; in && !l.round.has(v) {
			l.round.add(v, c)
		}
	}
}

// dump prints a block of the chain, in one write.
func (l *lottery) dump(block Block) {
	if _, err := io.WriteString(l.stdout, spew.Sdump(block)); err != nil {
		l.log.Printf("cannot print block %d: %v", block.Index, err)
	}
}
