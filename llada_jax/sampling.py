"""One compiled sampler for masked diffusion models: LLaDA's `generate.py`, token for token at temperature 0.

    python -m llada_jax.sampling --model=DIR --prompt="Why is the sky blue?"

`logits_fn(tokens [B, L], attention_mask [B, L] or None) -> logits [B, L, V]`. A model's parameters belong in the
arguments of a `jax.tree_util.Partial`, as in `Partial(model.apply, {"params": params})`: a closure would compile them
in as constants, and compile again for every new function. The module itself imports nothing of ours; only its command
line opens models and tokenizers.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

REMASKING = ("low_confidence", "random")
TEMPLATES = ("chat", "plain", "raw")
_PAD_MULTIPLE = 16  # prompts of different lengths are padded to a multiple of it, so that other prompts fit too


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the sampler is compiled for, besides shapes."""

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
    """ValueError for what `generate` cannot divide into blocks, and steps for each."""
    if block_length < 1 or gen_length < 1 or gen_length % block_length:
        raise ValueError(f"gen_length={gen_length} is not a positive multiple of block_length={block_length}")
    blocks = gen_length // block_length
    if steps < 1 or steps % blocks:
        raise ValueError(
            f"steps={steps} is not a positive multiple of the {blocks} blocks of gen_length={gen_length}, "
            f"block_length={block_length}"
        )


def prompt_width(lengths: Iterable[int]) -> int:
    """How many positions `sample_responses` gives prompts of these lengths."""
    lengths = set(lengths)
    width = max(lengths, default=0)
    return width if len(lengths) <= 1 else -(-width // _PAD_MULTIPLE) * _PAD_MULTIPLE


def _check(s: _Settings, has_key: bool) -> None:
    check_schedule(s.steps, s.gen_length, s.block_length)
    if s.remasking not in REMASKING:
        raise ValueError(f"remasking={s.remasking!r} is not one of {', '.join(REMASKING)}")
    if not s.temperature >= 0 or not s.cfg_scale >= 0:
        raise ValueError(f"temperature={s.temperature}, cfg_scale={s.cfg_scale}: neither may be negative")
    if not has_key and s.temperature > 0:
        raise ValueError(f"temperature={s.temperature} draws at random: give key=jax.random.key(seed)")
    if not has_key and s.remasking == "random":
        raise ValueError('remasking="random" draws at random: give key=jax.random.key(seed)')
    if s.logits_eos_inf and s.eos_id is None:
        raise ValueError("logits_eos_inf=True forbids the EOS token: give its eos_id")
    if s.confidence_eos_eot_inf and s.eos_id is None and s.eot_id is None:
        raise ValueError("confidence_eos_eot_inf=True distrusts EOS and EoT: give eos_id, eot_id or both")


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
    """Tokens `[B, Lp + gen_length]` int32: the prompts `[B, Lp]`, then responses by block-wise iterative unmasking.

    Every block of block_length masks gets its share of the `steps`; a step predicts every position and commits the
    most confident tokens for good. attention_mask `[B, Lp]` (0 = not attended to) marks left-padding of the prompts;
    logits_fn gets it with ones for the response, or None where none is given. temperature > 0 draws candidates by
    Gumbel noise (logits - T log(-log u), float32), while confidence stays that of the plain logits; remasking="random"
    replaces confidence by uniform noise; both need `key`. cfg_scale s > 0: logits un + (s + 1) (cond - un), where un
    has the whole prompt masked, in one batch of 2B. logits_eos_inf forbids EOS. confidence_eos_eot_inf takes the
    confidence of EOS and EoT away, of both at any temperature (the published code spares EOS at T > 0).

    Equal confidences fall as in torch on a CPU (but to the first position where k > 1 tokens of a row of 64 k or more
    are committed at once). Compiled once for each (shapes, settings, logits_fn). ValueError for what cannot be, before
    compiling.
    Source: generate.py of LLaDA, spec/llada.md "Generation".
    """
    settings = _Settings(
        mask_id, steps, gen_length, block_length, temperature, cfg_scale, remasking, logits_eos_inf,
        confidence_eos_eot_inf, eos_id, eot_id,
    )  # fmt: skip
    _check(settings, key is not None)
    prompts = jnp.asarray(prompts)
    if prompts.ndim != 2 or not jnp.issubdtype(prompts.dtype, jnp.integer):
        raise ValueError(f"prompts are {prompts.dtype}{list(prompts.shape)}: give token ids of shape [batch, length]")
    if attention_mask is not None:
        attention_mask = jnp.asarray(attention_mask)
        if attention_mask.shape != prompts.shape:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, the prompts {list(prompts.shape)}: it has one "
                "entry for each prompt token, and is extended over the response"
            )
    if not isinstance(logits_fn, Partial):
        logits_fn = Partial(logits_fn)
    return _generate(logits_fn, prompts, attention_mask, key, settings)


