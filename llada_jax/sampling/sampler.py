"""The compiled sampler: one loop over passes, for every commit rule and confidence.

`logits_fn(tokens [B, L], attention_mask [B, L] or None) -> logits [B, L, V]`. Pass a model as
`jax.tree_util.Partial(model.apply, {"params": params})`. In a plain closure the parameters would
be compiled in as constants, and every new closure would compile again. A function that also takes
`positions` gets the RoPE positions of left-padded rows. This file works with arrays only;
`python -m llada_jax.sampling` opens models and tokenizers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array

from llada_jax.sampling import candidates as candidates_lib
from llada_jax.sampling import unmasking
from llada_jax.sampling.cache import CACHES, cached_model, call_cached
from llada_jax.sampling.model import call
from llada_jax.sampling.torch_ties import most_confident
from llada_jax.sampling.trace import Trace
from llada_jax.sampling.unmasking import COMMITS, CONFIDENCES, Numbers

INFILLS = ("all", "published")


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings of `generate`. The sampler is compiled anew for other settings or shapes."""

    mask_id: int
    steps: int
    gen_length: int
    block_length: int
    temperature: float | int
    top_k: int | None
    top_p: float | int | None
    cfg_scale: float | int
    remasking: str
    commit: str
    numbers: Numbers
    logits_eos_inf: bool
    confidence_eos_eot_inf: bool
    eos_id: int | None
    eot_id: int | None
    stop_at_eos: bool
    infill: str
    lockstep: bool
    cache: str
    refresh: int | None
    trace: bool


def check_schedule(steps: int, gen_length: int, block_length: int) -> None:
    """Raises ValueError unless gen_length divides into blocks, and steps divide over the blocks."""
    if block_length < 1 or gen_length < 1 or gen_length % block_length:
        raise ValueError(
            f"gen_length={gen_length} is not a positive multiple of block_length={block_length}"
        )
    blocks = gen_length // block_length
    if steps < 1 or steps % blocks:
        raise ValueError(
            f"steps={steps} is not a positive multiple of the {blocks} blocks of"
            f" gen_length={gen_length}, block_length={block_length}"
        )


def _one_of(name: str, value: str, table) -> None:
    if value not in table:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(table)}")


def _check(s: _Settings, has_key: bool) -> None:
    _one_of("commit", s.commit, COMMITS)
    rule = COMMITS[s.commit]
    blocks = s.gen_length // max(s.block_length, 1)
    # Only the schedule reads `steps`.
    check_schedule(s.steps if rule.scheduled else max(blocks, 1), s.gen_length, s.block_length)
    _one_of("remasking", s.remasking, CONFIDENCES)
    _one_of("infill", s.infill, INFILLS)
    _one_of("cache", s.cache, CACHES)
    _check_numbers(s)
    _check_draws(s, has_key)
    _check_ends(s)


def _check_draws(s: _Settings, has_key: bool) -> None:
    if not s.temperature >= 0 or not s.cfg_scale >= 0:
        raise ValueError(
            f"temperature={s.temperature}, cfg_scale={s.cfg_scale}: neither may be negative"
        )
    if not has_key and s.temperature > 0:
        raise ValueError(
            f"temperature={s.temperature} draws at random: give key=jax.random.key(seed)"
        )
    if not has_key and CONFIDENCES[s.remasking].random:
        raise ValueError(
            f'remasking="{s.remasking}" draws at random: give key=jax.random.key(seed)'
        )
    for name, value in (("top_k", s.top_k), ("top_p", s.top_p)):
        if value is not None and s.temperature == 0:
            raise ValueError(f"{name}={value} has no effect at temperature=0: raise it or leave it")
    if s.top_k is not None and s.top_k < 1:
        raise ValueError(f"top_k={s.top_k} must be at least 1")
    if s.top_p is not None and not 0 < s.top_p <= 1:
        raise ValueError(f"top_p={s.top_p} must be above 0 and at most 1")


def _check_ends(s: _Settings) -> None:
    if s.logits_eos_inf and s.eos_id is None:
        raise ValueError("logits_eos_inf=True forbids the EOS token: give its eos_id")
    if s.stop_at_eos and s.eos_id is None:
        raise ValueError("stop_at_eos=True stops at the EOS token: give its eos_id")
    if s.stop_at_eos and s.logits_eos_inf:
        raise ValueError("stop_at_eos=True waits for EOS, which logits_eos_inf=True forbids")
    if s.confidence_eos_eot_inf and s.eos_id is None and s.eot_id is None:
        raise ValueError(
            "confidence_eos_eot_inf=True distrusts EOS and EoT: give eos_id, eot_id or both"
        )


