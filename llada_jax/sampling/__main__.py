"""Generates responses to prompts: prints them, or writes them with their passes and seconds.

python -m llada_jax.sampling --model=DIR --prompt="Why is the sky blue?"

python -m llada_jax.sampling --model=DIR --prompts=jsonl:prompts.jsonl --out=responses.jsonl
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time

import jax

from llada_jax import cli, metrics
from llada_jax.checkpoints import loading
from llada_jax.data.records import read_records
from llada_jax.data.templates import encode_prompt
from llada_jax.files import is_remote, write_whole
from llada_jax.parallel import agree, hosts
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.sampling import picture, replay
from llada_jax.sampling.flags import add_flags, settings_of
from llada_jax.sampling.texts import respond_in_words

TEMPLATES = ("chat", "plain", "raw")


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("sampling", __doc__)
    loading.add_flags(parser, data_parallel=1)
    parser.set_defaults(data_parallel=None)  # see `_mesh`
    hosts.add_flags(parser)
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
    parser.add_argument(
        "--stop", action="append", default=[], help="end a response before this text; repeatable"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_flags(parser)
    return parser


def main(args: argparse.Namespace):
    """Runs the command.

    Several hosts compute together. The first one reads the prompts, prints and writes.
    """
    hosts.initialize(args.coordinator_address, args.num_processes, args.process_id)
    render = picture.renderer(args.picture) if args.picture else None
    settings = {k: v for k, v in settings_of(args).items() if v is not None}
    about = {name: getattr(args, name) for name in ("model", "template", "dtype", "seed")}
    about |= {name: getattr(args, name) for name in ("quantize", "stop") if getattr(args, name)}
    about |= {k: dataclasses.asdict(v) if k == "growth" else v for k, v in settings.items()}
    prompts, missing, lines = [], [], {}
    if hosts.is_first():
        prompts = _prompts(args)
        lines = _answered(args.out, prompts, about) if args.out else {}
        missing = [i for i in range(len(prompts)) if i not in lines]
    prompts, missing = json.loads(agree.from_first(json.dumps([prompts, missing]).encode()))
    if not missing:
        hosts.say(f"{args.out} has all {len(lines)} responses")
        return

    mesh = _mesh(args)
    logits_fn, config, tokenizer = loading.open_model(args.model, args.dtype, args.quantize, mesh)
    special = loading.special_ids(config, tokenizer)
    ids = [_encode(tokenizer, prompts[i], args.template) for i in missing]
    _check_room(max(map(len, ids)), args.gen_length, config.max_sequence_length)

    found = respond_in_words(
        logits_fn,
        ids,
        tokenizer,
        stop=args.stop,
        batch_size=args.batch_size,
        key=jax.random.key(args.seed),
        row_ids=missing,
        row_sharding=None if mesh is None else mesh_lib.rows(mesh),
        **special,
        **settings,
    )
    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(mesh_lib.use(mesh))
        progress = None
        if args.out:  # printed responses are their own progress
            progress = metrics.Progress(len(prompts), len(lines), unit="response", show=(), every=5)
            stack.enter_context(progress)
        write = _Writer(args.out, prompts, lines, about, progress)
        for response, text in found:
            index = missing[response.index]
            if hosts.is_first():
                write(index, text, response.passes)
            if render and index == missing[0]:
                pictured = replay.with_confidence(  # all hosts compute it
                    logits_fn,
                    ids[response.index],
                    response,
                    remasking=args.remasking,
                    mask_id=special["mask_id"],
                )
                ends = special["eos_id"], special["eot_id"]
                content = picture.of_response(render, pictured, tokenizer, prompts[index], *ends)
                if hosts.is_first():
                    write_whole(args.picture, content)
        if hosts.is_first():
            write.close()
    agree.meet()  # a host that ends early would take the first one with it, which still writes


def _mesh(args: argparse.Namespace) -> jax.sharding.Mesh | None:
    """The devices of the flags; by default one, and of several hosts all."""
    data = args.data_parallel
    if data is None:
        data = 1 if jax.process_count() == 1 else -1
    return mesh_lib.of_rows(args.batch_size, data, args.fsdp, args.tensor)


def _check_room(prompt: int, gen_length: int, most: int):
    if prompt + gen_length > most:
        raise ValueError(
            f"the longest prompt and gen_length={gen_length} are {prompt + gen_length} tokens, the "
            f"model takes {most}: lower --gen_length or shorten the prompt"
        )


class _Writer:
    """Prints responses in the order of their prompts, or appends them to a file as they come."""

    def __init__(
        self, out: str | None, prompts: list, lines: dict[int, dict], about: dict, progress
    ):
        self.out, self.prompts, self.lines, self.about = out, prompts, lines, about
        self.progress, self.printed, self.began = progress, 0, time.monotonic()

    def __call__(self, index: int, text: str, passes: int):
        """Takes a response; its seconds are those since the one before."""
        now = time.monotonic()
        self.lines[index] = {
            "index": index,
            "prompt": self.prompts[index],
            "text": text,
            "passes": passes,
            "seconds": round(now - self.began, 3),
            "settings": self.about,
        }
        self.began = now
        if self.out:
            _append(self.out, [self.lines[index]])
            self.progress.update(len(self.lines))
            return
        while self.printed in self.lines:
            print(self.lines[self.printed]["text"], flush=True)
            self.printed += 1

    def close(self):
        """Puts the lines of the file into the order of the prompts."""
        if self.out:
            ordered = [json.dumps(self.lines[i]) + "\n" for i in sorted(self.lines)]
            write_whole(str(pathlib.Path(self.out).expanduser()), "".join(ordered))


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


def _answered(out: str, prompts: list, about: dict) -> dict[int, dict]:
    """The lines by prompt that a file has already; cuts off a line that is not whole."""
    if is_remote(out):
        raise ValueError(f"--out={out}: responses are appended, so it must be a local file")
    path = pathlib.Path(out).expanduser()
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = {line["index"]: line for line in map(json.loads, whole.splitlines())}
        same = all(
            line["prompt"] == prompts[index] and line["settings"] == about
            for index, line in lines.items()
        )
    except (ValueError, LookupError, TypeError):
        same = False
    if not same:
        raise ValueError(f"--out={out} is not of these prompts and settings: give another file")
    if whole != content:
        os.truncate(path, len(whole))
    return lines


def _append(out: str, lines: list[dict]):
    path = pathlib.Path(out).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
