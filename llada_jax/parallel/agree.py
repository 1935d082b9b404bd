"""Agreement between hosts: same settings, shared directories, work done once for each disk."""

import contextlib
import hashlib
import itertools
import os
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from llada_jax.files import write_whole

T = TypeVar("T")
_meetings = itertools.count()


def check_same(what: str, text: str):
    """Raises ValueError on all hosts if they do not all pass the same `text`.

    `what` names the text in the message. All hosts must call this.
    """
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


def meet():
    """Waits until all hosts call this, for up to a day.

    Between hosts without accelerators a collective waits for half a minute only.
    """
    name = f"llada_jax meeting {next(_meetings)}"
    multihost.get_barrier_sync_fn()(key=name, timeout_ms=24 * 3600 * 1000)


def from_first(message: bytes) -> bytes:
    """Returns the message of process 0 on all hosts. All must call this, however late."""
    if jax.process_count() == 1:
        return message
    meet()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    mine = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        mine[:] = np.frombuffer(message, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8))


def sharing(directory: epath.PathLike) -> list[int]:
    """Returns the processes that see the same files in a directory as this one does.

    Every process puts a file there and lists the files that it sees. All hosts must call this.
    """
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
    """Raises ValueError if some hosts do not see the same files in a directory."""
    seen = sharing(directory)
    if len(seen) < jax.process_count():
        raise ValueError(
            f"{directory} is not the same on all hosts (process {jax.process_index()} shares it"
            f" with {seen} of {jax.process_count()}):"
            " give one on a shared file system, or gs:// for a --workdir"
        )


def once_per_disk(directory: epath.PathLike, make: Callable[[], T]) -> T:
    """Returns `make()`, called first by one process for each disk that holds `directory`.

    The other processes of that disk wait, and then call `make()` too; it is quick, since it finds
    the files that the first call wrote. If the first call fails with ValueError or OSError, every
    process that waits for it raises ValueError with the same message.
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
    """Returns a new random name, the same on all processes."""
    mine = np.frombuffer(os.urandom(8), np.uint32)
    return "".join(f"{int(word):08x}" for word in multihost_utils.broadcast_one_to_all(mine))


def _wait(done: Callable[[], bool], seconds: float = float("inf")):
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.05)
