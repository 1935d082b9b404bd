"""Reading globs and compressed lines; writing a file or a folder whole or not at all; module:function."""

import bz2
import contextlib
import glob
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Iterator, Sequence

from etils import epath

_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def expand(pattern: str) -> list[epath.Path]:
    """Files that a path or glob names, sorted; FileNotFoundError if there are none."""
    if "://" in pattern:
        parts = pattern.split("/")
        first = next((k for k, part in enumerate(parts) if glob.has_magic(part)), None)
        found = (
            [pattern]
            if first is None
            else epath.Path("/".join(parts[:first])).glob("/".join(parts[first:]))
        )
    else:
        # A file may have brackets in its name.
        pattern = os.path.expanduser(pattern)
        found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = sorted(path for path in map(epath.Path, found) if path.is_file())
    if not files:
        raise FileNotFoundError(f"no file matches {pattern!r}; give an existing path or glob")
    return files


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a file, plain or .gz, .xz or .bz2; ValueError if it cannot be decompressed."""
    path = epath.Path(path)
    number = 0
    try:
        with path.open("rb") as raw:
            binary = _OPENERS[path.suffix](raw) if path.suffix in _OPENERS else raw
            for number, line in enumerate(binary, 1):
                yield number, line
    except (EOFError, OSError, lzma.LZMAError) as e:
        raise ValueError(
            f"{path} cannot be read past line {number} ({e}); is the file complete?"
        ) from e


def local(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path).expanduser()
    if "://" in str(path):
        raise ValueError(
            f"{path}: safetensors are read and written on a local disk only; copy the folder there"
        )
    return path


@contextlib.contextmanager
def new_folder(directory: epath.Path):
    """A folder to write in that becomes `directory` when the block ends well; refuses to overwrite content."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; remove it or give another folder")
    if "://" in str(
        directory
    ):  # a bucket cannot rename; there it is the checkpoint that commits as a whole
        yield directory
        return
    directory = directory.absolute()
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_jsonl(path: str, records: Sequence[dict]) -> None:
    """Writes JSON lines, compressed if the name ends in .gz; the file appears complete or not at all."""
    out = epath.Path(path).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(gzip.compress(content, mtime=0) if out.suffix == ".gz" else content)
    partial.replace(out)
