"""The compiled loop over passes, for every rule and cache."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from llada_jax.sampling import state as state_lib
from llada_jax.sampling.cache import CACHES
from llada_jax.sampling.model import cached_model
from llada_jax.sampling.one_pass import Given, one_pass
from llada_jax.sampling.revoke import REVOKES
from llada_jax.sampling.settings import Settings
from llada_jax.sampling.state import Inputs, State
from llada_jax.sampling.trace import Trace
from llada_jax.sampling.unmasking import COMMITS, CONFIDENCES
from llada_jax.sampling.view import View


class Turn(NamedTuple):
    """What `advance` is to do."""

    inputs: Inputs
    refilled: Bool[Array, " b"]  # rows that begin anew, from the inputs
    empty: Bool[Array, " b"]  # rows without a prompt: they are finished
    looks: Bool[Array, ""]  # whether to stop when a row has finished a block, too
    limit: Int[Array, ""]  # passes of the batch after which to stop


@functools.partial(jax.jit, static_argnames=("s", "block_only"))
def fill(given: Given, inputs: Inputs, s: Settings, block_only: bool) -> Trace:
    """The Trace of `generate`. Compiled for each `s` and shapes."""
    return finish(run(given, begin(given, inputs, s, block_only), s, block_only, unfinished), s)


@functools.partial(jax.jit, static_argnames=("s", "block_only"), donate_argnames="state")
def advance(given: Given, state: State, turn: Turn, s: Settings, block_only: bool):
    """Refills rows, and makes passes until one is finished; returns (state, Trace)."""
    new = state_lib.begin(turn.inputs, s)
    new = new.replace(began=jnp.broadcast_to(state.passes, new.began.shape))
    rows = state_lib.replace_rows(state.rows, new, turn.refilled)
    rows = rows.replace(block=jnp.where(turn.empty, state_lib.blocks(rows, s), rows.block))
    state = state.replace(rows=rows)
    start, was = rows.block, state_lib.active(rows, s)

    def goes_on(state, s):
        now = state_lib.active(state.rows, s)
        event = jnp.any(was & (~now | (turn.looks & (state.rows.block > start))))
        if s.lockstep:  # rows are refilled only where all begin a block
            event &= jnp.all(~now | (state.rows.turn == 0))
        return jnp.any(now) & ~event & (state.passes < turn.limit)

    state = run(given, state, s, block_only, goes_on)
    return state, finish(state, s), state.rows.block


def blank(given: Given, inputs: Inputs, s: Settings, block_only: bool, sharding=None) -> State:
    """A state in which all rows are finished, for `advance`; sharding: that of the rows."""
    shapes = jax.eval_shape(lambda *a: begin(*a, s, block_only), given, inputs)
    leaves, tree = jax.tree.flatten(shapes)
    split = None
    if sharding is not None:
        split = [jax.sharding.NamedSharding(sharding.mesh, _spec(x, sharding)) for x in leaves]
    zeros = jax.jit(lambda: [jnp.zeros(x.shape, x.dtype) for x in leaves], out_shardings=split)
    return jax.tree.unflatten(tree, zeros())


def _spec(x, sharding) -> jax.sharding.PartitionSpec:
    """How an array of the state is split: by rows, which stand after the layers in a cache."""
    if x.ndim == 0:
        return jax.sharding.PartitionSpec()
    return jax.sharding.PartitionSpec(None, *sharding.spec) if x.ndim > 3 else sharding.spec


def begin(given: Given, inputs: Inputs, s: Settings, block_only: bool) -> State:
    """The state before the first pass. With block_only no mask stands outside of the responses."""
    rows = state_lib.begin(inputs, s)
    batch, length = rows.tokens.shape
    cache = None
    twice = batch if s.cfg_scale == 0 else 2 * batch
    if s.cache != "none":
        entry = CACHES[s.cache]
        module = cached_model(given.logits_fn, entry.kind)
        if entry.kind == "parts":
            cache = module.init_features(twice, length)
        else:
            shadow = s.block_length if REVOKES[s.revoke].shadow else 0
            cache = module.init_cache(twice, length + shadow)
    if COMMITS[s.commit].stable:
        size = s.block_length if block_only else length
        vocabulary = jax.eval_shape(given.logits_fn, rows.tokens, None).shape[-1]
        rows = rows.replace(
            history={
                "logits": jnp.zeros((batch, size, vocabulary), jnp.float32),
                "stable": jnp.zeros((batch, size), jnp.int32),
            }
        )
    return State(rows, jnp.int32(0), cache)


def finish(state: State, s: Settings) -> Trace:
    """What the rows have written so far."""
    rows = state.rows
    tokens, is_open = rows.tokens, state_lib.is_open(rows, s)
    if s.stop_at_eos:
        after, stopped = state_lib.after_eos(rows, s)
        tokens = jnp.where(after & is_open & stopped[:, None], s.eos_id, tokens)
    beyond = state_lib.places(rows) >= rows.end[:, None]
    if s.eos_id is not None:  # a row that is shorter than the buffer ends there
        tokens = jnp.where(beyond, s.eos_id, tokens)
    committed = (rows.steps > 0) & ~is_open
    confidence = CONFIDENCES[s.remasking].value(rows.score)
    return Trace(
        tokens=tokens,
        steps=jnp.where(beyond, -1, rows.steps),
        confidence=jnp.where(committed, confidence, jnp.nan).astype(jnp.float32),
        revocations=rows.revocations,
        passes=state.passes,
        row_passes=rows.passes,
        lengths=rows.end - rows.start,
        finished=~state_lib.active(rows, s),
    )


def unfinished(state: State, s: Settings):
    """Whether a row is not finished."""
    return jnp.any(state_lib.active(state.rows, s))


def run(given: Given, state: State, s: Settings, block_only: bool, goes_on) -> State:
    """Makes passes while goes_on(state, s).

    Each kind of pass has a loop of its own within one outer loop. A `cond` in one loop would do the
    same, but XLA copies the cache at every branch of a conditional. Loops update it in place.
    """
    kind, views = _kinds(state, s, block_only)

    def pass_of(view, state):
        return one_pass(state, view(state), given, block_only or view is not views[0])

    def is_next(state, number):
        return goes_on(state, s) & (kind(state) == number)

    def all_kinds(state):
        for number, view in enumerate(views):
            state = jax.lax.while_loop(
                functools.partial(is_next, number=number), functools.partial(pass_of, view), state
            )
        return state

    if len(views) == 1:
        return jax.lax.while_loop(
            lambda state: goes_on(state, s), functools.partial(pass_of, views[0]), state
        )
    return jax.lax.while_loop(lambda state: goes_on(state, s), all_kinds, state)


def _kinds(state: State, s: Settings, block_only: bool):
    """(state -> the kind of the next pass, for each kind: state -> its view)."""

    def full(state):
        wanted = state_lib.block_places(state.rows, s) if block_only else None
        return View(state.rows, s, wanted=wanted)

    if s.cache == "none":
        return None, [full]
    if CACHES[s.cache].kind == "parts":
        return _parts(s, full)
    return _windows(state, s, block_only, full)


def _windows(state: State, s: Settings, block_only: bool, full):
    """Kind 0 is a full pass, kind k a window of the k-th size."""
    cache = CACHES[s.cache]
    length, start = state.rows.tokens.shape[1], state.rows.start
    blocks = s.gen_length // s.block_length
    windows = cache.windows(start, length, s.block_length, blocks)
    if windows.starts is None and not block_only:
        # Masks outside the block are in the window, too.
        windows = windows._replace(sizes=(length,), size_of=np.zeros(blocks, int))

    def kind(state):
        rows = state.rows
        active = state_lib.active(rows, s)
        turn = jnp.max(jnp.where(active, rows.turn, 0))  # passes since the blocks began
        # What is left may be masks outside the block, which no window fills.
        left = state_lib.is_open(rows, s) & state_lib.inside(rows, s) & active[:, None]
        is_full = (turn < cache.full_passes) | ~jnp.any(left)
        if s.refresh is not None:
            is_full |= turn % s.refresh == 0
        # A window is as large as that of the row that is least far.
        least = jnp.min(jnp.where(active, rows.block, blocks - 1))
        return jnp.where(is_full, 0, 1 + jnp.asarray(windows.size_of, jnp.int32)[least])

    def window(state, size):
        rows = state.rows
        wanted = state_lib.block_places(rows, s)
        if windows.starts is None:
            needed = ~rows.before | state_lib.is_open(rows, s)
            order = jnp.argsort(~needed, axis=1, stable=True)[:, :size]
            writes = jnp.take_along_axis(needed, order, 1)
            return View(rows, s, order, writes, wanted)
        block = jnp.minimum(rows.block, blocks - 1)
        first = jnp.asarray(windows.starts, jnp.int32)[block]
        fed = jnp.minimum(first, length - size)[:, None] + jnp.arange(size)
        writes = None if size == s.block_length else fed >= wanted[:, :1]
        return View(rows, s, fed, writes, wanted)

    return kind, [full, *(functools.partial(window, size=size) for size in windows.sizes)]


def _parts(s: Settings, full):
    """Kind 0 computes prompt and response, 1 the prompt, 2 the response, 3 neither anew."""

    def due(rows, every):
        return state_lib.active(rows, s) & (rows.passes % every == 0)

    def kind(state):
        prompt = jnp.any(due(state.rows, s.refresh_prompt))
        response = jnp.any(due(state.rows, s.refresh))
        return jnp.where(prompt, jnp.where(response, 0, 1), jnp.where(response, 2, 3))

    shares = [int(n * s.transfer_ratio) for n in range(s.gen_length + 1)]

    def view(state, prompt, response):
        rows = state.rows
        found = full(state)
        found.parts = dict(
            start=rows.start,
            prompt=prompt,
            response=response,
            most=shares[-1],
            rows_prompt=due(rows, s.refresh_prompt),
            rows_response=due(rows, s.refresh),
            chosen=jnp.asarray(shares)[jnp.minimum(rows.end - rows.start, s.gen_length)],
        )
        return found

    parts = [(True, True), (True, False), (False, True), (False, False)]
    return kind, [functools.partial(view, prompt=p, response=r) for p, r in parts]
