"""Published samplers in plain numpy, for one row at temperature 0: the truth of sampler tests.

Written from the papers, and from the authors' code where a paper leaves something open:
EB-Sampler arXiv:2505.24857, KLASS arXiv:2511.05664, ReMDM arXiv:2503.00307 (its form for LLaDA,
appendix D.4), DAEDAL arXiv:2508.00819, threshold: Fast-dLLM arXiv:2505.22618.

`decode` knows blocks and passes. A rule is a function of what `Pass` holds, and gives the positions
[L] that become tokens. The mask token is never a candidate; its probability stays with it. Equal
values: the first position wins.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

EPSILON = 1e-12  # KLASS adds it to both probabilities inside the logarithm


def softmax(logits):
    """Probabilities of float64 logits [..., V]."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


class Pass(NamedTuple):
    """What a rule sees: the row of one pass."""

    past: list  # probabilities [L, V] of all passes up to this one, the last is this pass
    confidence: np.ndarray  # [L] the probability of the candidate
    open: np.ndarray  # [L] bool, the masks that compete
    turn: int  # passes since the block began, without those in which `Remdm` revoked
    masks: int  # how many the block had when it began


def best(values, among, count):
    """The `count` positions [L] of `among` with the highest values, or all if they are fewer."""
    order = sorted(np.flatnonzero(among), key=lambda i: (-values[i], i))
    chosen = np.zeros(len(values), bool)
    chosen[order[:count]] = True
    return chosen


def schedule(now: Pass, steps):
    """LLaDA: a block of m masks has `steps` passes, of m // steps commits or one more."""
    count = now.masks // steps + (now.turn < now.masks % steps)
    return best(now.confidence, now.open, max(count, 1))


def threshold(now: Pass, limit):
    """Fast-dLLM: all with confidence >= limit; if there is none, the most confident."""
    enough = now.open & (now.confidence >= limit)
    return enough if enough.any() else best(now.confidence, now.open, 1)


def eb(now: Pass, budget):
    """EB-Sampler, equation 2: the longest run of the most confident, sum H - max H <= budget."""
    p = now.past[-1]
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), -1)
    for count in range(now.open.sum(), 1, -1):
        chosen = best(now.confidence, now.open, count)
        if entropy[chosen].sum() - entropy[chosen].max() <= budget:
            return chosen
    return best(now.confidence, now.open, 1)


def divergences(past):
    """KL(p of a pass || p of the pass before it) [passes, L] in nats; the first is against 0."""
    before = [np.zeros_like(past[0]), *past[:-1]]
    return [
        np.sum(p * (np.log(p + EPSILON) - np.log(q + EPSILON)), -1)
        for p, q in zip(past, before, strict=True)
    ]


def klass(now: Pass, limit, kl_limit, history=2, guard=False, within=False, fallback=1):
    """KLASS: all with confidence > limit whose last `history` divergences are < kl_limit.

    If there is none, the `fallback` most confident. As published, the history runs on from block to
    block; `within` begins it anew with each. With guard none qualifies in the first history - 1
    passes of a block, as in the authors' LLaDA code.
    """
    recent = divergences(now.past[-now.turn - 1 :] if within else now.past)[-history:]
    stable = np.all([kl < kl_limit for kl in recent], axis=0)
    ready = now.open & stable & (now.confidence > limit)
    if guard and now.turn < history - 1:
        ready[:] = False
    return ready if ready.any() else best(now.confidence, now.open, fallback)


@dataclasses.dataclass(frozen=True)
class Remdm:
    """ReMDM for confidence samplers: once `share` of a block is filled, `loops` passes revise it.

    Each masks the `count` tokens of the block that were least probable when they were committed,
    then predicts, then commits the `count` most confident. The paper: share 28 / 32, as many loops
    as the block has steps, count 1 or 4. Nothing is drawn at random.
    """

    count: int
    loops: int
    share: float = 7 / 8

    def begins(self, masks, left):
        """Whether a block that began with so many masks is filled enough, when so many are left."""
        return masks > 0 and masks - left >= max(int(self.share * masks), 1)


