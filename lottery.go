package main

import (
	"context"
	"crypto/rand"
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

// A validator takes part in the lottery from its join until it is disqualified or, after
// it leaves, until the draw that ends the round. address and stake never change;
// the lottery's mutex guards the rest.
type validator struct {
	address string        // 64 hexadecimal digits
	stake   int64         // tokens, 1 to maxStake
	index   int           // of its candidate in tempBlocks; may be of an earlier round, see round.has
	removed chan struct{} // made by leave; closed when the validator is removed
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
	validator *validator
	bpm       int
	proposed  time.Time
}

// A round is what one draw decides on.
type round struct {
	index      int          // of the block that the winner gets
	tempBlocks []candidate  // at most one a validator, in no order
	pool       lotteryPool  // their stakes, in the order of tempBlocks
	leaving    []*validator // to be removed after the draw
}

// has reports whether the validator has a candidate in the round.
func (r *round) has(v *validator) bool {
	return v.index < len(r.tempBlocks) && r.tempBlocks[v.index].validator == v
}

// add adds a candidate to the round.
func (r *round) add(c candidate) {
	c.validator.index = len(r.tempBlocks)
	r.tempBlocks = append(r.tempBlocks, c)
	r.pool.stakes = append(r.pool.stakes, c.validator.stake)
	r.pool.total += c.validator.stake
}

// remove removes the validator's candidate, if there is one, from the round.
func (r *round) remove(v *validator) {
	if !r.has(v) {
		return
	}
	last := len(r.tempBlocks) - 1
	r.tempBlocks[last].validator.index = v.index
	r.tempBlocks[v.index], r.pool.stakes[v.index] = r.tempBlocks[last], r.pool.stakes[last]
	r.tempBlocks, r.pool.stakes = r.tempBlocks[:last], r.pool.stakes[:last]
	r.pool.total -= v.stake
}

// An announcer sends the lottery's results to all validators, without waiting for
// slow ones.
type announcer interface {
	announce(winner *validator, tokens int64) // the tokens that were in the draw
	broadcast(chain []byte)                   // what Blockchain.latest returned
}

// A lottery decides, round by round, whose block joins the chain.
type lottery struct {
	roundInterval     time.Duration // between two draws
	broadcastInterval time.Duration // between two broadcasts
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

// newAddress returns a random address for a validator. One from the clock, as in the
// tutorial, could come twice and be guessed.
func newAddress() string {
	random := make([]byte, 32)
	rand.Read(random) // never fails
	return hex.EncodeToString(random)
}

// join returns a new validator, and logs from where it joins. It logs under the mutex, so that
// the numbers of validators and tokens are in the order of the lines.
func (l *lottery) join(stake int64, from string) *validator {
	v := &validator{address: newAddress(), stake: stake}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.validators[v.address] = v
	l.tokens += stake
	l.log.Printf("validator %s joins from %s with %d tokens; validators: %d, tokens: %d", v.address, from, stake, len(l.validators), l.tokens)
	return v
}

// A standing is how the open round stands for a validator.
type standing struct {
	index    int           // of the block that the winner gets
	bpm      int           // of the validator's candidate, if it has proposed one
	tokens   int64         // of all that have a candidate so far
	drawIn   time.Duration // until the next tick
	proposed bool
	added    bool // by this very call
}

// standing returns how the open round stands for the validator.
func (l *lottery) standing(v *validator) standing {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.standingLocked(v)
}

// propose makes a candidate for the validator, unless it has one in this round.
func (l *lottery) propose(v *validator, bpm int) standing {
	l.mu.Lock()
	defer l.mu.Unlock()
	added := !l.round.has(v)
	if added {
		l.round.add(candidate{v, bpm, time.Now()})
	}
	s := l.standingLocked(v)
	s.added = added
	return s
}

// standingLocked is standing. l.mu must be held.
func (l *lottery) standingLocked(v *validator) standing {
	s := standing{
		index:    l.round.index,
		tokens:   l.round.pool.total,
		drawIn:   l.roundInterval - time.Since(l.lastTick)%l.roundInterval,
		proposed: l.round.has(v),
	}
	if s.proposed {
		s.bpm = l.round.tempBlocks[v.index].bpm
	}
	return s
}

// disqualify removes the validator at once, with its stake and its candidate.
func (l *lottery) disqualify(v *validator) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.round.remove(v)
	l.removeLocked(v)
}

// removeLocked removes the validator and its stake. l.mu must be held.
func (l *lottery) removeLocked(v *validator) {
	delete(l.validators, v.address)
	l.tokens -= v.stake
}

// leave marks the validator for removal after the open round's draw, in which its stake
// and its candidate still count. The channel is closed when it has been removed.
func (l *lottery) leave(v *validator) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	v.removed = make(chan struct{})
	l.round.leaving = append(l.round.leaving, v)
	return v.removed
}