def _check_numbers(s: _Settings) -> None:
    rule = COMMITS[s.commit]
    for field in dataclasses.fields(Numbers):
        value = getattr(s.numbers, field.name)
        if (value is None) == (field.name in rule.needs):
            raise ValueError(
                f'commit="{s.commit}" needs {field.name}=...'
                if value is None
                else f'{field.name}={value} has no effect with commit="{s.commit}": leave it or '
                "choose the rule that reads it"
            )
        if value is not None and not np.isfinite(value):
            raise ValueError(f"{field.name}={value} is no finite number")
    if rule.probability and not CONFIDENCES[s.remasking].probability:
        raise ValueError(
            f'commit="{s.commit}" compares probabilities, and remasking="{s.remasking}" has none'
        )
    if s.refresh is not None and s.cache == "none":
        raise ValueError(f'refresh={s.refresh} has no effect with cache="none": leave it')
    if s.refresh is not None and s.refresh < 1:
        raise ValueError(f"refresh={s.refresh} must be at least 1")
    for name in ("factor", "entropy_budget"):
        value = getattr(s.numbers, name)
        if value is not None and value < 0:
            raise ValueError(f"{name}={value} may not be negative")


def generate(
    logits_fn: Callable,
    prompts,
    *,
    mask_id: int,
    steps: int,
    gen_length: int,
    block_length: int,
    temperature: float | int = 0.0,
    cfg_scale: float | int = 0.0,
    remasking: str = "low_confidence",
    attention_mask=None,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    eos_id: int | None = None,
    eot_id: int | None = None,
    key=None,
    commit: str = "schedule",
    threshold: float | int | None = None,
    factor: float | int | None = None,
    entropy_budget: float | int | None = None,
    top_k: int | None = None,
    top_p: float | int | None = None,
    allowed=None,
    suffix=None,
    stop_at_eos: bool = False,
    infill: str = "all",
    lockstep: bool = False,
    cache: str = "none",
    refresh: int | None = None,
    row_ids=None,
    trace: bool = False,
) -> Any:
    """Generates responses by block-wise iterative unmasking.

    Takes prompts `[B, Lp]` and returns tokens `[B, Lp + gen_length]` int32, prompt first. The
    response starts as masks and is filled block by block, each of block_length tokens. Each pass
    predicts every position and commits some predictions, chosen by the commit rule; a committed
    token never changes. In float32 a row's tokens do not depend on the other rows, on its place in
    the batch, or on its padding.

    steps: passes for the whole response, divided equally over the blocks. Only the "schedule"
        reads them; the other rules take as many passes as they need, at most one a token.
    temperature: T > 0 draws candidates with Gumbel noise: argmax of logits - T log(-log u), in
        float32. The confidence still comes from the logits without noise. Needs `key`.
    top_k, top_p: at T > 0 only the k most probable tokens, or those that make up the probability p,
        can be drawn.
    allowed: `[V]` bool, the tokens that may be generated; None for all.
    cfg_scale: s > 0 applies classifier-free guidance: un + (s + 1) (cond - un), where un are the
        logits with the whole prompt masked. Both run in one batch of 2B.
    remasking: the confidence, a name in CONFIDENCES: "low_confidence" (the candidate's
        probability), "margin" (the gap between the two best), "entropy" (minus the entropy),
        "random" (uniform noise, needs `key`), "softmax" (the probability rounded to float32, as in
        the published code: probabilities near 1 tie).
    commit: the commit rule, a name in COMMITS: "schedule" (by `steps`); "threshold" (all at least
        that confident); "factor" (Fast-dLLM's rule) or "factor_published" (as its code has it);
        "entropy" (EB-Sampler, `entropy_budget` in nats).
    attention_mask: `[B, Lp]`, 0 = not attended to; marks the left-padding of prompts. logits_fn
        gets it extended by ones over the response, or None if it is None. With a mask, a logits_fn
        that takes `positions` gets those counted from the row's first attended token.
    logits_eos_inf: forbids EOS.
    confidence_eos_eot_inf: gives EOS and EoT no confidence, so that they are committed last. This
        applies to both at any temperature; the published code exempts EOS at T > 0.
    suffix: `[B, Ls]`, text after the response; it is part of the result. Masks in it are filled
        with the last block.
    stop_at_eos: stops a row once EOS is committed and all before it is committed. What follows the
        EOS becomes EOS. Tokens up to it are the same as without.
    infill: "all" fills every mask, those of the prompt too: they compete with the first block, and
        a block that begins with m open positions up to its end commits m. The mask token is no
        candidate. "published" imitates the published loops: only the masks of a block are counted
        in its schedule, all masks up to its end compete for it, and a mask token that is committed
        stays a mask. Masks are then left if the prompt has some.
    lockstep: rows begin each block together, as published. By default a row goes on alone, which
        needs fewer passes and writes the same tokens. With a cache they always wait.
    cache: a name in CACHES. "none" computes the whole text in each pass; "prefix" keeps the keys
        and values of what is before the block, "dual" those of what is after it too. They are
        computed anew when a block begins, so the tokens may differ from those without a cache.
        logits_fn must be a `Partial(model.apply, variables)` of a model that offers `with_cache`.
    refresh: computes the whole text in every so many passes of a block; 1 is the same as no cache.
    row_ids: `[B]` int, numbers that tell the random draws of rows apart; by default 0, 1, ... A row
        with the same key, number and prompt draws the same in any batch.
    trace: returns a `Trace`, which also has the pass and the confidence of each commit.

    Ties between confidences are broken as in torch on a CPU for a row that is alone and not padded,
    with one exception: if k > 1 tokens are committed at once in a row of 64 k or more positions,
    the first positions win.

    The sampler is compiled once for each (shapes, settings, logits_fn). Raises ValueError for
    settings that are invalid or contradict each other, before it compiles.
    Source: generate.py of LLaDA; each rule names its own.
    """
    settings = _Settings(
        mask_id, steps, gen_length, block_length, temperature, top_k, top_p, cfg_scale, remasking,
        commit, Numbers(threshold, factor, entropy_budget), logits_eos_inf, confidence_eos_eot_inf,
        eos_id, eot_id, stop_at_eos, infill, lockstep or cache != "none", cache, refresh, trace,
    )  # fmt: skip
    _check(settings, key is not None)
    if cache != "none" and cached_model(logits_fn) is None:
        raise ValueError(
            f'cache="{cache}" needs the model itself: give logits_fn=jax.tree_util.Partial('
            "model.apply, variables) of a model that has init_cache and with_cache"
        )
    prompts = _ids("prompts", prompts)
    batch = prompts.shape[0]
    if attention_mask is not None:
        attention_mask = jnp.asarray(attention_mask)
        if attention_mask.shape != prompts.shape:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, the prompts"
                f" {list(prompts.shape)}: it has one entry for each prompt token,"
                " and is extended over the response"
            )
    if suffix is not None:
        suffix = _ids("suffix", suffix)
        if suffix.shape[0] != batch:
            raise ValueError(f"suffix has {suffix.shape[0]} rows, the prompts {batch}")
    row_ids = jnp.arange(batch) if row_ids is None else jnp.asarray(row_ids)
    if row_ids.shape != (batch,):
        raise ValueError(f"row_ids have shape {list(row_ids.shape)}: give one for each prompt")
    if allowed is not None:
        allowed = jnp.asarray(allowed)
        if allowed.ndim != 1 or allowed.dtype != bool:
            raise ValueError(
                f"allowed is {allowed.dtype}{list(allowed.shape)}: give a bool for each token id"
            )
    if not isinstance(logits_fn, Partial):
        logits_fn = Partial(logits_fn)
    return _generate(logits_fn, prompts, attention_mask, suffix, allowed, key, row_ids, settings)