@dataclasses.dataclass(frozen=True)
class Daedal:
    """DAEDAL, with the names and defaults of the authors' code; `low` is low_conf_threshold."""

    eos_id: int
    max_length: int = 2048  # of the response
    eos: float = 0.5  # eos_confidence_threshold, stage 1
    expand_eos: float = 0.9  # expand_eos_confidence_threshold, stage 2
    low: float = 0.1
    factor: int = 8
    check: int = 32  # eos_check_tokens

    def sureness(self, p, start):
        """The EOS confidence of probabilities [L, V].

        The sum of p(EOS) at the last `check` positions where EOS is the most probable token,
        divided by `check` even if they are fewer.
        """
        ends = np.flatnonzero(p[start:].argmax(-1) == self.eos_id)[-self.check :] + start
        return p[ends, self.eos_id].sum() / self.check

    def lengthen(self, predict, row, start, mask_id):
        """Stage 1: the row with its masks, then check // 2 EOS tokens; and how many passes it took.

        The EOS tokens are in the authors' code only. They are given, not masks.
        """
        passes = 1
        while self.sureness(softmax(predict(row)), start) < self.eos:
            room = self.max_length - (len(row) - start)
            if room <= 0:
                break
            row = np.append(row, np.full(min(self.factor, room), mask_id))
            passes += 1
        tail = min(self.check // 2, max(self.max_length - (len(row) - start), 0))
        return np.append(row, np.full(tail, self.eos_id)), passes

    def place(self, now: Pass, chosen, start):
        """Stage 2: the position that becomes `factor` masks, or None."""
        p = now.past[-1]
        unsure = now.open & ~chosen & (now.confidence < self.low)
        if not unsure.any() or self.sureness(p, start) >= self.expand_eos:
            return None
        if len(p) - start >= self.max_length:
            return None
        return int(np.flatnonzero(best(-now.confidence, unsure, 1))[0])


class Decoded(NamedTuple):
    """What `decode` returns. Arrays are as long as the row is in the end."""

    tokens: np.ndarray
    steps: np.ndarray  # the pass, from 1, of the last commit; 0 for given tokens
    confidence: np.ndarray  # at that commit; nan for given tokens
    revoked: np.ndarray  # how often the position was masked again
    passes: int  # all passes, those of stage 1 of `Daedal` among them
    length_passes: int  # those of stage 1


@dataclasses.dataclass
class _Row:
    """The arrays of a row that can grow."""

    tokens: np.ndarray
    steps: np.ndarray
    confidence: np.ndarray
    revoked: np.ndarray
    past: list

    def grow(self, place, factor, mask_id, end):
        """Puts `factor` masks in the place of one; what reaches beyond `end` is cut off."""

        def inserted(x, value):
            new = np.full((factor - 1, *x.shape[1:]), value, x.dtype)
            return np.concatenate([x[: place + 1], new, x[place + 1 :]])[:end]

        self.tokens = inserted(self.tokens, mask_id)
        self.steps = inserted(self.steps, -1)
        self.confidence = inserted(self.confidence, np.nan)
        self.revoked = inserted(self.revoked, 0)
        self.past = [inserted(p, np.nan) for p in self.past]  # no past: never stable


def decode(
    predict: Callable,
    row,
    *,
    start: int,
    block_length: int,
    mask_id: int,
    rule: Callable,
    revoke: Remdm | None = None,
    grow: Daedal | None = None,
) -> Decoded:
    """Fills the masks of a row of ids [L] block by block, from position `start` on.

    predict: tokens [L] to float64 logits [L, V]. rule: a `Pass` to positions [L]. A block is done
    when no position before its end is masked; masks before `start` belong to the first block.
    """
    row, length_passes = np.array(row), 0
    if grow:
        row, length_passes = grow.lengthen(predict, row, start, mask_id)
    given = row != mask_id
    nothing = np.full(len(row), np.nan)
    state = _Row(row, np.where(given, 0, -1), nothing, np.zeros(len(row), int), [])
    passes, first = length_passes, start
    while first < len(state.tokens):
        masks = int((state.tokens[: first + block_length] == mask_id).sum())
        began, turn, loop = passes, 0, 0
        while True:
            left = int((state.tokens[: first + block_length] == mask_id).sum())
            looping = revoke and loop < revoke.loops and revoke.begins(masks, left)
            if not left and not looping:
                break
            passes += 1
            if looping:
                _revoke(state, revoke.count, began, mask_id)
            now, candidates = _look(predict, state, first + block_length, mask_id, turn, masks)
            chosen = best(now.confidence, now.open, revoke.count) if looping else rule(now)
            _commit(state, chosen, candidates, now.confidence, passes)
            loop, turn = (loop + 1, turn) if looping else (loop, turn + 1)
            if grow and (place := grow.place(now, chosen, start)) is not None:
                state.grow(place, grow.factor, mask_id, start + grow.max_length)
        first += block_length
    return Decoded(
        state.tokens, state.steps, state.confidence, state.revoked, passes, length_passes
    )


def _look(predict, state: _Row, end, mask_id, turn, masks):
    """One pass: what a rule sees, and the candidates [L]."""
    logits = predict(state.tokens)
    p = softmax(logits)
    state.past = [*state.past, p]
    candidates = np.where(np.arange(p.shape[1]) == mask_id, -np.inf, logits).argmax(-1)
    confidence = p[np.arange(len(p)), candidates]
    is_open = (state.tokens == mask_id) & (np.arange(len(p)) < end)
    return Pass(state.past, confidence, is_open, turn, masks), candidates


def _commit(state: _Row, chosen, candidates, confidence, passes):
    state.tokens = np.where(chosen, candidates, state.tokens)
    state.steps = np.where(chosen, passes, state.steps)
    state.confidence = np.where(chosen, confidence, state.confidence)


def _revoke(state: _Row, count, began, mask_id):
    """Masks the `count` least probable tokens of those committed after pass `began`."""
    again = best(-state.confidence, state.steps > began, count)
    state.tokens = np.where(again, mask_id, state.tokens)
    state.steps = np.where(again, -1, state.steps)
    state.confidence = np.where(again, np.nan, state.confidence)
    state.revoked = state.revoked + again


def rule(name, **numbers):
    """A rule of this file with its numbers, for `decode`."""
    return functools.partial(globals()[name], **numbers)
