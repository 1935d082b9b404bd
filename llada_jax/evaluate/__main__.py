"""Judges a model; writes its results to files that a later run continues.

python -m llada_jax.evaluate passes --model=DIR --out=DIR    accuracy against forward passes
"""

import argparse
import sys

from llada_jax import cli
from llada_jax.checkpoints import loading
from llada_jax.evaluate import passes


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("evaluate", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_passes = commands.add_parser("passes", help="accuracy and passes of every rule, as curves")
    loading.add_flags(of_passes)
    passes.add_flags(of_passes)
    return parser


def main(args: argparse.Namespace):
    """Runs the command."""
    logits_fn, config, tokenizer = loading.open_model(args.model, args.dtype, args.quantize)
    special = loading.special_ids(config, tokenizer)
    passes.run(args, logits_fn, tokenizer, special, config.max_sequence_length)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
