"""The settings of the sampler, and which of them contradict each other."""

import dataclasses

import numpy as np

from llada_jax.sampling.cache import CACHES
from llada_jax.sampling.unmasking import COMMITS, CONFIDENCES, Numbers

INFILLS = ("all", "published")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of `generate`. The sampler is compiled anew for other settings or shapes."""

    mask_id: int
    steps: int | None
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


def check(s: Settings, has_key: bool) -> None:
    """Raises ValueError, in one line, for a setting that is wrong or that another rules out."""
    _one_of("commit", s.commit, COMMITS)
    rule = COMMITS[s.commit]
    blocks = s.gen_length // max(s.block_length, 1)
    if rule.scheduled and s.steps is None:
        raise ValueError(f'commit="{s.commit}" needs steps=...')
    check_schedule(s.steps if rule.scheduled else max(blocks, 1), s.gen_length, s.block_length)
    _one_of("remasking", s.remasking, CONFIDENCES)
    _one_of("infill", s.infill, INFILLS)
    _one_of("cache", s.cache, CACHES)
    _check_numbers(s)
    _check_draws(s, has_key)
    _check_ends(s)


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
