"""The rows that are written: their text, and where each stands in it.

Every array has one entry for each row, and what happens to a row depends on its own entries alone.
So rows may be in different blocks, and a row that is finished can be replaced.
"""

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada_jax.sampling.settings import Settings
from llada_jax.sampling.unmasking import COMMITS


@flax.struct.dataclass
class Rows:
    """The state of all rows between two passes.

    The types say `| Any` because the same tree may also hold shapes.
    """

    start: int = flax.struct.field(pytree_node=False)  # where the responses begin
    # Whether some positions must not be attended to: padding, or what is beyond the end of a row.
    masked: bool = flax.struct.field(pytree_node=False)

    tokens: Int[Array, "b l"] | Any
    given: Bool[Array, "b l"] | Any  # no mask at the beginning: masked in the unconditional input
    real: Bool[Array, "b l"] | Any  # not padding
    end: Int[Array, " b"] | Any  # where the text of the row ends
    row_id: Int[Array, " b"] | Any  # tells the random draws of rows apart

    block: Int[Array, " b"] | Any
    turn: Int[Array, " b"] | Any  # passes of the row in its block
    step: Int[Array, " b"] | Any  # those of them that count as steps of the schedule
    planned: Int[Array, " b"] | Any  # masks that the block is to commit, counted when it begins
    passes: Int[Array, " b"] | Any  # of the row in all
    began: Int[Array, " b"] | Any  # the passes of the batch before the row's first
    sizing: Bool[Array, " b"] | Any  # still looking for its first length: commits nothing

    committed: (
        Int[Array, " b"] | Any
    )  # in the last pass of the block; a large number before its first
    revoked: Int[Array, " b"] | Any  # in the last pass: the schedule commits as many in the next
    revisions: Int[Array, " b"] | Any  # passes of the block that revoked something
    before: Bool[Array, "b l"] | Any  # no mask before the last pass

    score: Float[Array, "b l"] | Any  # at the commit; +inf where nothing was committed
    steps: Int[Array, "b l"] | Any  # the pass, from 1, that committed; 0 given, -1 not yet
    revocations: Int[Array, "b l"] | Any  # how often the position was masked again
    history: Any  # what the commit rule remembers of the block's last passes

    @property
    def padding(self) -> Int[Array, " b"]:
        """The positions before the first real token."""
        return jnp.argmax(self.real, 1).astype(jnp.int32)


@flax.struct.dataclass
class State:
    """What a pass takes and returns."""

    rows: Rows
    passes: Int[Array, ""] | Any  # of the batch
    cache: Any  # of the model, or None


class Inputs(NamedTuple):
    """The arrays of `generate` that make rows."""

    prompts: Int[Array, "b p"]
    attention_mask: Int[Array, "b p"] | None
    suffix: Int[Array, "b q"] | None
    lengths: Int[Array, " b"] | None  # of the responses; None: gen_length
    row_ids: Int[Array, " b"] | None


def begin(inputs: Inputs, s: Settings) -> Rows:
    """The rows before their first pass."""
    prompts, attention_mask, suffix, lengths, row_ids = inputs
    batch, start = prompts.shape
    row_ids = jnp.arange(batch) if row_ids is None else row_ids
    parts = [prompts, jnp.full((batch, s.gen_length), s.mask_id, jnp.int32)]
    tokens = jnp.concatenate(parts if suffix is None else [*parts, suffix], 1)
    real = jnp.ones(tokens.shape, bool)
    if attention_mask is not None:
        rest = tokens.shape[1] - start
        real = jnp.pad(attention_mask != 0, ((0, 0), (0, rest)), constant_values=True)
    end = jnp.full(batch, tokens.shape[1], jnp.int32)
    if lengths is not None:
        end = start + lengths.astype(jnp.int32)
    if s.growth is not None:
        end = jnp.full(batch, start + s.growth.initial_length, jnp.int32)
    zero = jnp.zeros(batch, jnp.int32)
    given = tokens != s.mask_id
    rows = Rows(
        start=start,
        masked=attention_mask is not None or lengths is not None or s.growth is not None,
        tokens=tokens,
        given=given,
        real=real,
        end=end,
        row_id=row_ids.astype(jnp.int32),
        block=zero,
        turn=zero,
        step=zero,
        planned=zero,
        passes=zero,
        began=zero,
        sizing=jnp.full(batch, s.growth is not None),
        committed=jnp.full(batch, tokens.shape[1]),
        revoked=zero,
        revisions=zero,
        before=given,
        score=jnp.full(tokens.shape, jnp.inf, jnp.float32),
        steps=jnp.where(given | ~real, 0, -1),
        revocations=jnp.zeros(tokens.shape, jnp.int32),
        history=None,
    )
    return rows.replace(planned=count(counted(rows, s)))


