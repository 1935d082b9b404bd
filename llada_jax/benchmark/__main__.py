"""Measures time and memory on this machine; prints lines and writes JSON (`--out=FILE`).

python -m llada_jax.benchmark step --config=FILE     the step of a config
python -m llada_jax.benchmark torch --config=FILE    the step against a plain PyTorch loop (CPU)
python -m llada_jax.benchmark load                   reading a checkpoint with LLaDA 8B's layout
python -m llada_jax.benchmark sample                 the sampler by rule, cache, batch and length

Of a config without data.train the rows are synthetic, with its shapes, and without init_from the
parameters are random.
"""

import importlib
import json
import sys
import tempfile
from argparse import Namespace

from llada_jax import cli
from llada_jax.benchmark import load, sample, step
from llada_jax.files import write_whole
from llada_jax.parallel import hosts
from llada_jax.train.settings import describe_keys


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("benchmark", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_step = commands.add_parser("step", help="time the step of a config")
    of_torch = commands.add_parser("torch", help="compare with a plain PyTorch loop on a CPU")
    parser.take_config(describe_keys, of_step, of_torch)
    for command in (of_step, of_torch):
        command.add_argument("--workdir", default="", help="for packed rows; default: a new folder")
        command.add_argument("--steps", type=int, default=10, help="steps to time, after two more")
    of_step.add_argument("--profile", default="", help="folder for a JAX trace of three steps")
    of_load = commands.add_parser("load", help="time the reading of a checkpoint with 8B's layout")
    load.add_flags(of_load)
    of_sample = commands.add_parser("sample", help="time the sampler; --torch: beside PyTorch's")
    sample.add_flags(of_sample)
    for command in (of_step, of_torch, of_load, of_sample):
        command.add_argument("--out", default="", help="JSON file to write")
    return parser


def main(args: Namespace):
    """Runs the command."""
    if args.command == "load":
        result = load.run(args)
    elif args.command == "sample":
        result = sample.run(args, _with_torch("torch_sampling") if args.torch else None)
    else:
        if args.steps < 1:
            raise ValueError(f"--steps={args.steps}: at least one step is timed")
        hosts.initialize()
        with tempfile.TemporaryDirectory() as folder:
            workdir = args.workdir or folder
            if args.command == "step":
                result = step.run(args.config, workdir, args.steps, args.profile)
            else:
                result = _with_torch("torch_loop").run(args.config, workdir, args.steps)
    if args.out and hosts.is_first():
        write_whole(args.out, json.dumps(result, indent=1) + "\n")


def _with_torch(name: str):
    """Imports a module of this room that needs PyTorch."""
    try:
        return importlib.import_module(f"llada_jax.benchmark.{name}")
    except ModuleNotFoundError as error:
        raise ImportError("PyTorch is missing: pip install -e '.[benchmark]'") from error


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
