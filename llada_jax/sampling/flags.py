"""Command-line flags for the settings of the sampler."""

import argparse

from llada_jax.sampling.cache import CACHES
from llada_jax.sampling.unmasking import COMMITS, CONFIDENCES


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag for each setting of the sampler. `settings_of` reads them back."""
    parser.add_argument(
        "--steps", type=int, default=128, help="denoising steps for the whole response"
    )
    parser.add_argument("--gen_length", type=int, default=128, help="tokens of the response")
    parser.add_argument(
        "--block_length", type=int, default=32, help="tokens unmasked together, from left to right"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="Gumbel noise; 0 takes the best token"
    )
    parser.add_argument("--top_k", type=int, help="draw from the k most probable tokens only")
    parser.add_argument("--top_p", type=float, help="draw from the tokens of this probability only")
    parser.add_argument(
        "--cfg_scale", type=float, default=0.0, help="classifier-free guidance; 0 for none"
    )
    parser.add_argument(
        "--remasking", choices=tuple(CONFIDENCES), default="low_confidence", help="the confidence"
    )
    parser.add_argument(
        "--commit",
        choices=tuple(COMMITS),
        default="schedule",
        help="which predictions become tokens; all but the schedule ignore --steps",
    )
    parser.add_argument(
        "--threshold", type=float, help='of commit "threshold": the least confidence'
    )
    parser.add_argument("--factor", type=float, help='of commit "factor": higher commits more')
    parser.add_argument(
        "--entropy_budget", type=float, help='of commit "entropy": nats; higher commits more'
    )
    parser.add_argument(
        "--cache", choices=tuple(CACHES), default="none", help="keys and values that are kept"
    )
    parser.add_argument(
        "--refresh", type=int, help="with a cache: compute all in every so many passes of a block"
    )
    parser.add_argument(
        "--stop_at_eos", action="store_true", help="stop once EOS and all before it is written"
    )
    parser.add_argument("--logits_eos_inf", action="store_true", help="never sample EOS")
    parser.add_argument(
        "--confidence_eos_eot_inf", action="store_true", help="commit EOS and EoT last"
    )


def settings_of(args: argparse.Namespace) -> dict:
    """Returns the flags of `add_flags` as keyword arguments for `generate`."""
    names = (
        "steps",
        "gen_length",
        "block_length",
        "temperature",
        "top_k",
        "top_p",
        "cfg_scale",
        "remasking",
        "commit",
        "threshold",
        "factor",
        "entropy_budget",
        "cache",
        "refresh",
        "stop_at_eos",
        "logits_eos_inf",
        "confidence_eos_eot_inf",
    )
    return {name: getattr(args, name) for name in names}
