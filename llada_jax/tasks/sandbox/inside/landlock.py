"""Files by landlock, for machines that allow no namespaces (containers, as a rule).

Covers: a file can be opened, and a folder listed, only below the paths given; no file can be
written; other processes cannot be traced, nor their environment read. Does not cover: whether a
file exists, and its size and times, can still be seen. There is no folder to write to. Signals,
sockets and changes of a file's mode or owner are for `seccomp`. Linux 5.13.
"""

import os
import struct

from . import kernel

_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
_ALL = (1 << 13) - 1  # what the first version knows: every way to read, write, make and remove
_PATH_BENEATH = 1


def restrict(paths: list[str]) -> None:
    """Allows this process to read below the paths, and nothing else, for ever.

    Raises OSError where the kernel has no landlock.
    """
    attr = struct.pack("=Q", _ALL)
    rules = kernel.syscall("landlock_create_ruleset", attr, len(attr), 0)
    for path in paths:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
        rule = struct.pack("=Qi", allowed, beneath)
        kernel.syscall("landlock_add_rule", rules, _PATH_BENEATH, rule, 0)
        os.close(beneath)
    kernel.syscall("landlock_restrict_self", rules, 0)
    os.close(rules)
