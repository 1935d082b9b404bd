"""Calls of the Linux kernel that the standard library does not have."""

import ctypes
import os

_LIBC = ctypes.CDLL(None, use_errno=True)
_NUMBERS = {  # of x86-64 and arm64
    "pivot_root": (155, 41),
    "capget": (125, 90),
    "capset": (126, 91),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}
MACHINES = ("x86_64", "aarch64")

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38


def call(name: str, *arguments: int | bytes) -> int:
    """Calls a function of the C library. Raises OSError, which names it, if it fails."""
    return _checked(name, getattr(_LIBC, name), arguments)


def syscall(name: str, *arguments: int | bytes | ctypes.Array) -> int:
    """Makes a system call. Raises OSError, which names it, if it fails or is not known here."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"{name}: the number of this system call on {machine} is not known")
    number = _NUMBERS[name][MACHINES.index(machine)]
    return _checked(name, _LIBC.syscall, (number, *arguments))


def prctl(option: int, value: int, pointer: bytes | int = 0) -> None:
    """Sets an attribute of this process. Raises OSError if the kernel refuses."""
    call("prctl", option, value, pointer, 0, 0)


def _checked(name, function, arguments):
    # A Python int would be passed as a C int, which cuts flags and addresses of 64 bits.
    longs = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = function(*longs)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
