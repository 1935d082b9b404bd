"""The compiled loop over passes, for every commit rule, confidence and cache."""

import functools

import jax
import jax.numpy as jnp

from llada_jax.sampling import candidates as candidates_lib
from llada_jax.sampling import unmasking
from llada_jax.sampling.cache import CACHES
from llada_jax.sampling.model import cached_model
from llada_jax.sampling.settings import Settings
from llada_jax.sampling.torch_ties import most_confident
from llada_jax.sampling.trace import Trace
from llada_jax.sampling.unmasking import COMMITS, CONFIDENCES
from llada_jax.sampling.view import Text, View


@functools.partial(jax.jit, static_argnames="s")
def fill(logits_fn, prompts, attention_mask, suffix, allowed, key, row_ids, s: Settings):
    """Returns the tokens [b, l] of `generate`, or its Trace. Compiled for each `s` and shapes."""
    batch, start = prompts.shape
    parts = [prompts, jnp.full((batch, s.gen_length), s.mask_id, jnp.int32)]
    tokens = jnp.concatenate(parts if suffix is None else [*parts, suffix], 1)
    length = tokens.shape[1]
    padding, positions = jnp.zeros(batch, jnp.int32), None
    may_open = jnp.ones(tokens.shape, bool)
    if attention_mask is not None:
        attention_mask = jnp.pad(
            attention_mask.astype(jnp.int32),
            ((0, 0), (0, length - start)),
            constant_values=1,
        )
        may_open = attention_mask != 0
        padding = jnp.argmax(may_open, 1).astype(jnp.int32)
        positions = jnp.maximum(jnp.arange(length, dtype=jnp.int32) - padding[:, None], 0)
    text = Text(start, length, tokens != s.mask_id, may_open, attention_mask, padding, positions)
    keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(row_ids)

    state = {
        "tokens": tokens,
        "block": jnp.zeros(batch, jnp.int32),
        "step": jnp.zeros(batch, jnp.int32),  # passes of the row in its block
        "row_passes": jnp.zeros(batch, jnp.int32),
        "passes": jnp.int32(0),
    }
    state["planned"] = _planned(tokens, state["block"], text, s)
    if s.trace:
        given = (tokens != s.mask_id) | ~may_open
        state["steps"] = jnp.where(given, 0, -1)
        state["confidence"] = jnp.full(tokens.shape, jnp.nan, jnp.float32)
    if s.cache != "none":
        rows = batch if s.cfg_scale == 0 else 2 * batch
        state["cache"] = cached_model(logits_fn).init_cache(rows, length)
    state = _run(logits_fn, text, allowed, keys, s, state)

    tokens = state["tokens"]
    if s.stop_at_eos:
        after, _ = _after_eos(tokens, text, s)
        tokens = jnp.where(after & _open(tokens, text, s), s.eos_id, tokens)
    if not s.trace:
        return tokens
    return Trace(tokens, *(state[k] for k in ("steps", "confidence", "passes", "row_passes")))


def _open(tokens, text: Text, s: Settings):
    """The masks [b, l] that can be filled. By value: a mask token in the prompt is open too."""
    return (tokens == s.mask_id) & text.may_open


def _bounds(block, text: Text, s: Settings):
    """Where a block begins, and up to where masks compete in it [b, 1]."""
    first = text.start + block[:, None] * s.block_length
    last = block[:, None] >= s.gen_length // s.block_length - 1
    # Masks after the response compete with the last block.
    return first, jnp.where(last, text.length, first + s.block_length)


def _counted(tokens, block, text: Text, s: Settings):
    """The open positions [b, l] that a block must fill."""
    first, end = _bounds(block, text, s)
    places = jnp.arange(text.length)
    counted = _open(tokens, text, s) & (places < end)
    return counted & (places >= first) if s.infill == "published" else counted


def _planned(tokens, block, text: Text, s: Settings):
    """The number [b] of positions that a block is to commit, counted when it begins."""
    return jnp.sum(_counted(tokens, block, text, s), 1, dtype=jnp.int32)


def _after_eos(tokens, text: Text, s: Settings):
    """The response positions [b, l] after the first EOS, and whether all before it is filled."""
    places = jnp.arange(text.length)
    response = (places >= text.start) & (places < text.start + s.gen_length)
    is_eos = (tokens == s.eos_id) & response
    first = jnp.where(jnp.any(is_eos, 1), jnp.argmax(is_eos, 1), text.length)[:, None]
    filled = ~jnp.any(_open(tokens, text, s) & (places < first), 1)
    return response & (places > first), filled & (first[:, 0] < text.length)


