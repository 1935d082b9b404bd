"""Trains a model: python -m llada_jax.train --config=FILE [--config.NAME=VALUE] --workdir=DIR.

The same command continues a run that was stopped. On several hosts, run the same command on each.
"""

import sys
from argparse import Namespace

from llada_jax import cli
from llada_jax.parallel import hosts
from llada_jax.train import describe, make_plan, train
from llada_jax.train.settings import describe_keys


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("train", __doc__)
    parser.take_config(describe_keys)
    parser.add_argument(
        "--workdir",
        required=True,
        help="where checkpoints, metrics and packed rows go; the same one continues its run",
    )
    parser.add_argument("--dry_run", action="store_true", help="check, print what would run, end")
    hosts.add_flags(parser)
    return parser


def main(args: Namespace) -> int:
    """Runs the command; returns the exit status."""
    hosts.initialize(args.coordinator_address, args.num_processes, args.process_id)
    plan = make_plan(args.config, args.workdir, dry_run=args.dry_run)
    hosts.say(describe(plan))
    return 0 if args.dry_run else train(plan)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
