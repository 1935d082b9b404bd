"""Agreement between hosts about files and settings; one packing a disk."""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

T = TypeVar("T")


def check_same(what: str, text: str):
    """ValueError on all hosts where they do not give the same text."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    found = multihost_utils.process_allgather(mine)
    differ = [
        process for process in range(len(found)) if not np.array_equal(found[process], found[0])
    ]
    if differ:
        raise ValueError(
            f"{what} of processes {differ} differs from that of process 0: start all with the same"
        )


def sharing(directory: epath.PathLike) -> list[int]:
    """The processes that see the same files in a directory as this one, by each leaving a mark there."""
    if jax.process_count() == 1:
        return [0]
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    name = f".{_nonce()}.process"
    mark = directory / f"{name}{jax.process_index()}"
    mark.touch()
    multihost_utils.sync_global_devices("marks are there")
    found = sorted(int(path.name.removeprefix(name)) for path in directory.glob(f"{name}*"))
    multihost_utils.sync_global_devices("marks are seen")
    mark.unlink()
    return found


def check_shared(directory: epath.PathLike):
    """ValueError where not all hosts see the same files in a directory."""
    seen = sharing(directory)
    if len(seen) < jax.process_count():
        raise ValueError(
            f"{directory} is not the same on all hosts (process {jax.process_index()} shares it with {seen} of "
            f"{jax.process_count()}): give a --workdir on a shared file system or gs://"
        )


def once_per_disk(directory: epath.PathLike, make: Callable[[], T]) -> T:
    """`make()`, on one process of each disk first and, when it is done there, on the others, who find its files.

    An error on one disk is a ValueError on every process that waits there.
    """
    if jax.process_count() == 1:
        return make()
    first, *others = sharing(directory)
    directory, nonce = epath.Path(directory), _nonce()
    outcome, read = directory / f".{nonce}.outcome{first}", f".{nonce}.read"
    if jax.process_index() == first:
        error = "the process that prepares it was stopped"
        try:
            made = make()
            error = ""
            return made
        except (ValueError, OSError) as failure:
            error = str(failure)
            raise
        finally:
            if others:
                # Renamed when whole, so that nobody reads half of it.
                write_whole(outcome, error)
                _wait(lambda: len(list(directory.glob(f"{read}*"))) == len(others), seconds=60)
                for path in (outcome, *directory.glob(f"{read}*")):
                    with contextlib.suppress(FileNotFoundError):
                        path.unlink()
    _wait(outcome.exists)
    error = outcome.read_text()
    (directory / f"{read}{jax.process_index()}").touch()
    if error:
        raise ValueError(error)
    return make()


def _nonce() -> str:
    """The same new name on all processes."""
    mine = np.frombuffer(os.urandom(8), np.uint32)
    return "".join(f"{int(word):08x}" for word in multihost_utils.broadcast_one_to_all(mine))


def _wait(done: Callable[[], bool], seconds: float = float("inf")):
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.05)