def _ids(name: str, ids) -> Array:
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{name} are {ids.dtype}{list(ids.shape)}: give token ids of shape [batch, length]"
        )
    return ids.astype(jnp.int32)


@dataclasses.dataclass
class _Text:
    """What stays the same through all passes."""

    start: int  # where the response begins
    length: int
    is_prompt: Array  # [b, l] given tokens: masked in the unconditional input
    may_open: Array  # [b, l] not padding
    attention_mask: Array | None  # [b, l]
    padding: Array  # [b] positions before the first real token
    positions: Array | None  # [b, l] of RoPE; None: 0, 1, ...


@functools.partial(jax.jit, static_argnames="s")
def _generate(logits_fn, prompts, attention_mask, suffix, allowed, key, row_ids, s: _Settings):
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
    text = _Text(start, length, tokens != s.mask_id, may_open, attention_mask, padding, positions)
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


def _open(tokens, text: _Text, s: _Settings):
    """The masks [b, l] that can be filled. By value: a mask token in the prompt is open too."""
    return (tokens == s.mask_id) & text.may_open


def _bounds(block, text: _Text, s: _Settings):
    """Where a block begins, and up to where masks compete in it [b, 1]."""
    first = text.start + block[:, None] * s.block_length
    last = block[:, None] >= s.gen_length // s.block_length - 1
    # Masks after the response compete with the last block.
    return first, jnp.where(last, text.length, first + s.block_length)


