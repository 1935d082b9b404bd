"""`generate`: checks its arguments and runs the compiled loop.

`logits_fn(tokens [B, L], attention_mask [B, L] or None) -> logits [B, L, V]`. Pass a model as
`jax.tree_util.Partial(model.apply, {"params": params})`. In a plain closure the parameters would
be compiled in as constants, and every new closure would compile again. A function that also takes
`positions` gets the RoPE positions of left-padded rows. This file works with arrays only;
`python -m llada_jax.sampling` opens models and tokenizers.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from llada_jax.sampling.loop import fill
from llada_jax.sampling.model import cached_model
from llada_jax.sampling.settings import Settings, check
from llada_jax.sampling.unmasking import Numbers


def generate(
    logits_fn: Callable,
    prompts,
    *,
    mask_id: int,
    gen_length: int,
    block_length: int,
    steps: int | None = None,
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

    steps: passes for the whole response, divided equally over the blocks, which the "schedule"
        needs. The other rules do not read it, and take at most one pass a token.
    temperature: T > 0 draws candidates with Gumbel noise: argmax of logits - T log(-log u), in
        float32. The confidence still comes from the logits without noise. Needs `key`.
    top_k, top_p: at T > 0 only the k most probable tokens, or those that make up the probability p,
        can be drawn.
    allowed: `[V]` bool, the tokens that may be generated; None for all.
    cfg_scale: s > 0 applies classifier-free guidance: un + (s + 1) (cond - un), where un are the
        logits with the whole prompt masked. Both run in one batch of 2B.
    remasking: the confidence, a name in CONFIDENCES: "low_confidence" (the candidate's
        probability, rounded to float32 as in the published code: probabilities near 1 tie),
        "probability" (the same without the rounding), "margin" (the gap between the two best),
        "entropy" (minus the entropy), "random" (uniform noise, needs `key`).
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
    settings = Settings(
        mask_id, steps, gen_length, block_length, temperature, top_k, top_p, cfg_scale, remasking,
        commit, Numbers(threshold, factor, entropy_budget), logits_eos_inf, confidence_eos_eot_inf,
        eos_id, eot_id, stop_at_eos, infill, lockstep or cache != "none", cache, refresh, trace,
    )  # fmt: skip
    check(settings, key is not None)
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
    return fill(logits_fn, prompts, attention_mask, suffix, allowed, key, row_ids, settings)


def _ids(name: str, ids) -> Array:
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{name} are {ids.dtype}{list(ids.shape)}: give token ids of shape [batch, length]"
        )
    return ids.astype(jnp.int32)
