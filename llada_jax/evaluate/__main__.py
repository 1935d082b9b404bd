"""Judges models, each task by one command.

python -m llada_jax.evaluate --model=DIR --tasks=gsm8k,humaneval --out=DIR    answer and score
python -m llada_jax.evaluate score --task=gsm8k --responses=FILE.jsonl --out=FILE.json
python -m llada_jax.evaluate judge --responses=FILE --baseline=FILE --data=... --judge=... --out=DIR
python -m llada_jax.evaluate compare A B                     paired differences of two results
python -m llada_jax.evaluate lm_eval --model=DIR --tasks=NAME,NAME --out=DIR    the harness
python -m llada_jax.evaluate tasks                           all tasks and their settings
python -m llada_jax.evaluate passes --model=DIR --out=DIR    accuracy against forward passes
"""

import argparse
import sys

import jax

from llada_jax import cli
from llada_jax.checkpoints import hashing, loading
from llada_jax.evaluate import compare, harness, passes, plan, run, score, table
from llada_jax.evaluate.answers import Model
from llada_jax.evaluate.judge import command as judge
from llada_jax.parallel import hosts
from llada_jax.parallel import mesh as mesh_lib


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("evaluate", __doc__)
    parser.default_command = "run"
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="answer the questions of tasks and score (the default)")
    loading.add_flags(runs, data_parallel=-1)
    plan.add_flags(runs)
    runs.add_argument("--out", required=True, help="folder of results; a later run continues it")
    runs.add_argument("--batch_size", type=int, default=16, help="questions answered at a time")
    hosts.add_flags(runs)
    scores = commands.add_parser("score", help="score responses made elsewhere")
    score.add_flags(scores)
    for each in (runs, scores):
        each.add_argument(
            "--unsafe",
            action="store_true",
            help="run generated programs even where nothing protects this machine",
        )
    compare.add_flags(commands.add_parser("compare", help="paired differences of two results"))
    judge.add_flags(commands.add_parser("judge", help="answers against a baseline's, by a judge"))
    harness.add_flags(commands.add_parser("lm_eval", help="tasks of the lm-evaluation-harness"))
    commands.add_parser("tasks", help="print all tasks and their published settings")
    of_passes = commands.add_parser("passes", help="accuracy and passes of every rule, as curves")
    loading.add_flags(of_passes)
    passes.add_flags(of_passes)
    return parser


def main(args: argparse.Namespace):
    """Runs the command."""
    commands = {
        "run": _run,
        "score": score.run,
        "compare": compare.run,
        "passes": _passes,
        "judge": judge.run,
        "lm_eval": harness.run,
        "tasks": lambda _: print(table.of_settings(), end=""),
    }
    commands[args.command](args)


def _run(args: argparse.Namespace):
    plans = plan.plans(args)
    hosts.initialize(args.coordinator_address, args.num_processes, args.process_id)
    split = (args.data_parallel, args.fsdp, args.tensor)
    mesh = mesh_lib.of_rows(args.batch_size, *split, devices=jax.local_devices())
    logits_fn, config, tokenizer = loading.open_model(args.model, args.dtype, args.quantize, mesh)
    special = loading.special_ids(config, tokenizer)
    about = {name: getattr(args, name) for name in ("model", "dtype", "quantize")}
    about |= {
        "fingerprint": hashing.fingerprint(logits_fn.args),
        "tokenizer": tokenizer.fingerprint,
    }
    model = Model(logits_fn, tokenizer, special, config.max_sequence_length, mesh)
    run.run(args, plans, model, about)


def _passes(args: argparse.Namespace):
    logits_fn, config, tokenizer = loading.open_model(args.model, args.dtype, args.quantize)
    special = loading.special_ids(config, tokenizer)
    passes.run(args, Model(logits_fn, tokenizer, special, config.max_sequence_length))


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
