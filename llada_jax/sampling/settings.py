"""The settings of the sampler, and which of them contradict each other."""

import dataclasses
import difflib

import numpy as np

from llada_jax.sampling.cache import CACHES
from llada_jax.sampling.growth import Growth
from llada_jax.sampling.revoke import REVOKES
from llada_jax.sampling.unmasking import COMMITS, CONFIDENCES

INFILLS = ("all", "published")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of `generate`, given as keywords. The sampler is compiled anew for others.

    mask_id: the mask token.
    gen_length: positions of a response, the most that it can get.
    block_length: positions of a block. Blocks are filled from left to right.
    steps: passes for gen_length positions, divided equally over the blocks, which the "schedule"
        needs. The other rules do not read it, and take at most one pass a token.

    temperature: T > 0 draws candidates with Gumbel noise: argmax of logits - T log(-log u), in
        float32. The confidence still comes from the logits without noise. Needs `key`.
    top_k, top_p: at T > 0 only the k most probable tokens, or those that make up the probability p,
        can be drawn.
    cfg_scale: s > 0 applies classifier-free guidance: un + (s + 1) (cond - un), where un are the
        logits with the whole prompt masked. Both run in one batch of 2B.
    logits_eos_inf: forbids EOS.

    remasking: the confidence, a name in CONFIDENCES: "low_confidence" (the candidate's
        probability, rounded to float32 as in the published code: probabilities near 1 tie),
        "probability" (the same without the rounding), "margin" (the gap between the two best),
        "entropy" (minus the entropy), "random" (uniform noise, needs `key`).
    confidence_eos_eot_inf: gives EOS and EoT no confidence, so that they are committed last. This
        applies to both at any temperature; the published code exempts EOS at T > 0.

    commit: the commit rule, a name in COMMITS: "schedule" (by `steps`); "threshold" (all at least
        that confident); "factor" (Fast-dLLM's rule) or "factor_published" (as its code has it);
        "entropy" (EB-Sampler, `entropy_budget` in nats); "klass" (confident, and stable by
        `kl_threshold` in nats); "wino" (all above `threshold`, up to a number).
    revoke: a name in REVOKES: "none"; "wino" (what a mask in its place finds less probable than
        `threshold_back`); "remdm" (the `revoke_number` least confident, in `revoke_passes` passes).
    infill: "all" fills every mask, those of the prompt too: they compete with the first block, and
        a block that begins with m open positions up to its end commits m. The mask token is no
        candidate. "published" imitates the published loops: only the masks of a block are counted
        in its schedule, all masks up to its end compete for it, and a mask token that is committed
        stays a mask. Masks are then left if the prompt has some.
    lockstep: rows begin each block together, as published. By default a row goes on alone, which
        needs fewer passes and writes the same tokens. With a cache of windows they always wait.

    cache: a name in CACHES. "none" computes the whole text in each pass; "prefix" keeps the keys
        and values of what is before the block, "dual" those of what is after it too, "delayed"
        those of tokens, from the second pass after their commit. All are computed anew when a block
        begins, so the tokens may differ from those without a cache. "selective" keeps the outputs
        of all layers. logits_fn must be a `Partial(model.apply, variables)` of a model that offers
        the cache (see `models.family.Family`).
    refresh: computes the whole text in every so many passes of a block; 1 is the same as no cache.
        For the selective cache: the response, in every so many passes of the row.
    refresh_prompt: selective cache: computes the prompt in every so many passes.
    transfer_ratio: selective cache: the share of the response that is computed in other passes.

    stop_at_eos: stops a row once EOS is committed and all before it is committed. What follows the
        EOS becomes EOS. Tokens up to it are the same as without.
    growth: a `Growth`: the response finds its length, up to gen_length.
    eos_id, eot_id: the tokens that end a text and a turn.
    """

    mask_id: int
    gen_length: int
    block_length: int
    steps: int | None = None
    temperature: float | int = 0.0
    top_k: int | None = None
    top_p: float | int | None = None
    cfg_scale: float | int = 0.0
    logits_eos_inf: bool = False
    remasking: str = "low_confidence"
    confidence_eos_eot_inf: bool = False
    commit: str = "schedule"
    threshold: float | int | None = None
    factor: float | int | None = None
    entropy_budget: float | int | None = None
    kl_threshold: float | int | None = None
    revoke: str = "none"
    threshold_back: float | int | None = None
    revoke_number: int | None = None
    revoke_passes: int | None = None
    infill: str = "all"
    lockstep: bool = False
    cache: str = "none"
    refresh: int | None = None
    refresh_prompt: int | None = None
    transfer_ratio: float | int | None = None
    stop_at_eos: bool = False
    growth: Growth | None = None
    eos_id: int | None = None
    eot_id: int | None = None


def make(has_key: bool, **values) -> Settings:
    """Returns the settings; raises ValueError, in one line, for one that is wrong."""
    names = [f.name for f in dataclasses.fields(Settings)]
    for name, value in values.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, 1, 0.7)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{name}={value!r} is no setting of the sampler{hint}")
    for name in ("mask_id", "gen_length", "block_length"):
        if name not in values:
            raise TypeError(f"the sampler needs {name}=...")
    s = Settings(**values)
    check(s, has_key)
    # The windows of all rows are computed together.
    windows = CACHES[s.cache].windows is not None
    return dataclasses.replace(s, lockstep=s.lockstep or windows)


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


def check(s: Settings, has_key: bool) -> None:
    """Raises ValueError, in one line, for a setting that is wrong or that another rules out."""
    _one_of("commit", s.commit, COMMITS)
    rule = COMMITS[s.commit]
    blocks = s.gen_length // max(s.block_length, 1)
    if rule.scheduled and s.steps is None:
        raise ValueError(f'commit="{s.commit}" needs steps=...')
    check_schedule(s.steps if rule.scheduled else max(blocks, 1), s.gen_length, s.block_length)
    _one_of("remasking", s.remasking, CONFIDENCES)
    _one_of("revoke", s.revoke, REVOKES)
    _one_of("infill", s.infill, INFILLS)
    _one_of("cache", s.cache, CACHES)
    _check_numbers(s)
    _check_draws(s, has_key)
    _check_ends(s)
    _check_combinations(s)
    if s.growth is not None:
        _check_growth(s, s.growth)


def _one_of(name: str, value: str, table) -> None:
    if value not in table:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(table)}")


def _check_draws(s: Settings, has_key: bool) -> None:
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


def _check_ends(s: Settings) -> None:
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


def _check_numbers(s: Settings) -> None:
    """Numbers belong to a rule: those of another rule have no effect, and are refused."""
    tables = (("commit", COMMITS), ("revoke", REVOKES), ("cache", CACHES))
    chosen = {kind: table[getattr(s, kind)] for kind, table in tables}
    for kind, table in tables:
        for name in sorted({name for entry in table.values() for name in entry.needs}):
            value = getattr(s, name)
            needed = any(name in entry.needs for entry in chosen.values())
            if value is None and name in chosen[kind].needs:
                raise ValueError(f'{kind}="{getattr(s, kind)}" needs {name}=...')
            if value is not None and not needed and name not in chosen["cache"].takes:
                raise ValueError(
                    f'{name}={value} has no effect with {kind}="{getattr(s, kind)}": leave it or '
                    "choose the rule that reads it"
                )
            if value is not None and not np.isfinite(value):
                raise ValueError(f"{name}={value} is no finite number")
    if chosen["commit"].probability and not CONFIDENCES[s.remasking].probability:
        raise ValueError(
            f'commit="{s.commit}" compares probabilities, and remasking="{s.remasking}" has none'
        )
    for name in ("refresh", "refresh_prompt", "revoke_number", "revoke_passes"):
        value = getattr(s, name)
        if value is not None and (value < 1 or value != int(value)):
            raise ValueError(f"{name}={value} must be a whole number, at least 1")
    for name in ("factor", "entropy_budget", "kl_threshold"):
        value = getattr(s, name)
        if value is not None and value < 0:
            raise ValueError(f"{name}={value} may not be negative")
    if s.transfer_ratio is not None and not 0 <= s.transfer_ratio <= 1:
        raise ValueError(f"transfer_ratio={s.transfer_ratio} must be from 0 to 1")


def _check_combinations(s: Settings) -> None:
    revoke, parts = REVOKES[s.revoke], CACHES[s.cache].kind == "parts"
    if revoke.choose is not None and s.infill == "published":
        raise ValueError(f'revoke="{s.revoke}" needs infill="all": published loops have no rule')
    if revoke.shadow and parts:
        raise ValueError(f'revoke="{s.revoke}" adds masks, for which cache="{s.cache}" has no room')


def _check_growth(s: Settings, growth: Growth) -> None:
    for name, wrong in (
        ("commit", COMMITS[s.commit].scheduled),
        ("cache", s.cache != "none"),
        ("infill", s.infill != "all"),
        ("remasking", not CONFIDENCES[s.remasking].probability),
    ):
        if wrong:
            raise ValueError(f'growth does not go with {name}="{getattr(s, name)}"; see Growth')
    if s.eos_id is None:
        raise ValueError("growth asks how probable EOS is: give its eos_id")
    if not 1 <= growth.initial_length <= s.gen_length:
        raise ValueError(
            f"initial_length={growth.initial_length} is not between 1 and gen_length={s.gen_length}"
        )
    for name in ("factor", "eos_window"):
        if getattr(growth, name) < 1:
            raise ValueError(f"{name}={getattr(growth, name)} must be at least 1")
