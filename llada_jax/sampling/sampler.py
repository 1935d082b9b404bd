"""The compiled sampler: LLaDA's `generate.py`, with the same tokens at temperature 0.

`logits_fn(tokens [B, L], attention_mask [B, L] or None) -> logits [B, L, V]`. Pass a model as
`jax.tree_util.Partial(model.apply, {"params": params})`. In a plain closure the parameters would
be compiled in as constants, and every new closure would compile again. This file works with arrays
only; `python -m llada_jax.sampling` opens models and tokenizers.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Int

from llada_jax.sampling.torch_ties import most_confident

REMASKING = ("low_confidence", "random")


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings of `generate`. The sampler is compiled anew for other settings or shapes."""

    mask_id: int
    steps: int
    gen_length: int
    block_length: int
    temperature: float | int
    cfg_scale: float | int
    remasking: str
    logits_eos_inf: bool
    confidence_eos_eot_inf: bool
    eos_id: int | None
    eot_id: int | None


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


def _check(s: _Settings, has_key: bool) -> None:
    check_schedule(s.steps, s.gen_length, s.block_length)
    if s.remasking not in REMASKING:
        raise ValueError(f"remasking={s.remasking!r} is not one of {', '.join(REMASKING)}")
    if not s.temperature >= 0 or not s.cfg_scale >= 0:
        raise ValueError(
            f"temperature={s.temperature}, cfg_scale={s.cfg_scale}: neither may be negative"
        )
    if not has_key and s.temperature > 0:
        raise ValueError(
            f"temperature={s.temperature} draws at random: give key=jax.random.key(seed)"
        )
    if not has_key and s.remasking == "random":
        raise ValueError('remasking="random" draws at random: give key=jax.random.key(seed)')
    if s.logits_eos_inf and s.eos_id is None:
        raise ValueError("logits_eos_inf=True forbids the EOS token: give its eos_id")
    if s.confidence_eos_eot_inf and s.eos_id is None and s.eot_id is None:
        raise ValueError(
            "confidence_eos_eot_inf=True distrusts EOS and EoT: give eos_id, eot_id or both"
        )


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
) -> Array:
    """Generates responses by block-wise iterative unmasking.

    Takes prompts `[B, Lp]` and returns tokens `[B, Lp + gen_length]` int32, prompt first. The
    response starts as masks and is filled block by block, each of block_length tokens. The `steps`
    are divided equally over the blocks. Each step predicts every position and commits the most
    confident tokens of the block; a committed token never changes.

    temperature: T > 0 draws candidates with Gumbel noise: argmax of logits - T log(-log u), in
        float32. The confidence still comes from the logits without noise. Needs `key`.
    cfg_scale: s > 0 applies classifier-free guidance: un + (s + 1) (cond - un), where un are the
        logits with the whole prompt masked. Both run in one batch of 2B.
    remasking: "low_confidence" takes the candidate's probability as its confidence; "random" takes
        uniform noise and needs `key`.
    attention_mask: `[B, Lp]`, 0 = not attended to; marks the left-padding of prompts. logits_fn
        gets it extended by ones over the response, or None if it is None.
    logits_eos_inf: forbids EOS.
    confidence_eos_eot_inf: gives EOS and EoT no confidence, so that they are committed last. This
        applies to both at any temperature; the published code exempts EOS at T > 0.

    Ties between confidences are broken as in torch on a CPU, with one exception: if k > 1 tokens
    are committed at once in a row of 64 k or more positions, the first positions win.

    The sampler is compiled once for each (shapes, settings, logits_fn). Raises ValueError for
    settings that are invalid or contradict each other, before it compiles.
    Source: generate.py of LLaDA.
    """
    settings = _Settings(
        mask_id, steps, gen_length, block_length, temperature, cfg_scale, remasking, logits_eos_inf,
        confidence_eos_eot_inf, eos_id, eot_id,
    )  # fmt: skip
    _check(settings, key is not None)
    prompts = jnp.asarray(prompts)
    if prompts.ndim != 2 or not jnp.issubdtype(prompts.dtype, jnp.integer):
        raise ValueError(
            f"prompts are {prompts.dtype}{list(prompts.shape)}:"
            " give token ids of shape [batch, length]"
        )
    if attention_mask is not None:
        attention_mask = jnp.asarray(attention_mask)
        if attention_mask.shape != prompts.shape:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, the prompts"
                f" {list(prompts.shape)}: it has one entry for each prompt token,"
                " and is extended over the response"
            )
    if not isinstance(logits_fn, Partial):
        logits_fn = Partial(logits_fn)
    return _generate(logits_fn, prompts, attention_mask, key, settings)