def _counted(tokens, block, text: _Text, s: _Settings):
    """The open positions [b, l] that a block must fill."""
    first, end = _bounds(block, text, s)
    places = jnp.arange(text.length)
    counted = _open(tokens, text, s) & (places < end)
    return counted & (places >= first) if s.infill == "published" else counted


def _planned(tokens, block, text: _Text, s: _Settings):
    """The number [b] of positions that a block is to commit, counted when it begins."""
    return jnp.sum(_counted(tokens, block, text, s), 1, dtype=jnp.int32)


def _after_eos(tokens, text: _Text, s: _Settings):
    """The response positions [b, l] after the first EOS, and whether all before it is filled."""
    places = jnp.arange(text.length)
    response = (places >= text.start) & (places < text.start + s.gen_length)
    is_eos = (tokens == s.eos_id) & response
    first = jnp.where(jnp.any(is_eos, 1), jnp.argmax(is_eos, 1), text.length)[:, None]
    filled = ~jnp.any(_open(tokens, text, s) & (places < first), 1)
    return response & (places > first), filled & (first[:, 0] < text.length)


def _run(logits_fn, text: _Text, allowed, keys, s: _Settings, state):
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
        view = _View(start, size, text, s)
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


@dataclasses.dataclass
class _View:
    """The part of the text that a pass computes: all of it, or a window."""

    start: Any  # a traced number if the view is a window
    size: int
    text: _Text
    s: _Settings

    @property
    def is_full(self) -> bool:
        return self.size == self.text.length

    @property
    def places(self):
        """The positions [w] of the view."""
        return self.start + jnp.arange(self.size)

    def of(self, x):
        """The part [b, w] of an array [b, l] of the text."""
        if x is None or self.is_full:
            return x
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.size, 1)

    def put(self, x, part):
        """The array [b, l] with its part replaced."""
        if self.is_full:
            return part
        return jax.lax.dynamic_update_slice_in_dim(x, part, self.start, 1)

    def logits(self, logits_fn, tokens, cache):
        """Float32 logits [b, w, v] with classifier-free guidance, and the cache."""
        text, s = self.text, self.s

        def predict(tokens, attention_mask, positions):
            if cache is None:
                return call(logits_fn, tokens, attention_mask, positions), None
            if positions is None:
                positions = jnp.broadcast_to(self.places, tokens.shape)
            return call_cached(logits_fn, tokens, attention_mask, positions, cache)

        tokens, positions = self.of(tokens), self.of(text.positions)
        rest = (text.attention_mask, positions)
        if s.cfg_scale == 0:
            logits, cache = predict(tokens, *rest)
            _check_vocabulary(logits, tokens, s)
            return logits.astype(jnp.float32), cache
        given = self.of(text.is_prompt)
        both = jnp.concatenate([tokens, jnp.where(given, s.mask_id, tokens)])
        rest = tuple(None if x is None else jnp.concatenate([x, x]) for x in rest)
        logits, cache = predict(both, *rest)
        _check_vocabulary(logits, both, s)
        conditional, unconditional = jnp.split(logits.astype(jnp.float32), 2)
        return unconditional + (s.cfg_scale + 1) * (conditional - unconditional), cache


def _active(state, s: _Settings):
    """The rows [b] that take part in this pass."""
    block, blocks = state["block"], s.gen_length // s.block_length
    return (block < blocks) & (block == jnp.min(block) if s.lockstep else True)


def _commit(state, logits, view: _View, allowed, keys, s: _Settings):
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

    block_steps = max(s.steps // (s.gen_length // s.block_length), 1)
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


def _noise(state, keys, shape, view: _View, s: _Settings):
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


def _advance(state, before, text: _Text, s: _Settings):
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


def _check_vocabulary(logits, tokens, s: _Settings) -> None:
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"logits_fn gave logits of shape {list(logits.shape)}"
            f" for tokens of {list(tokens.shape)}"
        )
    for name in ("mask_id", "eos_id", "eot_id"):
        value = getattr(s, name)
        if value is not None and not 0 <= value < logits.shape[-1]:
            raise ValueError(
                f"{name}={value} is not in the vocabulary of {logits.shape[-1]}"
                " that logits_fn predicts"
            )
