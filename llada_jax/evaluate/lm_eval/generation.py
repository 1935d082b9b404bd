"""What a task of the harness asks of a generation, as settings of the sampler."""

from collections.abc import Mapping
from typing import Any

from llada_jax.sampling import settings as sampler

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
DEFAULT_LENGTH = 256  # tokens of a response, as other models of the harness have it
DEFAULT_BLOCK = 32
_ONE = ("num_beams", "num_return_sequences")  # there is one response


def settings_of(given: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[list[str], dict]:
    """Returns (stop strings, keywords of the sampler without mask_id and other ids).

    given: the task's gen_kwargs. Settings of the sampler may be among them, and go before `own`.
    own: settings of the sampler that the user gave.

    The length is gen_length, or the task's number of tokens, rounded up to whole blocks. There is
    one pass a token without `steps`. do_sample=False is temperature 0; do_sample=True without a
    temperature is 1. Raises ValueError for anything that the sampler does not know.
    """
    given = dict(given)
    until = given.pop("until", None) or []
    until = [until] if isinstance(until, str) else [str(word) for word in until]
    lengths = [given.pop(name) for name in LENGTHS if name in given]
    for name in _ONE:
        if given.pop(name, 1) != 1:
            raise ValueError(f"gen_kwargs: {name} is not 1: the sampler writes one response")
    found = _drawn(given, own)
    if "gen_length" not in found:
        found["gen_length"] = int(lengths[0]) if lengths else DEFAULT_LENGTH
        if "block_length" not in found:
            found["block_length"] = min(DEFAULT_BLOCK, found["gen_length"])
        block = max(found["block_length"], 1)
        found["gen_length"] = -(-found["gen_length"] // block) * block
    found.setdefault("block_length", min(DEFAULT_BLOCK, found["gen_length"]))
    found.setdefault("steps", found["gen_length"])
    return [word for word in until if word], found


def _drawn(given: dict, own: Mapping[str, Any]) -> dict:
    """All settings; those of the task about drawing at random count only if it draws."""
    draws = given.pop("do_sample", None)
    if draws is None and "temperature" in given:
        draws = given["temperature"] > 0
    if draws:
        given.setdefault("temperature", own.get("temperature") or 1.0)
    found = {**own, **given}
    if draws is False:
        found = {k: v for k, v in found.items() if k not in ("temperature", "top_p", "top_k")}
    return found


def check(found: dict, ids: Mapping[str, int | None]) -> None:
    """Raises ValueError, in one line, for settings that the sampler refuses."""
    special = {name: ids[name] for name in ("mask_id", "eos_id", "eot_id")}
    sampler.make(True, **special, **found)
