"""The command line of bubblewrap (`bwrap`, 0.6 or later, not installed setuid).

Covers what `inside.namespaces` covers, by a program that is well tried: files, processes, network,
memory and queues of System V, the host's name. The command that it runs adds limits, seccomp and,
for root, another user.
"""

import os
import pathlib
import shutil
from collections.abc import Sequence

from llada_jax.tasks.sandbox.inside.namespaces import DEVICES, TMP

# What the inside needs to limit the files of /tmp, and to become another user; it gives them up.
_RIGHTS = ("CAP_SYS_ADMIN",)
_RIGHTS_OF_ROOT = (*_RIGHTS, "CAP_SETUID", "CAP_SETGID")


def arguments(paths: Sequence[str], tmp_bytes: int) -> list[str]:
    """The words before the command that is to be protected.

    Args:
        paths: what of the file system is shown, read-only; links are shown as links.
        tmp_bytes: size of /tmp.

    Raises OSError if bwrap is not installed.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise OSError("bwrap is not installed")
    words = [program, "--die-with-parent"]
    # --unshare-all would make a namespace of users for root as well, and the limit on processes
    # does not hold for root's own number there.
    words += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    words += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
    for right in _RIGHTS_OF_ROOT if os.geteuid() == 0 else _RIGHTS:
        words += ["--cap-add", right]
    words += ["--perms", "1777", "--size", str(tmp_bytes), "--tmpfs", TMP]
    # bwrap makes the folders above a path for its own user only, if they are not made before.
    above = {str(folder) for path in (*paths, *DEVICES) for folder in pathlib.Path(path).parents}
    for folder in sorted(above - {"/", TMP}):
        words += ["--perms", "0755", "--dir", folder]
    for path in paths:
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        else:
            words += ["--ro-bind", path, path]
    for device in DEVICES:
        words += ["--dev-bind", device, device]
    return [*words, "--remount-ro", "/", "--chdir", TMP, "--"]
