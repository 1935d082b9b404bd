"""Which protection a program runs under: the strongest that works on this machine."""

import contextlib
import functools
import os
import tempfile

from llada_jax.tasks.sandbox.execute import Result, execute

# From the strongest on. Each has seccomp and limits besides, and another user for root.
PROTECTIONS = ("bubblewrap", "namespaces", "landlock")
MEMORY = 1 << 30
# A program that tries to break out and says what it could do. Its secret is a file outside.
_PROBE = """
import ctypes, os, random, socket, statistics, sys

def could(act, *arguments):
    try:
        act(*arguments)
    except (OSError, MemoryError):
        return False
    return True

secret, parent = {secret!r}, {parent}
broken = [
    name
    for name, act, *arguments in [
        ("read files", open, secret),
        ("read files", open, "/etc/passwd"),
        ("change modes of files", os.chmod, os.__file__, 0o644),
        ("write files", open, os.__file__, "a"),
        ("open sockets", socket.socket),
        ("start processes", os.fork),
        ("signal processes", os.kill, parent, 0),
        ("read the parent's environment", open, "/proc/%d/environ" % parent),
        ("use too much memory", bytearray, {memory} + 1),
        ("become root", os.setuid, 0),
    ]
    if could(act, *arguments)
]
# It may write such a file in a /tmp of its own; the parent looks at the other.
could(lambda: open(secret, "w").write("broken"))
if broken or os.geteuid() == 0:
    raise PermissionError("a program could " + ", ".join(broken or ["be root"]))
"""


def run(
    program: str,
    tests: str = "",
    *,
    timeout: int | float,
    memory: int = MEMORY,
    cut: bool = False,
    unsafe: bool = False,
) -> Result:
    """Runs a Python program, then its tests in the same module, in a process of its own.

    Args:
        program: source text; any text.
        tests: source text that raises an exception if the program is wrong.
        timeout: seconds on the clock from the start of the program.
        memory: bytes of address space.
        cut: whether a program that does not parse loses its end, from the last unindented line that
            is not after the error on, until it does.
        unsafe: whether it may run with limits of time and memory only where nothing protects.

    It may be called from many threads. Raises ValueError if nothing protects and `unsafe` is False,
    OSError if the sandbox cannot start.
    """
    name = protection()
    if name == "none" and not unsafe:
        raise ValueError(
            f"generated code is not run without protection ({_reasons()}); install bubblewrap, "
            "or give --unsafe on a machine that may be lost"
        )
    return execute(name, program, tests, timeout=timeout, memory=memory, cut=cut)


def protection() -> str:
    """The strongest protection that works here, by trial: a name of PROTECTIONS, or "none"."""
    return next((name for name in PROTECTIONS if not _why_not(name)), "none")


def _reasons() -> str:
    return "; ".join(map(_why_not, PROTECTIONS))


@functools.cache
def _why_not(name: str) -> str:
    """Why a protection does not work here, or ""; a program tries to break it."""
    with contextlib.ExitStack() as stack:
        secret = stack.enter_context(tempfile.NamedTemporaryFile(prefix="llada_jax_"))
        memory = 1 << 29
        probe = _PROBE.format(secret=secret.name, parent=os.getpid(), memory=memory)
        try:
            result = execute(name, probe, "", timeout=10, memory=memory, cut=False)
        except OSError as error:
            return str(error)
        written = os.path.getsize(secret.name)
    if written:
        return f"{name}: a program could write a file outside"
    return "" if result.passed else f"{name}: {result.message}"
