"""Generates responses to prompts and prints them.

python -m llada_jax.sampling --model=DIR --prompt="Why is the sky blue?"
"""

import argparse
import sys

import jax

from llada_jax import cli
from llada_jax.checkpoints import loading
from llada_jax.data.templates import encode_prompt
from llada_jax.sampling.flags import add_flags, settings_of
from llada_jax.sampling.responses import sample_responses, trim

TEMPLATES = ("chat", "plain", "raw")


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("sampling", __doc__)
    parser.add_argument(
        "--model",
        required=True,
        help="Hugging Face style folder, workdir, or workdir/checkpoints/N",
    )
    parser.add_argument(
        "--prompt", required=True, action="append", help="give it again for more prompts"
    )
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        default="chat",
        help="plain: BOS and the text; raw: the text",
    )
    parser.add_argument("--dtype", help="cast the parameters, as to bfloat16; default: as stored")
    parser.add_argument("--seed", type=int, default=0)
    add_flags(parser)
    return parser


def main(args: argparse.Namespace):
    """Runs the command."""
    logits_fn, config, tokenizer = loading.open_model(args.model, args.dtype)
    special = loading.special_ids(config, tokenizer)
    responses = sample_responses(
        logits_fn,
        [_encode(tokenizer, prompt, args.template) for prompt in args.prompt],
        batch_size=len(args.prompt),
        key=jax.random.key(args.seed),
        **special,
        **settings_of(args),
    )
    for response in responses:
        print(tokenizer.decode(trim(response, special["eos_id"], special["eot_id"])))


def _encode(tokenizer, prompt: str, template: str) -> list[int]:
    if template == "raw":
        return tokenizer.encode(prompt)
    return encode_prompt(tokenizer, prompt, template)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