def _run(logits_fn, text: Text, allowed, keys, s: Settings, state):
    """All passes, each full (kind 0) or over a window (kind k: the k-th size).

    Each kind has a loop of its own within one outer loop. A `cond` in one loop would do the same,
    but XLA copies the cache at every branch of a conditional. Loops update it in place.
    """
    blocks = s.gen_length // s.block_length
    windows = None
    if s.cache != "none":
        windows = CACHES[s.cache](text.start, text.length, s.block_length, blocks)

    def unfinished(state):
        return jnp.any(state["block"] < blocks)

    def now(state):
        # With a cache, all rows that are not done are in the same block.
        return jnp.minimum(jnp.min(state["block"]), blocks - 1)

    def kind(state):
        first = text.start + now(state) * s.block_length
        active = _active(state, s)
        turn = jnp.max(jnp.where(active, state["step"], 0))  # passes since the block began
        places = jnp.arange(text.length)
        inside = (places >= first) & (places < first + s.block_length)
        # What is left may be masks outside the block, which no window fills.
        left = jnp.any(_open(state["tokens"], text, s) & inside & active[:, None])
        is_full = (turn == 0) | ~left
        if s.refresh is not None:
            is_full |= turn % s.refresh == 0
        return jnp.where(is_full, 0, 1 + jnp.asarray(windows.size_of, jnp.int32)[now(state)])

    def one(state, start, first, size):
        """One pass: predicts, commits, and lets rows that are done with their block go on."""
        before, cache = state["tokens"], state.get("cache")
        if cache is not None:
            cache = cache.replace(start=start, first=first)
        view = View(start, size, text, s)
        logits, cache = view.logits(logits_fn, before, cache)
        state = _commit(state, logits, view, allowed, keys, s)
        state = _advance(state, before, text, s)
        return state if cache is None else {**state, "cache": cache}

    def full(state):
        return one(state, jnp.int32(0), jnp.int32(0), text.length)

    def window(state, size):
        start = jnp.asarray(windows.starts, jnp.int32)[now(state)]
        return one(state, start, text.start + now(state) * s.block_length, size)

    if windows is None:
        return jax.lax.while_loop(unfinished, full, state)

    def round_of_kinds(state):
        passes = [full, *(functools.partial(window, size=size) for size in windows.sizes)]
        for k, one_pass in enumerate(passes):

            def is_next(state, k=k):
                return unfinished(state) & (kind(state) == k)

            state = jax.lax.while_loop(is_next, one_pass, state)
        return state

    return jax.lax.while_loop(unfinished, round_of_kinds, state)


def _active(state, s: Settings):
    """The rows [b] that take part in this pass."""
    block, blocks = state["block"], s.gen_length // s.block_length
    return (block < blocks) & (block == jnp.min(block) if s.lockstep else True)


def _commit(state, logits, view: View, allowed, keys, s: Settings):
    """The state after the commits of a pass with these logits [b, w, v]."""
    text, step, tokens = view.text, state["step"], view.of(state["tokens"])
    rule, confidence = COMMITS[s.commit], CONFIDENCES[s.remasking]
    if s.logits_eos_inf:
        logits = candidates_lib.forbid(logits, s.eos_id)
    if allowed is not None:
        if allowed.shape[0] != logits.shape[-1]:
            raise ValueError(
                f"allowed has {allowed.shape[0]} entries, the vocabulary {logits.shape[-1]}"
            )
        logits = candidates_lib.allow(logits, allowed)
    gumbel, uniform = _noise(state, keys, logits.shape, view, s)

    drawn = logits
    if s.infill == "all":
        # The confidence keeps the share of the mask token. Where the published loop leaves no
        # mask, it never commits a position whose candidate is the mask token, nor does this one.
        drawn = candidates_lib.forbid(logits, s.mask_id)
    draw = functools.partial(
        candidates_lib.draw, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p
    )
    candidates = jax.vmap(draw)(drawn, gumbel)

    if s.confidence_eos_eot_inf:
        # As published: take them out of the softmax, so the other tokens get their share.
        for end_id in sorted({s.eos_id, s.eot_id} - {None}):
            logits = candidates_lib.forbid(logits, end_id)
    score = jax.vmap(confidence.score)(logits, candidates, uniform)
    first, end = _bounds(state["block"], text, s)
    active = _active(state, s)
    is_open = (tokens == s.mask_id) & view.of(text.may_open)
    competes = is_open & (view.places < end) & active[:, None]
    if not view.is_full:  # only the block competes
        competes &= (view.places >= first) & (view.places < first + s.block_length)

    blocks = s.gen_length // s.block_length
    block_steps = s.steps // blocks if rule.scheduled else 1  # the other rules do not read `quota`
    least, extra = jnp.divmod(state["planned"], block_steps)
    quota = least + (step < extra)
    if s.infill == "all":
        # Positions of the block that could not be filled in its steps are filled after them.
        quota = jnp.where(step < block_steps, quota, jnp.maximum(least, 1))
    row = unmasking.Row(
        competes,
        score,
        _ranks(score, competes, quota, text.padding, rule.scheduled and view.is_full),
        quota,
        jax.vmap(unmasking.entropy)(logits) if rule.entropy else jnp.zeros_like(score),
    )
    choose = functools.partial(rule.choose, numbers=s.numbers, limit=confidence.limit)
    chosen = jax.vmap(choose)(row) & competes
    if not rule.scheduled:  # a rule that chose nothing would be asked the same for ever
        none = ~jnp.any(chosen, 1, keepdims=True)
        chosen |= none & competes & (row.rank == 0)

    # If the candidate is the mask token, the position stays masked.
    new = {
        **state,
        "tokens": view.put(state["tokens"], jnp.where(chosen, candidates, tokens)),
        "passes": state["passes"] + 1,
        "row_passes": state["row_passes"] + jnp.any(competes, 1),
        "step": step + active,
    }
    if s.trace:
        filled = chosen & (candidates != s.mask_id)
        for name, value in (("steps", new["passes"]), ("confidence", confidence.value(score))):
            part = jnp.where(filled, value, view.of(state[name]))
            new[name] = view.put(state[name], part)
    return new


