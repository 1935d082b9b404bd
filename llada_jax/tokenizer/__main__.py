"""Trains a SentencePiece model that has the special tokens of LLaDA.

python -m llada_jax.tokenizer train --input='books/*.jsonl.xz' --vocab_size=4096 --out=tokenizer
"""

import argparse
import json
import sys
from collections.abc import Iterator

from llada_jax import cli
from llada_jax.files import expand, read_lines
from llada_jax.tokenizer import FILES, train


def _texts(source: str, field: str, limit: int) -> Iterator[str]:
    """Yields the lines of text files, or of the field `field` of .jsonl files, without newlines."""
    count = 0
    for path in expand(source.removeprefix("jsonl:")):
        is_jsonl = ".jsonl" in path.name
        for number, raw in read_lines(path):
            if limit and count >= limit:
                return
            count += 1
            if is_jsonl:
                try:
                    text = json.loads(raw)[field]
                except (ValueError, KeyError, TypeError) as e:
                    raise ValueError(
                        f"{path}:{number} is no JSON object with a field {field!r}; see --field"
                    ) from e
            else:
                text = raw.decode("utf-8", errors="replace")
            yield from text.splitlines()


def parser() -> cli.Parser:
    """The flags of the command."""
    parser = cli.Parser("tokenizer", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train a SentencePiece model")
    command.add_argument(
        "--input", required=True, help="text or .jsonl files, a path or a glob (.gz .xz .bz2 too)"
    )
    command.add_argument(
        "--field", default="text", help="the field to read of .jsonl files (default: text)"
    )
    command.add_argument("--vocab_size", type=int, default=4096, help="ids of the new tokenizer")
    command.add_argument("--out", default="tokenizer", help="folder for tokenizer.model")
    command.add_argument(
        "--limit", type=int, default=0, help="lines of the input files to read (0: all)"
    )
    return parser


def main(args: argparse.Namespace):
    """Does what the flags say."""
    tokenizer = train(_texts(args.input, args.field, args.limit), args.out, args.vocab_size)
    print(f"{args.out}/{FILES[1]}: {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint}")


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
