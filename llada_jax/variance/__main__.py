"""Measures variance, bias and cost of ELBO estimators: Table 2 of LLaDA 1.5, then ours or yours.

python -m llada_jax.variance --policy=MODEL --reference=MODEL --pairs=jsonl:FILES --out=DIR
"""

import argparse
import sys

from llada_jax import cli
from llada_jax.models.layers import REMAT
from llada_jax.parallel import hosts
from llada_jax.variance.columns import UP_PROJ
from llada_jax.variance.measure import run


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("variance", __doc__)
    parser.add_argument(
        "--policy",
        required=True,
        help="Hugging Face style folder, workdir, or workdir/checkpoints/N",
    )
    parser.add_argument("--reference", required=True, help="the same for the reference policy")
    parser.add_argument(
        "--pairs", required=True, help="preference records: jsonl:FILES, tfds:NAME or python:..."
    )
    parser.add_argument(
        "--out", default="runs/variance", help="folder of results; the same one continues"
    )
    parser.add_argument("--pairs_limit", type=int, default=128, help="records to read; 0 for all")
    parser.add_argument("--repeats", type=int, default=8, help="independent estimates of each pair")
    parser.add_argument("--truth", type=int, default=64, help="draws of the high-budget estimate")
    parser.add_argument(
        "--nested_t", type=int, default=16, help="times of the nested draws for V_t and V_yt"
    )
    parser.add_argument("--nested_yt", type=int, default=4, help="samples at each of them")
    parser.add_argument(
        "--schemes",
        action="append",
        metavar="NAME=VALUE,...",
        help="an estimator beside Table 2, instead of ours",
    )
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="modules",
        metavar="MODULE",
        help="it adds schemes to `noise`",
    )
    parser.add_argument(
        "--only_schemes", action="store_true", help="leave the columns of Table 2 out"
    )
    parser.add_argument(
        "--part", action="append", help=f"a parameter to report by itself; default: {UP_PROJ}"
    )
    parser.add_argument("--no_gradient", action="store_true", help="scores and losses alone")
    parser.add_argument("--no_plots", action="store_true", help="do without matplotlib")
    parser.add_argument("--beta", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--template", choices=("chat", "plain"), default="chat")
    parser.add_argument("--no_eos", action="store_true", help="responses do not end with EOS")
    parser.add_argument("--row_length", type=int, default=0, help="0: the model's longest")
    parser.add_argument("--batch_rows", type=int, default=16, help="rows of all devices at once")
    parser.add_argument(
        "--mc_chunk", type=int, default=8, help="at most so many draws at a time; 0: all"
    )
    parser.add_argument(
        "--remat", choices=tuple(REMAT), default="none", help="what a layer keeps for its gradient"
    )
    parser.add_argument(
        "--dtype", help="cast the parameters to it, as bfloat16; default: as stored"
    )
    parser.add_argument(
        "--fsdp", type=int, default=1, help="mesh axis; the devices left share the rows"
    )
    parser.add_argument("--tensor", type=int, default=1, help="mesh axis")
    return parser


def main(args: argparse.Namespace):
    """Runs the command."""
    args.part = args.part or [UP_PROJ]
    hosts.initialize()
    hosts.say(run(args))


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
