"""The source jsonl:PATH_OR_GLOB, plain or compressed (.gz, .xz, .bz2)."""

from collections.abc import Iterator

from llada_jax.data.sources.source import Source
from llada_jax.files import expand, read_lines


def _records(pattern: str) -> Iterator[tuple[str, bytes]]:
    for path in expand(pattern):
        yield from ((f"{path}:{number}", line) for number, line in read_lines(path) if line.strip())


def _identify(pattern: str, digest, limit: int) -> None:
    del limit  # hash whole files: to read a part of a compressed file is not much faster
    for path in expand(pattern):
        digest.update(f"file {path.suffix} ".encode())
        with path.open("rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)


JSONL = Source(_records, _identify)
