"""Reads globs and compressed files, writes files and folders atomically, loads module:function."""

import bz2
import contextlib
import glob
import gzip
import importlib
import json
import lzma
import os
import shutil
from collections.abc import Callable, Iterable, Iterator

from etils import epath

_OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def expand(pattern: str) -> list[epath.Path]:
    """Returns the files that a path or a glob names, sorted.

    Raises FileNotFoundError if there are none.
    """
    if "://" in pattern:
        parts = pattern.split("/")
        first = next((k for k, part in enumerate(parts) if glob.has_magic(part)), None)
        found = (
            [pattern]
            if first is None
            else epath.Path("/".join(parts[:first])).glob("/".join(parts[first:]))
        )
    else:
        # Try the plain path first: the name of a file may contain brackets.
        pattern = os.path.expanduser(pattern)
        found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = sorted(path for path in map(epath.Path, found) if path.is_file())
    if not files:
        raise FileNotFoundError(f"no file matches {pattern!r}; give an existing path or glob")
    return files


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, line) of a file, plain or compressed (.gz, .xz, .bz2).

    Line numbers count from 1. Raises ValueError if the file cannot be read to its end.
    """
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


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file atomically: it appears complete or not at all. Creates its folder.

    On a disk it writes a temporary file and renames it at the end. In an object store (a path with
    "://") a single write is atomic.
    """
    path = epath.Path(path).expanduser()
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())  # without it, a crash soon after could leave an empty file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_jsonl(path: str | os.PathLike, records: Iterable[dict]) -> None:
    """Writes records as JSON lines, atomically; compressed if the name ends in .gz."""
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    # mtime=0 leaves the time out of the gzip header, so that equal records give equal files.
    write_whole(path, gzip.compress(content, mtime=0) if str(path).endswith(".gz") else content)


@contextlib.contextmanager
def new_folder(directory: epath.Path):
    """Context that yields a folder to write in; it becomes `directory` if there is no error.

    In an object store the folder is `directory` itself. Raises ValueError if `directory` exists and
    is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not empty; remove it or give another folder")
    if is_remote(directory):
        # A bucket cannot rename a folder. The checkpoint in it is still written atomically.
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


def local(path: epath.PathLike) -> epath.Path:
    """Returns the path if it is on a local disk. Raises ValueError for an object store."""
    path = epath.Path(path).expanduser()
    if is_remote(path):
        raise ValueError(
            f"{path}: safetensors are read and written on a local disk only; copy the folder there"
        )
    return path


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in an object store such as gs://, which cannot append or rename."""
    return "://" in os.fspath(path)


def load_function(spec: str, what: str) -> Callable:
    """Returns the function that "module:function" names.

    Raises ValueError if there is no such function; the message begins with `what`.
    """
    module, _, name = spec.partition(":")
    if not module or not name:
        raise ValueError(f"{what} {spec!r} is not of the form module:function")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"{what} {spec!r}: {error}; it must be importable from here") from error
    if not callable(function):
        raise ValueError(f"{what} {spec!r}: the module {module} has no function {name}")
    return function
