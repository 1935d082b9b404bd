"""Files of JSON lines that grow while a command runs, and that a later run continues."""

import json
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from llada_jax.files import is_remote, write_whole


def folder(out: str) -> pathlib.Path:
    """Makes and returns a local folder. Raises ValueError for an object store."""
    if is_remote(out):
        raise ValueError(f"--out={out}: lines are appended, so it must be a local folder")
    path = pathlib.Path(out).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def read(path: pathlib.Path, repair: bool = True) -> list[dict]:
    """The lines of a file, [] if there is none. What follows the last whole line is cut off.

    repair: also cut it off the file. Raises ValueError if a whole line is no JSON object.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            lines.append(None)
        if not isinstance(lines[-1], dict):
            raise ValueError(f"{path}:{number} is no line of this command: give another --out")
    if repair and whole != content:
        os.truncate(path, len(whole))
    return lines


def append(path: pathlib.Path, line: dict) -> None:
    """Appends a line to a file."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file for people too, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def check_same(path: pathlib.Path, about: dict[str, Any]) -> None:
    """Writes what a folder's lines depend on, or compares it with what an earlier run wrote.

    Raises ValueError with the differences.
    """
    if not path.exists():
        write_json(path, about)
        return
    try:
        was = json.loads(path.read_text())
        differ = [name for name in {**was, **about} if was.get(name) != about.get(name)]
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is no file of this command: give another --out") from None
    if differ:
        then, now = ({name: x.get(name) for name in differ} for x in (was, about))
        raise ValueError(f"{path} is of {then}, not of {now}: give another --out")


class Parts:
    """The lines of one task, written by several hosts, each into a file of its own.

    All hosts see the same folder. The lines of all earlier files are known, and `merge` joins the
    files. index, count: number of this host, and of all.
    """

    def __init__(self, directory: pathlib.Path, name: str, index: int = 0, count: int = 1):
        self._whole = directory / f"{name}.responses.jsonl"
        self._pattern = f"{name}.responses.*-of-*.jsonl"
        self._own = self._whole
        if count > 1:
            self._own = directory / f"{name}.responses.{index}-of-{count}.jsonl"
        self._index = index

    def read(self) -> list[dict]:
        """All lines there are; a line that this host did not finish is cut off."""
        return [line for path in self._files() for line in read(path, path == self._own)]

    def append(self, line: dict) -> None:
        """Adds a line."""
        append(self._own, line)

    def merge(self, key: Callable[[dict], Any]) -> list[dict]:
        """Writes all lines in the order of their keys into one file; returns them.

        Of several lines with one key the first stays. Only one host may call it, after all others
        are done.
        """
        lines: dict[Any, dict] = {}
        for line in self.read():
            lines.setdefault(key(line), line)
        ordered = [lines[k] for k in sorted(lines)]
        write_whole(self._whole, "".join(json.dumps(line) + "\n" for line in ordered))
        for path in self._files():
            if path != self._whole:
                path.unlink()
        return ordered

    def _files(self) -> Iterable[pathlib.Path]:
        return [self._whole, *sorted(self._whole.parent.glob(self._pattern))]