def count(x: Bool[Array, "b l"]) -> Int[Array, " b"]:
    """How many positions of each row."""
    return jnp.sum(x, 1, dtype=jnp.int32)


def places(rows: Rows) -> Int[Array, " l"]:
    """All positions of the text."""
    return jnp.arange(rows.tokens.shape[1], dtype=jnp.int32)


def blocks(rows: Rows, s: Settings) -> Int[Array, " b"]:
    """The number of blocks of each row."""
    length = jnp.minimum(rows.end - rows.start, s.gen_length)
    return -(-length // s.block_length)


def is_open(rows: Rows, s: Settings) -> Bool[Array, "b l"]:
    """The masks that can be filled. By value: a mask token in the prompt is open too."""
    return (rows.tokens == s.mask_id) & rows.real & (places(rows) < rows.end[:, None])


def bounds(rows: Rows, s: Settings) -> tuple[Int[Array, "b 1"], Int[Array, "b 1"]]:
    """Where the block begins, and up to where masks compete in it."""
    first = rows.start + rows.block * s.block_length
    # Masks after the response compete with the last block.
    last = rows.block >= blocks(rows, s) - 1
    return first[:, None], jnp.where(last, rows.end, first + s.block_length)[:, None]


def block_places(rows: Rows, s: Settings) -> Int[Array, "b n"]:
    """The positions of the block; those of the last one may lie beyond the end."""
    return bounds(rows, s)[0] + jnp.arange(s.block_length)


def inside(rows: Rows, s: Settings) -> Bool[Array, "b l"]:
    """Which positions are in the block."""
    first, _ = bounds(rows, s)
    return (places(rows) >= first) & (places(rows) < first + s.block_length)


def counted(rows: Rows, s: Settings) -> Bool[Array, "b l"]:
    """The open positions that the block must fill."""
    first, end = bounds(rows, s)
    found = is_open(rows, s) & (places(rows) < end)
    return found & (places(rows) >= first) if s.infill == "published" else found


def active(rows: Rows, s: Settings) -> Bool[Array, " b"]:
    """The rows that are not finished."""
    return rows.block < blocks(rows, s)


def after_eos(rows: Rows, s: Settings) -> tuple[Bool[Array, "b l"], Bool[Array, " b"]]:
    """The response positions after the first EOS, and whether all before it is filled."""
    at = places(rows)
    response = (at >= rows.start) & (at < rows.start + s.gen_length) & (at < rows.end[:, None])
    is_eos = (rows.tokens == s.eos_id) & response
    first = jnp.where(jnp.any(is_eos, 1), jnp.argmax(is_eos, 1), rows.tokens.shape[1])[:, None]
    filled = ~jnp.any(is_open(rows, s) & (at < first), 1)
    return response & (at > first), filled & jnp.any(is_eos, 1)


def advance(rows: Rows, was: Array, s: Settings) -> Rows:
    """The rows after a pass; `was` [b, l] are the tokens before it.

    A row that is done with its block begins the next. In lockstep it waits, with nothing left to
    commit, until all rows are done with theirs.
    """
    done = ~jnp.any(counted(rows, s), 1)
    if s.infill == "published":
        if COMMITS[s.commit].scheduled:
            done |= rows.step >= s.steps // (s.gen_length // s.block_length)
        elif s.temperature == 0:
            # Without this, a candidate that is the mask token would be committed for ever.
            done |= ~jnp.any(rows.tokens != was, 1)
    done &= ~rows.sizing
    now = active(rows, s)
    if s.stop_at_eos:
        block = jnp.where(after_eos(rows, s)[1] & now, blocks(rows, s), rows.block)
        rows = rows.replace(block=block)
        now = active(rows, s)
    moves = now & done
    if s.lockstep:
        moves &= jnp.all(done | ~now)
    rows = rows.replace(block=rows.block + moves)
    fresh = functools.partial(jnp.where, moves)
    return rows.replace(
        turn=fresh(0, rows.turn),
        step=fresh(0, rows.step),
        revoked=fresh(0, rows.revoked),
        revisions=fresh(0, rows.revisions),
        committed=fresh(rows.tokens.shape[1], rows.committed),
        planned=fresh(count(counted(rows, s)), rows.planned),
    )


def replace_rows(old: Rows, new: Rows, which: Bool[Array, " b"]) -> Rows:
    """The old rows, with the new ones in the places where `which` is true."""

    def choose(x, y):
        return jnp.where(which.reshape(-1, *[1] * (y.ndim - 1)), y, x)

    return jax.tree.map(choose, old, new.replace(history=old.history))
