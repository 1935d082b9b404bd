"""Generates responses to prompts: prints them, or writes them with their passes and seconds.

python -m llada_jax.sampling --model=DIR --prompt="Why is the sky blue?"

python -m llada_jax.sampling --model=DIR --prompts=jsonl:prompts.jsonl --out=responses.jsonl
"""

import argparse
import contextlib
import itertools
import json
import os
import pathlib
import sys
import textwrap
import time

import jax
import numpy as np

from llada_jax import cli, metrics
from llada_jax.checkpoints import loading
from llada_jax.data.records import read_records
from llada_jax.data.templates import encode_prompt
from llada_jax.files import is_remote, write_whole
from llada_jax.sampling import picture
from llada_jax.sampling.flags import add_flags, settings_of
from llada_jax.sampling.responses import response_batches, trim

TEMPLATES = ("chat", "plain", "raw")


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("sampling", __doc__)
    parser.add_argument(
        "--model",
        required=True,
        help="Hugging Face style folder, workdir, or workdir/checkpoints/N",
    )
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="give it again for more prompts")
    prompts.add_argument(
        "--prompts",
        help="jsonl:FILES, tfds:NAME or python:module:function; -: standard input, one a line",
    )
    parser.add_argument(
        "--out", help="FILE.jsonl for text, passes, seconds and settings; it may be continued"
    )
    parser.add_argument("--picture", help="FILE.html, .png, .svg or .pdf of the first response")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts answered at a time")
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
    render = picture.renderer(args.picture) if args.picture else None
    prompts = _prompts(args)
    settings = {k: v for k, v in settings_of(args).items() if v is not None}
    about = {name: getattr(args, name) for name in ("model", "template", "dtype", "seed")}
    about |= settings
    done = _answered(args.out, prompts, about) if args.out else 0
    if done == len(prompts):
        print(f"{args.out} has all {done} responses")
        return

    logits_fn, config, tokenizer = loading.open_model(args.model, args.dtype)
    special = loading.special_ids(config, tokenizer)
    ids = [_encode(tokenizer, prompt, args.template) for prompt in prompts]
    longest = max(map(len, ids)) + args.gen_length
    if longest > config.max_sequence_length:
        raise ValueError(
            f"the longest prompt and gen_length={args.gen_length} are {longest} tokens, the model "
            f"takes {config.max_sequence_length}: lower --gen_length or shorten the prompt"
        )
    batches = response_batches(
        logits_fn,
        ids[done:],
        batch_size=min(args.batch_size, len(ids) - done),
        key=jax.random.key(args.seed),
        row_ids=range(done, len(ids)),
        trace=True,
        **special,
        **settings,
    )
    first = prompts[done]
    with contextlib.ExitStack() as stack:
        if args.out:  # printed responses are their own progress
            progress = metrics.Progress(len(ids), done, unit="response", show=(), every=5)
            stack.enter_context(progress)
        began = time.monotonic()
        for batch in batches:
            seconds, began = time.monotonic() - began, time.monotonic()
            lines = [
                {
                    "prompt": prompt,
                    "text": tokenizer.decode(trim(row, special["eos_id"], special["eot_id"])),
                    "passes": int(passes),
                    "seconds": round(seconds, 3),
                    "settings": about,
                }
                for prompt, row, passes in zip(
                    prompts[done:], batch.tokens, batch.row_passes, strict=False
                )
            ]
            done += len(lines)
            if args.out:
                _append(args.out, lines)
                progress.update(done)
            else:
                print("\n".join(line["text"] for line in lines), flush=True)
            if render:
                write_whole(args.picture, _picture(render, batch, tokenizer, special, first))
                render = None


def _prompts(args: argparse.Namespace) -> list:
    """The prompts, each a text or a list of messages."""
    if args.prompt:
        return args.prompt
    if args.prompts == "-":
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    else:
        prompts = [record["prompt"] for _, _, record in read_records(args.prompts, "prompt")]
    if not prompts:
        raise ValueError(f"--prompts={args.prompts} holds no prompt; give one that does")
    return prompts


def _encode(tokenizer, prompt, template: str) -> list[int]:
    if template != "raw":
        return encode_prompt(tokenizer, prompt, template)
    if not isinstance(prompt, str):
        raise ValueError("--template=raw needs prompts that are texts, not messages")
    return tokenizer.encode(prompt)


def _answered(out: str, prompts: list, about: dict) -> int:
    """The number of prompts that a file already answers; cuts off a line that is not whole."""
    if is_remote(out):
        raise ValueError(f"--out={out}: responses are appended, so it must be a local file")
    path = pathlib.Path(out).expanduser()
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        same = [
            line["prompt"] == prompt and line["settings"] == about
            for line, prompt in zip(lines, prompts, strict=False)
        ]
    except (ValueError, KeyError, TypeError):
        same = [False]
    if not all(same) or len(same) < len(lines):
        raise ValueError(f"--out={out} is not of these prompts and settings: give another file")
    if whole != content:
        os.truncate(path, len(whole))
    return len(lines)


def _append(out: str, lines: list[dict]):
    path = pathlib.Path(out).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


def _picture(render, batch, tokenizer, special: dict, prompt) -> str | bytes:
    """The picture of the first response of a batch, up to its EOS or EoT."""
    ids = trim(batch.tokens[0], special["eos_id"], special["eot_id"])
    # A token alone may be no text, so each gets what it adds to the text before it.
    texts = [tokenizer.decode(ids[:k]) for k in range(len(ids) + 1)]
    words = [after[_shared(before, after) :] for before, after in itertools.pairwise(texts)]
    steps, confidence = batch.steps[0, : len(ids)], batch.confidence[0, : len(ids)]
    # A confidence below 0 is minus an entropy, whose exp is between 0 and 1.
    confidence = np.where(confidence < 0, np.exp(confidence), confidence)
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return render(words, steps, confidence, title=textwrap.shorten(text, 80, placeholder=" ..."))


def _shared(one: str, other: str) -> int:
    """The number of characters with which both texts begin."""
    pairs = zip(one, other, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