def _noise(state, keys, shape, view: View, s: Settings):
    """Gumbel noise [b, l, v] and uniform noise [b, l], each None if it is not needed.

    A draw depends on the row's key, its pass, and the position counted from its first real token.
    """
    gumbel, uniform = s.temperature > 0, CONFIDENCES[s.remasking].random
    if not (gumbel or uniform):
        return None, None

    def at(key, place):
        first, second = jax.random.split(jax.random.fold_in(key, place))
        return (
            jax.random.gumbel(first, shape[-1:], jnp.float32) if gumbel else None,
            jax.random.uniform(second) if uniform else None,
        )

    def of_row(key, row_pass, places):
        return jax.vmap(at, (None, 0))(jax.random.fold_in(key, row_pass), places)

    places = view.places - view.text.padding[:, None]
    return jax.vmap(of_row)(keys, state["row_passes"], jnp.maximum(places, 0))


def _ranks(score, competes, quota, padding, torch_ties: bool):
    """The rank [b, l] of each competing position, 0 for the most confident; l and more elsewhere.

    Equal scores: the first position is the most confident. With torch_ties the first `quota` are
    those that torch.topk would choose in a row that is not padded.
    """
    batch, length = score.shape
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), score.shape)
    closed = (~competes).astype(jnp.int32)

    def rank(*keys):
        order = jax.lax.sort((closed, *keys, places), num_keys=len(keys) + 1, is_stable=True)[-1]
        rank = jnp.zeros_like(places).at[jnp.arange(batch)[:, None], order].set(places)
        return jnp.where(competes, rank, length + rank)

    ranks = rank(-score)
    if not torch_ties:
        return ranks
    # Levels instead of scores: positions that do not compete have the lowest of all in torch.
    ordered = -jax.lax.sort((closed, -score), num_keys=2)[1]
    steps = jnp.pad(ordered[:, 1:] != ordered[:, :-1], ((0, 0), (1, 0)))
    level = jnp.cumsum(steps, 1)
    level = jnp.take_along_axis(level, jnp.where(competes, ranks, 0), 1)
    value = jnp.where(competes, -level.astype(jnp.float32), -jnp.inf)
    shift = (places + padding[:, None]) % length
    chosen = most_confident(
        jnp.take_along_axis(value, shift, 1), quota.astype(jnp.int32), length - padding
    )
    chosen = jnp.take_along_axis(chosen, (places - padding[:, None]) % length, 1)
    return rank((~chosen).astype(jnp.int32), ranks)


def _advance(state, before, text: Text, s: Settings):
    """The state in which rows that are done with their block begin the next."""
    tokens, block = state["tokens"], state["block"]
    done = ~jnp.any(_counted(tokens, block, text, s), 1)
    if s.infill == "published":
        if COMMITS[s.commit].scheduled:
            done |= state["step"] >= s.steps // (s.gen_length // s.block_length)
        elif s.temperature == 0:
            # Without this, a candidate that is the mask token would be committed for ever.
            done |= ~jnp.any(tokens != before, 1) & _active(state, s)
    blocks = s.gen_length // s.block_length
    if s.stop_at_eos:
        block = jnp.where(_after_eos(tokens, text, s)[1], blocks, block)
    now = block < blocks
    if s.lockstep:
        # A row that is done waits, with nothing left to commit, until all are.
        now &= jnp.all(done | ~now)
    moves = now & done
    block = block + moves
    return {
        **state,
        "block": block,
        "step": jnp.where(moves, 0, state["step"]),
        "planned": jnp.where(moves, _planned(tokens, block, text, s), state["planned"]),
    }
