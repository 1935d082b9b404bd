"""A root folder of its own and private namespaces, without bubblewrap.

Covers: files (a new root with the interpreter and the system's libraries, read-only, four devices,
and a /tmp of limited size in memory, which ends with the process), processes (the program is the
first of its own process namespace and sees no other), network (no interface), System V memory and
queues, the host's name. There is no /proc, /sys, /home or /etc, and no checkout. Does not cover:
what a process may call or use up; that is for `seccomp` and `limits`.
"""

import os
import struct

from . import kernel, limits

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
TMP = "/tmp"
_OLD = "/.old"
_INODES = "nr_inodes=1024"  # files and folders of /tmp; each takes a kilobyte of the kernel's

_NEWNS = 0x20000
_NEWCGROUP = 0x2000000
_NEWUTS = 0x4000000
_NEWIPC = 0x8000000
_NEWUSER = 0x10000000
_NEWPID = 0x20000000
_NEWNET = 0x40000000
_SPACES = _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET

_RDONLY = 1
_NOSUID = 2
_NODEV = 4
_REMOUNT = 0x20
_BIND = 0x1000
_REC = 0x4000
_PRIVATE = 0x40000
_DETACH = 2
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000


def enter(paths: list[str], uid: int, tmp_bytes: int) -> None:
    """Returns in a new process, the first of its namespaces; the old one waits for its end.

    Args:
        paths: what of the file system is shown, read-only.
        uid: the user whom root becomes where only users may make namespaces.
        tmp_bytes: size of /tmp.

    Raises OSError if the kernel refuses.
    """
    _unshare(uid)
    _new_root(paths, tmp_bytes)
    limits.die_with_parent()  # only now: a change of users forgets it
    child = os.fork()
    if child:
        os.closerange(0, 3)  # the pipes to the parent are the child's
        os.waitpid(child, 0)
        os._exit(0)


def limit_files() -> None:
    """Limits the number of files in the /tmp that bubblewrap made, which cannot do so itself."""
    _mount("none", TMP, flags=_REMOUNT | _NOSUID | _NODEV, data=_INODES)


def _unshare(uid: int) -> None:
    if os.geteuid() == 0:
        try:
            kernel.call("unshare", _SPACES)
            return
        except PermissionError:  # the root of a container: try what any user may
            limits.become(uid)
            kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # or /proc/self would stay root's
    user, group = os.geteuid(), os.getegid()
    kernel.call("unshare", _SPACES | _NEWUSER)
    for name, content in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(content)


def _new_root(paths: list[str], tmp_bytes: int) -> None:
    _mount("none", "/", flags=_REC | _PRIVATE)
    # Made at /tmp, since that folder is everywhere. What is there can be shown all the same: it is
    # below the old root again as soon as both are exchanged.
    _mount("tmpfs", TMP, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=0755")
    os.mkdir(TMP + _OLD)
    kernel.syscall("pivot_root", os.fsencode(TMP), os.fsencode(TMP + _OLD))
    os.chdir("/")
    os.mkdir(TMP)
    options = f"size={tmp_bytes},{_INODES},mode=1777"
    _mount("tmpfs", TMP, "tmpfs", _NOSUID | _NODEV, options)  # first: paths may lie in it
    for path in paths:
        _show(path, _RDONLY | _NOSUID | _NODEV)
    for path in DEVICES:
        _show(path, _NOSUID)
    kernel.call("umount2", os.fsencode(_OLD), _DETACH)
    os.rmdir(_OLD)
    _mount("none", "/", flags=_REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(TMP)


def _show(path: str, attributes: int) -> None:
    """Shows a file, a folder or a link of the old root at the same place of the new one."""
    old = _OLD + path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
        return
    if os.path.isdir(old):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(old, path, flags=_BIND | _REC)
    # The attributes of a mount have the numbers of the flags, and hold for what is mounted below.
    attr = struct.pack("=4Q", attributes, 0, 0, 0)
    kernel.syscall("mount_setattr", _AT_FDCWD, os.fsencode(path), _AT_RECURSIVE, attr, len(attr))


def _mount(source: str, target: str, kind: str = "none", flags: int = 0, data: str = "") -> None:
    try:
        kernel.call("mount", *map(os.fsencode, (source, target, kind)), flags, data.encode())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({target})") from None
