"""Command-line flags for the settings of the sampler."""

import argparse
import dataclasses
from typing import Any

from llada_jax.sampling.cache import CACHES
from llada_jax.sampling.growth import Growth
from llada_jax.sampling.revoke import REVOKES
from llada_jax.sampling.settings import Settings
from llada_jax.sampling.unmasking import COMMITS, CONFIDENCES

# The flag of each setting that has one: its type or its choices, and what it does.
FLAGS: dict[str, tuple[Any, str]] = {
    "steps": (int, "denoising steps for the whole response"),
    "gen_length": (int, "tokens of the response"),
    "block_length": (int, "tokens unmasked together, from left to right"),
    "temperature": (float, "Gumbel noise; 0 takes the best token"),
    "top_k": (int, "draw from the k most probable tokens only"),
    "top_p": (float, "draw from the tokens of this probability only"),
    "cfg_scale": (float, "classifier-free guidance; 0 for none"),
    "logits_eos_inf": (bool, "never sample EOS"),
    "remasking": (CONFIDENCES, "the confidence"),
    "confidence_eos_eot_inf": (bool, "commit EOS and EoT last"),
    "commit": (COMMITS, "which predictions become tokens; all but the schedule ignore steps"),
    "threshold": (float, "the least confidence of a commit rule that has one"),
    "factor": (float, 'of commit "factor": higher commits more'),
    "entropy_budget": (float, 'of commit "entropy": nats; higher commits more'),
    "kl_threshold": (float, 'of commit "klass": nats; higher commits more'),
    "revoke": (REVOKES, "which tokens become masks again"),
    "threshold_back": (float, 'of revoke "wino": the least probability of a token that stays'),
    "revoke_number": (int, 'of revoke "remdm": tokens that become masks in a pass'),
    "revoke_passes": (int, 'of revoke "remdm": such passes in a block'),
    "cache": (CACHES, "what is kept between passes"),
    "refresh": (int, "with a cache: compute all in every so many passes of a block"),
    "refresh_prompt": (int, 'of cache "selective": compute the prompt in every so many passes'),
    "transfer_ratio": (float, 'of cache "selective": share of the response computed otherwise'),
    "stop_at_eos": (bool, "stop once EOS and all before it is written"),
}
DEFAULTS = {"steps": 128, "gen_length": 128, "block_length": 32}


def default(name: str) -> Any:
    """The value of a setting whose flag is not given."""
    fields = {f.name: f.default for f in dataclasses.fields(Settings)}
    return DEFAULTS.get(name, fields[name])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag for each setting of the sampler. `settings_of` reads them back."""
    for name, (kind, text) in FLAGS.items():
        if kind is bool:
            parser.add_argument(
                f"--{name}", action=argparse.BooleanOptionalAction, default=False, help=text
            )
        elif isinstance(kind, dict):
            parser.add_argument(f"--{name}", choices=tuple(kind), default=default(name), help=text)
        else:
            parser.add_argument(f"--{name}", type=kind, default=default(name), help=text)
    parser.add_argument(
        "--initial_length",
        type=int,
        help="let the response find its length, from this up to --gen_length (DAEDAL)",
    )


def settings_of(args: argparse.Namespace) -> dict:
    """Returns the flags of `add_flags` as keyword arguments for `generate`."""
    settings = {name: getattr(args, name) for name in FLAGS}
    if args.initial_length is not None:
        settings["growth"] = Growth(args.initial_length)
    return settings
