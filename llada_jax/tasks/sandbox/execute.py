"""The parent's side: starts the inside of the sandbox, feeds it, listens, and kills it."""

import contextlib
import dataclasses
import functools
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time

from llada_jax.tasks.sandbox import bubblewrap
from llada_jax.tasks.sandbox.inside import harness

TMP_BYTES = 16 << 20
OUTPUT_BYTES = 8 << 10
_REPORT_BYTES = 4 << 10
_START_SECONDS = 60  # for the interpreter and the namespaces, on a machine that is busy
_END_SECONDS = 5
_PIECE = 1 << 16
_START = "import sys; sys.path.insert(0, sys.argv[1]); from inside import child; child.main()"
# The user whom root becomes: far above those of people and systems, or the range that systemd
# sets aside for such users, where a container has 65536 numbers.
_UIDS = (range(0x60000000, 0x70000000), range(61184, 65520))


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a program.

    status: "passed", "failed" (an exception; a test that fails is one), "timeout", or "ended" (the
        process ended before its tests had).
    message: the exception, or what else happened; "" if it passed.
    output: the first 8 KiB of what it wrote.
    protection: what was in force, a name of `protections.PROTECTIONS` or "none".
    """

    status: str
    message: str
    output: str
    protection: str

    @property
    def passed(self) -> bool:
        """Whether the program and all of its tests ran to their end."""
        return self.status == "passed"


def execute(
    protection: str, program: str, tests: str, *, timeout: int | float, memory: int, cut: bool
) -> Result:
    """Runs a program and its tests under a protection; see `choice.run`.

    Raises OSError if the protection cannot be had.
    """
    token = secrets.token_hex(harness.TOKEN // 2).encode()
    job = harness.write_job(program, tests) + token
    with contextlib.ExitStack() as stack:
        # Protected programs have a /tmp of their own, or none.
        home = "/"
        if protection == "none":
            home = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="llada_jax_", ignore_cleanup_errors=True)
            )
        child = subprocess.Popen(
            _command(protection, timeout, memory, cut),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=home,
            env=_environment(home if protection == "none" else "/tmp"),
            start_new_session=True,
        )
        with child:
            try:
                report, output, late = _converse(child, job, token, timeout)
            finally:
                _end(child, protection)
    if not report.startswith(harness.READY):
        lines = report.decode(errors="replace").split("\n")
        reason = next((line for line in reversed(lines) if line.strip()), "no answer")
        raise OSError(f"{protection}: {reason.strip()}")
    status, message = _verdict(report.removeprefix(harness.READY), token, late, timeout)
    return Result(status, message, output.decode(errors="replace"), protection)


def _end(child: subprocess.Popen, protection: str) -> None:
    """Kills the program, and whatever else is in its group."""
    if protection in ("bubblewrap", "namespaces"):
        # Only the first process of the namespace: the one outside then ends by itself, and takes
        # the dead one with it. Otherwise that would stay, in a container whose init does not look.
        for pid in _children(child.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_END_SECONDS)
            return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """The numbers of a process's children, none if it has ended."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            return [int(word) for word in f.read().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _verdict(report: bytes, token: bytes, late: bool, timeout: int | float) -> tuple[str, str]:
    if secrets.compare_digest(report, token):
        return "passed", ""
    if report.startswith(harness.FAILED):
        return "failed", report.removeprefix(harness.FAILED).decode(errors="replace")
    if late:
        return "timeout", f"not done after {timeout:g} s"
    return "ended", "the process ended before its tests had"


def _converse(
    child: subprocess.Popen, job: bytes, token: bytes, timeout: int | float
) -> tuple[bytes, bytes, bool]:
    """Sends the job; returns the report, the output's first part, and whether time ran out."""
    unsent, heard = memoryview(job), {child.stdout: b"", child.stderr: b""}
    kept = {child.stdout: OUTPUT_BYTES, child.stderr: _REPORT_BYTES}
    deadline, started = time.monotonic() + _START_SECONDS, False
    with selectors.DefaultSelector() as selector:
        for pipe, event in (
            (child.stdin, selectors.EVENT_WRITE),
            (child.stdout, selectors.EVENT_READ),
            (child.stderr, selectors.EVENT_READ),
        ):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, event)
        while child.stderr in selector.get_map() and heard[child.stderr] != harness.READY + token:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                return heard[child.stderr], heard[child.stdout], True
            for key, _ in ready:
                pipe = key.fileobj
                if pipe is child.stdin:
                    unsent = _send(pipe, unsent)
                    more = bool(unsent)
                else:
                    piece = os.read(pipe.fileno(), _PIECE)
                    heard[pipe] = (heard[pipe] + piece)[: kept[pipe]]
                    more = bool(piece)
                if not more:
                    selector.unregister(pipe)
            if not started and heard[child.stderr].startswith(harness.READY):
                deadline, started = time.monotonic() + timeout, True
    return heard[child.stderr], heard[child.stdout] + _rest(child.stdout), False


def _send(pipe, unsent: memoryview) -> memoryview:
    """Sends a part; returns what is left, nothing if the other end is closed."""
    try:
        return unsent[os.write(pipe.fileno(), unsent[:_PIECE]) :]
    except BrokenPipeError:
        return unsent[:0]


def _rest(pipe) -> bytes:
    """What a pipe holds at this moment."""
    try:
        return os.read(pipe.fileno(), OUTPUT_BYTES)
    except BlockingIOError:
        return b""


def _command(protection: str, timeout: int | float, memory: int, cut: bool) -> list[str]:
    folder, paths, packages = _file_system()
    outer = bubblewrap.arguments(paths, TMP_BYTES) if protection == "bubblewrap" else []
    seconds = math.ceil(timeout) + 1
    numbers = [_unused_uid(), memory, seconds, TMP_BYTES, int(cut)]
    return [
        *outer,
        *(os.path.realpath(sys.executable), "-s", "-S", "-P", "-c", _START),
        *(folder, protection, *map(str, numbers)),
        *map(os.pathsep.join, (paths, packages)),
    ]


def _environment(home: str) -> dict[str, str]:
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": home,
        "TMPDIR": home,
        "PYTHONUTF8": "1",
        "PYTHONHASHSEED": "0",  # the order of a set must not decide a test
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


@functools.cache
def _file_system() -> tuple[str, list[str], list[str]]:
    """The folder of the inside, the paths that a Python program needs, those that hold packages."""
    folder = os.path.dirname(os.path.realpath(__file__))
    packages = [os.path.realpath(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    packages = list(dict.fromkeys(packages))
    wanted = {
        *(os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)),
        *("/usr", "/lib", "/lib64", "/etc/ld.so.cache"),
        *(os.path.join(folder, "inside"), *packages),
    }
    there = sorted(path for path in wanted if os.path.exists(path))
    # A folder below one that is shown is shown already.
    tops = [p for p in there if not any(p.startswith(q + os.sep) for q in there)]
    return folder, tops, packages


def _unused_uid() -> int:
    """A number that no user has, another for each program: limits count the threads of a user."""
    with open("/proc/self/uid_map") as f:
        mapped = [tuple(map(int, line.split())) for line in f]
    for uids in _UIDS:
        if any(first <= uids[0] and uids[-1] < first + count for first, _, count in mapped):
            return uids[secrets.randbelow(len(uids))]
    return 65534  # nobody: the user has one number, and root of his own cannot become another
