"""Compiles a training step, or the sampler, for a TPU pod that this machine does not have.

python -m llada_jax.compile --config=FILE --topology=v5p:2x2x4 [--slices=2] [--json]

python -m llada_jax.compile --sample --config=FILE --topology=v6e:1x1 [--quantize=int8] [--json]

It compiles the same step that training runs. With --sample it compiles the loop of the sampler for
the config's model and mesh; the flags of the sampler are those of `llada_jax.sampling`. It needs
the TPU compiler (`pip install libtpu`, or the extra `tpu`) but no TPU. The memory is what the
compiler allots on a chip. FLOPs come from a formula. Times are lower bounds from the chip's peak
rates, not forecasts.
"""

import json
import sys
from argparse import Namespace

import jax

from llada_jax import cli, sampling
from llada_jax.compile import passes, sample, summary
from llada_jax.compile.step import compile_step, plan_for
from llada_jax.compile.target import topology
from llada_jax.models import quantized
from llada_jax.train.settings import describe_keys


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("compile", __doc__)
    parser.take_config(describe_keys)
    parser.add_argument(
        "--topology",
        required=True,
        help="GENERATION:AxB[xC], the chips of one slice, e.g. v5p:2x2x4, v6e:4x4, v6e:1x1",
    )
    parser.add_argument(
        "--slices", type=int, default=1, help="slices, with the data-center network between them"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--sample", action="store_true", help="the sampler; all flags below are for it"
    )
    parser.add_argument("--batch_size", type=int, default=1, help="prompts answered at a time")
    parser.add_argument("--prompt_length", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--quantize", choices=quantized.KINDS, help="weights, as `load` has them")
    parser.add_argument(
        "--tokens_per_pass",
        type=float,
        action="append",
        help="tokens/s at so many tokens a pass; repeatable; default: published ones",
    )
    sampling.add_flags(parser)
    return parser


def main(args: Namespace):
    """Runs the command."""
    _check_flags(args)
    jax.config.update("jax_platforms", "cpu")
    devices, chip = topology(args.topology, args.slices)
    plan = plan_for(args.config, devices)
    if args.sample:
        sampler = sample.sampler_of(
            plan,
            batch_size=args.batch_size,
            prompt_length=args.prompt_length,
            quantize=args.quantize,
            **sampling.settings_of(args),
        )
        compiled, seconds = sample.compile_sampler(sampler)
        found = passes.report(sampler, args.topology, chip, compiled, seconds, args.tokens_per_pass)
        text = passes.as_text(found)
    else:
        compiled, seconds = compile_step(plan)
        found = summary.report(plan, args.topology, chip, compiled, seconds)
        text = summary.as_text(found)
    print(json.dumps(found, indent=1) if args.json else text)


def _check_flags(args: Namespace):
    """Raises ValueError for a flag that has no effect."""
    given, flags = parser(), vars(args)
    fixed = {"config", "topology", "slices", "json", "sample"}
    changed = [n for n, x in flags.items() if n not in fixed and x != given.get_default(n)]
    changed = [n for n in changed if not n.startswith("config.")]
    if changed and not args.sample:
        raise ValueError(f"--{changed[0]} is read with --sample only: add it")
    scheduled = sampling.COMMITS[args.commit].scheduled
    if args.tokens_per_pass and scheduled:
        raise ValueError(
            f"--tokens_per_pass: --commit={args.commit} has gen_length / steps; choose another rule"
        )
    if any(not 1 <= k <= args.block_length for k in args.tokens_per_pass or ()):
        raise ValueError(
            f"--tokens_per_pass={args.tokens_per_pass}: from 1 to --block_length="
            f"{args.block_length}"
        )


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
