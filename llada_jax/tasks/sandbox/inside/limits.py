"""Limits of one process, and the loss of its privileges.

Covers: processor time, memory of the process, size and number of files, core dumps, threads; no
rights of root and no capability, and none to be had again. Does not cover: the memory of several
processes together (seccomp allows one), wall-clock time (the parent kills), the memory of files in
/tmp (that folder has its own size).
"""

import ctypes
import os
import resource
import signal
import struct

from . import kernel

FILES = 256  # open at a time
THREADS = 64
_DAC_READ_SEARCH = 1 << 2  # the capability to read any file
_CAPABILITY_VERSION_3 = 0x20080522


def limit(memory: int, seconds: int, file_bytes: int) -> None:
    """Sets the limits of this process: bytes of memory, seconds of processor time."""
    for name, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_NPROC, THREADS),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(name)[1]
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (allowed, allowed))


def become(uid: int) -> None:
    """Changes root to a user without rights, in a group of the same number and no other.

    The limit on threads and processes does not hold for root. A user who is not root stays.
    """
    if os.geteuid() != 0:
        return
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise OSError(error.errno, f"root may not become another user: {error.strerror}") from None


def become_reader(uid: int) -> None:
    """As `become`, but keeps the right to read any file, where root has it.

    The interpreter may lie in a folder that only root may enter. Landlock says what may be read.
    """
    kernel.prctl(kernel.PR_SET_KEEPCAPS, 1)
    become(uid)
    drop_capabilities(keep=_DAC_READ_SEARCH)


def drop_capabilities(keep: int = 0) -> None:
    """Gives up all capabilities but those of the bits `keep`, and every way to gain one."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    # Twice (effective, permitted, inheritable), for the lower and the upper 32 capabilities.
    held = ctypes.create_string_buffer(24)
    kernel.syscall("capget", header, held)
    kept = struct.unpack("=6I", held.raw)[1] & keep
    kernel.syscall("capset", header, struct.pack("=6I", kept, kept, 0, 0, 0, 0))
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
