"""Compiles the training step of a config for a TPU pod that this machine does not have.

python -m llada_jax.compile --config=FILE --topology=v5p:2x2x4 [--slices=2] [--json]

It compiles the same step that training runs. It needs the TPU compiler (`pip install libtpu`, or
the extra `tpu`) but no TPU. The memory is what the compiler allots on a chip. FLOPs come from a
formula. The step time is a lower bound from the chip's peak rates, not a forecast.
"""

import json
import sys
from argparse import Namespace

import jax

from llada_jax import cli
from llada_jax.compile.step import compile_step, plan_for
from llada_jax.compile.summary import as_text, report
from llada_jax.compile.target import topology
from llada_jax.train.settings import describe_keys


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("compile", __doc__)
    parser.take_config(describe_keys)
    parser.add_argument(
        "--topology",
        required=True,
        help="GENERATION:AxB[xC], the chips of one slice, e.g. v5p:2x2x4, v6e:4x4, v5e:8x8",
    )
    parser.add_argument(
        "--slices", type=int, default=1, help="slices, with the data-center network between them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(args: Namespace):
    """Runs the command."""
    jax.config.update("jax_platforms", "cpu")
    devices, chip = topology(args.topology, args.slices)
    plan = plan_for(args.config, devices)
    compiled, seconds = compile_step(plan)
    found = report(plan, args.topology, chip, compiled, seconds)
    print(json.dumps(found, indent=1) if args.json else as_text(found))


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