// run draws a winner at every tick and broadcasts the chain at every tick of
// another ticker, until ctx is done or the chain is lost. Where both tick at once
// the draw comes first. If a draw takes longer than a round, ticks are skipped.
func (l *lottery) run(ctx context.Context, to announcer) error {
	draws := time.NewTicker(l.roundInterval)
	defer draws.Stop()
	broadcasts := time.NewTicker(l.broadcastInterval)
	defer broadcasts.Stop()

	l.dump(l.chain.head)
	for {
		var draw time.Time // the tick, if a draw is due
		broadcast := false
		select {
		case <-ctx.Done():
			return nil
		case draw = <-draws.C:
		case <-broadcasts.C:
			broadcast = true
			select {
			case draw = <-draws.C:
			case <-time.After(time.Millisecond): // the ticks of one instant may arrive in any order
			}
		}
		if !draw.IsZero() {
			if err := l.pickWinner(draw, to); err != nil {
				return err
			}
		}
		if broadcast {
			to.broadcast(l.chain.latest())
		}
	}
}

// pickWinner ends the round at its tick: it draws the winner, adds its block to
// the chain, announces and prints it, and removes the validators that leave. While
// the block is written the next round is open already, since that may take long
// and nobody should wait for it. If writing it fails, both rounds become one, and the
// validators that leave but have a candidate in it stay for its draw. The error
// wraps errChainLost, after which no draw can succeed.
func (l *lottery) pickWinner(tick time.Time, to announcer) error {
	l.mu.Lock()
	drawn := l.round
	l.round = round{index: drawn.index}
	if len(drawn.tempBlocks) > 0 {
		l.round.index++
	}
	l.lastTick = tick
	l.mu.Unlock()

	if len(drawn.tempBlocks) > 0 {
		won := drawn.tempBlocks[drawn.pool.winner(drawTicket(drawn.pool.total))]
		winner := won.validator
		block := generateBlock(l.chain.head, won.bpm, winner.address, won.proposed)
		switch err := l.chain.append(block); {
		case errors.Is(err, errChainLost):
			return err
		case err != nil:
			l.log.Printf("no winner: block %d cannot be written; its %d candidates go into the next draw: %v", block.Index, len(drawn.tempBlocks), err)
			l.restore(drawn)
		default:
			l.log.Printf("block %d: validator %s wins with %d tokens; candidates: %d, tokens: %d",
				block.Index, winner.address, winner.stake, len(drawn.tempBlocks), drawn.pool.total)
			to.announce(winner, drawn.pool.total)
			l.dump(block)
		}
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	for _, v := range drawn.leaving {
		if l.round.has(v) {
			l.round.leaving = append(l.round.leaving, v)
			continue
		}
		l.removeLocked(v)
		close(v.removed)
	}
	return nil
}

// drawTicket returns a random ticket, 0 <= ticket < total.
func drawTicket(total int64) int64 {
	ticket, _ := rand.Int(rand.Reader, big.NewInt(total)) // rand.Reader never fails
	return ticket.Int64()
}

// restore puts the candidates of a failed draw back into the open round, where they
// replace what the same validators have proposed since.
func (l *lottery) restore(drawn round) {
	l.mu.Lock()
	defer l.mu.Unlock()
	since := l.round
	l.round = round{index: drawn.index, leaving: since.leaving}
	for _, c := range append(drawn.tempBlocks, since.tempBlocks...) {
		if _, in := l.validators[c.validator.address]; in && !l.round.has(c.validator) {
			l.round.add(c)
		}
	}
}

// dump prints a block of the chain, in one write.
func (l *lottery) dump(block Block) {
	io.WriteString(l.stdout, spew.Sdump(block))
}