@functools.partial(jax.jit, static_argnames="s")
def _generate(
    logits_fn, prompts: Int[Array, "b p"], attention_mask, key, s: _Settings
) -> Int[Array, "b l"]:
    batch, start = prompts.shape
    length = start + s.gen_length
    tokens = (
        jnp.full((batch, length), s.mask_id, jnp.int32).at[:, :start].set(prompts.astype(jnp.int32))
    )
    is_prompt = tokens != s.mask_id
    if attention_mask is not None:
        attention_mask = jnp.pad(
            attention_mask.astype(jnp.int32), ((0, 0), (0, s.gen_length)), constant_values=1
        )

    blocks = s.gen_length // s.block_length
    # With more steps than tokens in a block, the published schedule has steps that commit nothing.
    # We skip them.
    block_steps = min(s.steps // blocks, s.block_length)
    least, extra = divmod(s.block_length, block_steps)

    def predict(tokens):
        if s.cfg_scale == 0:
            return logits_fn(tokens, attention_mask).astype(jnp.float32)
        both = jnp.concatenate([tokens, jnp.where(is_prompt, s.mask_id, tokens)])
        both_mask = (
            None if attention_mask is None else jnp.concatenate([attention_mask, attention_mask])
        )
        conditional, unconditional = jnp.split(logits_fn(both, both_mask).astype(jnp.float32), 2)
        return unconditional + (s.cfg_scale + 1) * (conditional - unconditional)

    def commit(i, tokens):
        block, step = i // block_steps, i % block_steps
        logits = predict(tokens)
        _check_vocabulary(logits, tokens, s)
        noise_key, order_key = (
            (None, None) if key is None else jax.random.split(jax.random.fold_in(key, i))
        )

        if s.logits_eos_inf:
            logits = _forbid(logits, s.eos_id)
        noisy = logits
        if s.temperature > 0:
            noisy = logits + s.temperature * jax.random.gumbel(noise_key, logits.shape, jnp.float32)
        candidates = jnp.argmax(noisy, -1).astype(jnp.int32)

        if s.remasking == "random":
            confidence = jax.random.uniform(order_key, tokens.shape)
        else:
            if s.confidence_eos_eot_inf:
                # As published: take them out of the softmax, so the other tokens get their share.
                for end_id in {s.eos_id, s.eot_id} - {None}:
                    logits = _forbid(logits, end_id)
            peak = jnp.max(logits, -1)
            candidate_logits = jnp.take_along_axis(logits, candidates[..., None], -1)[..., 0]
            confidence = jnp.exp(candidate_logits - peak) / jnp.sum(
                jnp.exp(logits - peak[..., None]), -1
            )

        # As published, a mask token in the prompt can be filled from the first block on. If the
        # candidate is the mask token, the position stays masked.
        within = jnp.arange(length) < start + (block + 1) * s.block_length
        confidence = jnp.where((tokens == s.mask_id) & within, confidence, -jnp.inf)
        chosen = most_confident(confidence, least + (step < extra), least + (extra > 0))
        return jnp.where(chosen, candidates, tokens)

    return jax.lax.fori_loop(0, blocks * block_steps, commit, tokens)


def _forbid(logits, token_id: int):
    # Unlike an indexed update, `where` can be fused with other operations.
    return jnp.where(jnp.arange(logits.shape[-1]) == token_id, -jnp.inf, logits)


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
