"""Prints a model's responses to prompts.

    python -m llada_jax.sampling --model=DIR --prompt="Why is the sky blue?"
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from llada_jax.checkpoints.loading import open_model, special_ids
from llada_jax.sampling.flags import add_flags, settings_of
from llada_jax.sampling.responses import sample_responses, trim

TEMPLATES = ("chat", "plain", "raw")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llada_jax.sampling", description="Prints a model's responses to prompts."
    )
    parser.add_argument("--model", required=True, help="Hugging Face style folder, workdir, or workdir/checkpoints/N")
    parser.add_argument("--prompt", required=True, action="append", help="give it again for more prompts")
    parser.add_argument("--template", choices=TEMPLATES, default="chat", help="plain: BOS and the text; raw: the text")
    parser.add_argument("--dtype", help="cast the parameters to it, as bfloat16; default: as stored")
    parser.add_argument("--seed", type=int, default=0)
    add_flags(parser)
    args = parser.parse_args(argv)
    try:
        logits_fn, config, tokenizer = open_model(args.model, args.dtype)
        prompts = []
        for prompt in args.prompt:
            if args.template == "chat":
                prompts.append(tokenizer.chat_prompt([{"role": "user", "content": prompt}]))
            else:
                bos = [] if args.template == "raw" or tokenizer.bos_id is None else [tokenizer.bos_id]
                prompts.append(bos + tokenizer.encode(prompt))
        special = special_ids(config, tokenizer)
        responses = sample_responses(
            logits_fn,
            prompts,
            batch_size=len(prompts),
            key=jax.random.key(args.seed),
            **special,
            **settings_of(args),
        )
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")
    for response in responses:
        print(tokenizer.decode(trim(response, special["eos_id"], special["eot_id"])))
