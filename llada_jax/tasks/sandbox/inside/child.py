"""The first program of the sandbox: it takes its protection on, then runs what it is given.

Arguments: the folder of this package's parent, the protection, the user's number, bytes of memory,
seconds of processor time, bytes of /tmp, whether to cut the program's end, the paths to show, and
those of them that hold packages (both joined by colons).
"""

import os
import sys

from . import harness, landlock, limits, namespaces, seccomp


def main() -> None:
    """Enters the protection that the arguments name, and judges the job of the standard input."""
    folder, protection, *numbers, shown, packages = sys.argv[1:]
    uid, memory, seconds, tmp_bytes, cut = map(int, numbers)
    paths = shown.split(os.pathsep)
    if protection == "namespaces":
        namespaces.enter(paths, uid, tmp_bytes)
    if protection == "bubblewrap":
        namespaces.limit_files()
    limits.limit(memory, seconds, tmp_bytes)
    if protection == "landlock":
        limits.become_reader(uid)
        landlock.restrict([*paths, *namespaces.DEVICES])
    elif protection != "none":
        limits.become(uid)
        limits.drop_capabilities()
    limits.die_with_parent()
    if protection != "none":
        seccomp.install(writable=protection != "landlock")
    program, tests = harness.read_job()
    token, report = harness.hide_pipes()
    os.write(report, harness.READY)
    sys.argv = ["program"]
    sys.path.remove(folder)
    sys.path += packages.split(os.pathsep)
    harness.judge(program, tests, bool(cut), token, report)