@functools.partial(jax.jit, static_argnames="s")
def _generate(logits_fn, prompts: Int[Array, "b p"], attention_mask, key, s: _Settings) -> Int[Array, "b l"]:
    batch, start = prompts.shape
    length = start + s.gen_length
    tokens = jnp.full((batch, length), s.mask_id, jnp.int32).at[:, :start].set(prompts.astype(jnp.int32))
    is_prompt = tokens != s.mask_id
    if attention_mask is not None:
        attention_mask = jnp.pad(attention_mask.astype(jnp.int32), ((0, 0), (0, s.gen_length)), constant_values=1)

    blocks = s.gen_length // s.block_length
    # In the published schedule steps beyond one per token commit nothing: they need not be computed.
    block_steps = min(s.steps // blocks, s.block_length)
    least, extra = divmod(s.block_length, block_steps)

    def predict(tokens):
        if s.cfg_scale == 0:
            return logits_fn(tokens, attention_mask).astype(jnp.float32)
        both = jnp.concatenate([tokens, jnp.where(is_prompt, s.mask_id, tokens)])
        both_mask = None if attention_mask is None else jnp.concatenate([attention_mask, attention_mask])
        conditional, unconditional = jnp.split(logits_fn(both, both_mask).astype(jnp.float32), 2)
        return unconditional + (s.cfg_scale + 1) * (conditional - unconditional)

    def commit(i, tokens):
        block, step = i // block_steps, i % block_steps
        logits = predict(tokens)
        _check_vocabulary(logits, tokens, s)
        noise_key, order_key = (None, None) if key is None else jax.random.split(jax.random.fold_in(key, i))

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
                # As published: out of the softmax, so that the other tokens share their probability.
                for end_id in {s.eos_id, s.eot_id} - {None}:
                    logits = _forbid(logits, end_id)
            peak = jnp.max(logits, -1)
            candidate_logits = jnp.take_along_axis(logits, candidates[..., None], -1)[..., 0]
            confidence = jnp.exp(candidate_logits - peak) / jnp.sum(jnp.exp(logits - peak[..., None]), -1)

        # A mask of the prompt counts from the first block on, as published. A predicted mask token stays a mask.
        within = jnp.arange(length) < start + (block + 1) * s.block_length
        confidence = jnp.where((tokens == s.mask_id) & within, confidence, -jnp.inf)
        chosen = _most_confident(confidence, least + (step < extra), least + (extra > 0))
        return jnp.where(chosen, candidates, tokens)

    return jax.lax.fori_loop(0, blocks * block_steps, commit, tokens)


def _forbid(logits, token_id: int):
    return jnp.where(jnp.arange(logits.shape[-1]) == token_id, -jnp.inf, logits)  # fuses, unlike an indexed update


def _most_confident(confidence: Float[Array, "b l"], k, most: int) -> Bool[Array, "b l"]:
    """The k (of at most `most`) highest of each row; ties at the edge fall as in `torch.topk` on a CPU.

    They are common, since without confidence all EOS and EoT are equal, and decide what the published code generates.
    """
    batch, length = confidence.shape
    values, best = jax.lax.top_k(confidence, min(most + 1, length))
    rows = jnp.arange(batch)[:, None]
    chosen = jnp.zeros(confidence.shape, bool).at[rows, best].set(jnp.arange(best.shape[1]) < k)
    tied = jnp.any(jnp.take(values, k - 1, axis=1) == jnp.take(values, k, axis=1))
    # torch keeps a heap where 64 k <= length: for k = 1 its first comes first, as in top_k.
    return jax.lax.cond(
        tied & (64 * k > length), lambda: jax.vmap(_first_of_nth_element, (0, None))(confidence, k), lambda: chosen
    )


def _first_of_nth_element(values: Float[Array, " l"], k) -> Bool[Array, " l"]:
    """Which k of the values std::nth_element of libstdc++ brings to the front, the highest first.

    The same swaps, but each Hoare partition is done at once: the i-th element from the left that may not stay there
    changes places with the i-th from the right, as long as they have not met.
    """
    length = values.shape[0]
    index = jnp.arange(length)

    def partition(carry):
        order, first, last = carry
        # The median of three goes to the front and is the pivot.
        a, b, c = first + 1, first + (last - first) // 2, last - 1
        va, vb, vc = (values[order[i]] for i in (a, b, c))
        median = jnp.where(
            va > vb,
            jnp.where(vb > vc, b, jnp.where(va > vc, c, a)),
            jnp.where(va > vc, a, jnp.where(vb > vc, c, b)),
        )
        order = order.at[jnp.stack([first, median])].set(order[jnp.stack([median, first])])
        pivot, v = values[order[first]], values[order]
        inside = (index > first) & (index < last)
        from_left, from_right = inside & (v <= pivot), inside & (v >= pivot)
        rank_left = jnp.where(from_left, jnp.cumsum(from_left) - 1, length)
        rank_right = jnp.where(from_right, jnp.sum(from_right) - jnp.cumsum(from_right), length)
        left = jnp.full(length + 1, length).at[rank_left].set(index)[:length]  # position of the i-th
        right = jnp.full(length + 1, -1).at[rank_right].set(index)[:length]
        swapped = left < right
        swaps = jnp.sum(swapped)
        cut = jnp.minimum(left[swaps], jnp.where(swaps > 0, right[swaps - 1], length))
        left, right = jnp.where(swapped, left, length), jnp.where(swapped, right, length)
        source = jnp.arange(length + 1).at[left].set(right).at[right].set(left)[:length]
        keep_right = cut < k  # the element of rank k lies right of the cut
        return order[source], jnp.where(keep_right, cut, first), jnp.where(keep_right, last, cut)

    order, first, last = jax.lax.while_loop(lambda c: c[2] - c[1] > 3, partition, (index, 0, length))
    # What is left, at most three, is sorted by insertion, which is stable.
    left_over = jnp.where(index < first, jnp.inf, jnp.where(index < last, values[order], -jnp.inf))
    order = order[jnp.argsort(-left_over, stable=True)]
    return jnp.zeros(length, bool).at[order].set(index < k)


def _check_vocabulary(logits, tokens, s: _Settings) -> None:
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits_fn gave logits of shape {list(logits.shape)} for tokens of {list(tokens.shape)}")
    for name in ("mask_id", "eos_id", "eot_id"):
        value = getattr(s, name)
        if value is not None and not 0 <= value < logits.shape[-1]:
            raise ValueError(f"{name}={value} is not in the vocabulary of {logits.shape[-1]} that logits_fn predicts")


def sample_responses(
    logits_fn: Callable,
    prompts: Sequence,
    *,
    mask_id: int,
    pad_id: int,
    batch_size: int,
    gen_length: int,
    key=None,
    progress: Callable[[int, int], object] | None = None,
    **settings,
) -> np.ndarray:
    """Responses `[N, gen_length]` int32 to N prompts of any lengths, batch by batch with one compiled sampler.

    Prompts of different lengths are left-padded with pad_id to a multiple of 16, which logits_fn learns from its
    attention_mask. `settings` go to `generate`; each batch has its own key. progress(done, N) is called after each
    batch. ValueError as in `generate`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    width = prompt_width(map(len, prompts))
    out = np.zeros((len(prompts), gen_length), np.int32)

    def collect(first, tokens):
        if not (tokens.is_fully_addressable or tokens.is_fully_replicated):  # other hosts hold some of the rows
            tokens = multihost_utils.process_allgather(tokens, tiled=True)
        out[first : first + batch_size] = np.asarray(tokens)[: len(prompts) - first, width:]
        if progress:
            progress(min(first + batch_size, len(prompts)), len(prompts))

    running = None
    for first in range(0, len(prompts), batch_size):
        rows = np.full((batch_size, width), pad_id, np.int32)
        attended = np.ones((batch_size, width), np.int32)
        for i in range(batch_size):
            prompt = prompts[min(first + i, len(prompts) - 1)]  # the last batch is filled up with its last prompt
            rows[i, width - len(prompt) :] = prompt
            attended[i, : width - len(prompt)] = 0
        tokens = generate(
            logits_fn,
            rows,
            mask_id=mask_id,
            gen_length=gen_length,
            attention_mask=attended if len(set(map(len, prompts))) > 1 else None,
            key=None if key is None else jax.random.fold_in(key, first),
            **settings,
        )
        if running:  # read the batch before only now, so that the device never waits
            collect(*running)
        running = first, tokens
    if running:
        collect(*running)
    return out


def trim(ids: Sequence[int] | np.ndarray, eos_id: int | None = None, eot_id: int | None = None) -> list[int]:
    """The ids before the first EOS or EoT."""
    ids = [int(i) for i in ids]
    ends = [k for k, i in enumerate(ids) if i in (eos_id, eot_id)]
    return ids[: ends[0]] if ends else ids


def open_model(path: str, dtype=None):
    """(logits_fn, ModelConfig, Tokenizer) of a Hugging Face style folder or a checkpoint of ours (a workdir, a step).

    `dtype` casts the parameters. Imports the rest of the package, which the sampler itself does without.
    """
    from llada_jax import convert, tokenizer

    model, params = convert.load(path, dtype)
    return Partial(model.apply, {"params": params}), model.config, tokenizer.load(convert.model_folder(path))


def special_ids(config, tokenizer) -> dict[str, int | None]:
    """mask_id, pad_id, eos_id and eot_id for `sample_responses`, from the model's config and its tokenizer."""
    eos_id = tokenizer.eos_id if config.eos_token_id is None else config.eos_token_id
    pads = (config.pad_token_id, eos_id, config.mask_token_id)
    pad_id = next(i for i in pads if i is not None)
    return {"mask_id": config.mask_token_id, "pad_id": pad_id, "eos_id": eos_id, "eot_id": tokenizer.eot_id}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag for each setting of the sampler; `settings_of` reads them back."""
    parser.add_argument("--steps", type=int, default=128, help="denoising steps for the whole response")
    parser.add_argument("--gen_length", type=int, default=128, help="tokens of the response")
    parser.add_argument("--block_length", type=int, default=32, help="tokens unmasked together, from left to right")
    parser.add_argument("--temperature", type=float, default=0.0, help="Gumbel noise; 0 takes the best token")
    parser.add_argument("--cfg_scale", type=float, default=0.0, help="classifier-free guidance; 0 for none")
    parser.add_argument("--remasking", choices=REMASKING, default="low_confidence")
    parser.add_argument("--logits_eos_inf", action="store_true", help="never sample EOS")
    parser.add_argument("--confidence_eos_eot_inf", action="store_true", help="commit EOS and EoT last")


def settings_of(args: argparse.Namespace) -> dict:
    """Keyword arguments for `generate` from the flags of `add_flags`."""
    names = "steps gen_length block_length temperature cfg_scale remasking logits_eos_inf confidence_eos_eot_inf"
    return {name: getattr(args, name) for name in names.split()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llada_jax.sampling", description="Prints a model's responses to prompts."
    )
    parser.add_argument("--model", required=True, help="Hugging Face style folder, workdir, or workdir/checkpoints/N")
    parser.add_argument("--prompt", required=True, action="append", help="give it again for more prompts")
    parser.add_argument("--template", choices=TEMPLATES, default="chat", help="plain: BOS and the text; raw: the text")
    parser.add_argument("--dtype", help="cast the parameters to it, as bfloat16; default: as stored")
    parser.add_argument("--seed", type=int, default=0)
    add_flags(parser)
    args = parser.parse_args(argv)
    try:
        logits_fn, config, tokenizer = open_model(args.model, args.dtype)
        prompts = []
        for prompt in args.prompt:
            if args.template == "chat":
                prompts.append(tokenizer.chat_prompt([{"role": "user", "content": prompt}]))
            else:
                bos = [] if args.template == "raw" or tokenizer.bos_id is None else [tokenizer.bos_id]
                prompts.append(bos + tokenizer.encode(prompt))
        special = special_ids(config, tokenizer)
        responses = sample_responses(
            logits_fn,
            prompts,
            batch_size=len(prompts),
            key=jax.random.key(args.seed),
            **special,
            **settings_of(args),
        )
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")
    for response in responses:
        print(tokenizer.decode(trim(response, special["eos_id"], special["eot_id"])))


if __name__ == "__main__":
    main()
