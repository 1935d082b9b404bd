"""The sandbox against programs that attack it, and the filter of system calls by a second route.

Every attack runs in the strongest protection that works here, and in the slow tests in all of them.
"""

import concurrent.futures
import os
import pathlib
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import pytest
from helpers import ROOT

from llada_jax.tasks import sandbox
from llada_jax.tasks.sandbox import bubblewrap, choice, execute
from llada_jax.tasks.sandbox.inside import harness, seccomp

MEMORY = 1 << 29
SECRET = "a secret of the parent"


STRONGEST = "the strongest"


def works(name):
    return not choice._why_not(name)


@pytest.fixture(
    params=[
        STRONGEST,
        *(pytest.param(name, marks=pytest.mark.slow) for name in sandbox.PROTECTIONS),
    ]
)
def protected(request):
    """Runs a program in one protection."""
    name = sandbox.protection() if request.param == STRONGEST else request.param
    if name == "none" or not works(name):
        pytest.skip(f"{request.param}: {choice._reasons()}")

    def run(program, tests="", timeout=10.0, cut=False):
        source = textwrap.dedent(program)
        return execute.execute(*(name, source, tests), timeout=timeout, memory=MEMORY, cut=cut)

    run.name = name
    return run


def strays():
    """Processes of the users that programs run as."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/status"):
        try:
            uid = int(re.search(r"^Uid:\s+(\d+)", path.read_text(), re.MULTILINE)[1])
        except (OSError, TypeError):
            continue
        if any(uid in uids for uids in execute._UIDS):
            found.append(path.parent.name)
    return found


def assert_nothing_stays():
    deadline = time.monotonic() + 5
    while strays() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not strays()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users")


# A verdict


def test_a_right_program_passes_and_a_wrong_one_fails(protected):
    right = protected("def f(x):\n    print('seen')\n    return x + 1", "assert f(1) == 2")
    assert right == sandbox.Result("passed", "", "seen\n", protected.name)
    wrong = protected("def f(x):\n    return x", "assert f(1) == 2, 'one more'")
    assert (wrong.status, wrong.message) == ("failed", "AssertionError: one more")
    assert right.passed and not wrong.passed


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os._exit(0)", "ended"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("def f():\n    raise SystemExit", "SystemExit"),
        ("def f():\n    import os; os._exit(0)", "ended"),
        ("print('passed'); import os; os._exit(0)", "ended"),
        # Whatever the harness could look up by name.
        ("import builtins; builtins.exec = lambda *a: None", "AssertionError"),
        ("import builtins; builtins.compile = lambda *a, **k: 0", "AssertionError"),
        ("import builtins; builtins.AssertionError = builtins.BaseException = int", "ended"),
        ("import os; os.read = os.write = lambda *a: b'passed'", "AssertionError"),
        ("import atexit, os; atexit.register(os._exit, 0)", "AssertionError"),
        ("f = check = assert_ = lambda *a: True", "AssertionError"),
        # A mark of success in every pipe, then the end.
        (
            "import os\nfor fd in range(256):\n    try: os.write(fd, b'ready\\n' + b'0' * 32)\n"
            "    except OSError: pass\nos._exit(0)",
            "ended",
        ),
        ("import os; os.closerange(0, 256)", "ended"),
        ("import threading, os, time\ndef end():\n    os._exit(0)\n"
         "def f():\n    threading.Thread(target=end).start(); time.sleep(9)", "ended"),
        ("import sys; sys.settrace(lambda *a: sys.exit(0))", "SystemExit"),
    ],
)  # fmt: skip
def test_success_cannot_be_faked_by_an_early_end(program, said):
    tests = "f()\nassert False" if "def f" in program else "assert False"
    result = choice.run(program, tests, timeout=10, memory=MEMORY)
    assert result.status in ("failed", "ended")
    assert said == result.status or result.message.startswith(said)


def test_the_token_is_not_in_the_job():
    assert harness.write_job("a", "b") == b"%12d%12dab" % (1, 1)


def test_a_program_reads_an_empty_input(protected):
    result = protected("try:\n    input()\nexcept EOFError:\n    x = 1", "assert x == 1")
    assert result.passed


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("x = 1\0", "null byte"),
        ("def f(:", "SyntaxError"),
        ("x = '\ud800'", "surrogates not allowed"),
        ("(" * 100_000, "too many nested parentheses|MemoryError"),
        ("-" * 1_000_000 + "1", "RecursionError|MemoryError|too many"),
    ],
)
def test_text_that_is_no_program_fails(program, message):
    result = choice.run(program, timeout=10, memory=MEMORY, cut=True)
    assert result.status == "failed" and re.search(message, result.message), result


def test_a_source_of_ten_megabytes():
    lines = "# filler\n" * (10 * 2**20 // 9)
    assert choice.run(lines + "x = 1", "assert x == 1", timeout=20).passed
    deep = choice.run("x = 1\n" * (10 * 2**20 // 6), timeout=1, memory=MEMORY)
    assert deep.status in ("failed", "timeout") and not deep.passed


@pytest.mark.parametrize(
    ("program", "left"),
    [
        ("x = 1\nThis is prose.\nx = 2", "x = 1"),
        ("x = 1\ny = (2,\nz = 3\n", "x = 1"),
        ("def f():\n    return 1\n\ndef g():\n    return (", "def f():\n    return 1\n"),
        ('x = 1\ny = """open\n text', "x = 1"),
        ("x = 1\nif x:\n", "x = 1"),
    ],
)
def test_cut_drops_the_end_that_does_not_parse(program, left):
    assert harness._parsed(program, "", True).co_code == harness._parsed(left, "", False).co_code
    with pytest.raises(SyntaxError):
        harness._parsed(program, "", False)


def test_cut_leaves_no_empty_program():
    with pytest.raises(SyntaxError, match="invalid syntax"):
        harness._parsed("This is prose.\nAll of it.", "", True)


# Attacks


REFUSED = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb, old call": "import ctypes\nwhile True:\n"
    "    if ctypes.CDLL(None).vfork() < 0: raise PermissionError",
    "other program": "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "daemon": "import os\nif os.fork() == 0:\n    os.setsid()\n    os.fork()",
    "processes of the library": "import multiprocessing as m\n"
    "p = m.get_context('fork').Process(target=print); p.start()",
    "memory": "x = bytearray(10 << 30)",
    "memory, bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "memory in a file": "import os\nfd = os.memfd_create('x')",
    "threads": "import threading, time\nthreading.stack_size(1 << 16)\n"
    "while True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
    "shadow": "open('/etc/shadow')",
    "passwd": "open('/etc/passwd')",
    "environment of process 1": "open('/proc/1/environ').read()",
    "own memory as a file": "open('/proc/self/mem', 'r+b')",
    "devices of the system": "import os; os.listdir('/sys')",
    "library": "import os; open(os.__file__, 'a')",
    "library's folder": "import os; open(os.path.dirname(os.__file__) + '/new.py', 'w')",
    "mode": "import os; os.chmod(os.__file__, 0o777)",
    "owner": "import os; os.chown(os.__file__, 0, 0)",
    "link to the library": "import os; os.symlink(os.__file__, 'x'); open('x', 'a')",
    "hard link": "import os; os.link(os.__file__, '/tmp/x')",
    "internet": "import socket; socket.create_connection(('127.0.0.1', 22), 1)",
    "datagrams": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "netlink": "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "pair that can be sent elsewhere": "import socket\n"
    "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "signal by a file": "import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, 1)",
    "signal to all": "import os; os.kill(-1, 9)",
    "signal to the group": "import os; os.kill(0, 9)",
    "pidfd": "import os, signal; signal.pidfd_send_signal(os.pidfd_open(os.getppid() or 1), 9)",
    "root": "import os; os.setuid(0)",
    "root, fully": "import os; os.setresuid(0, 0, 0)",
    "session": "import os; os.setsid()",
    "limits": "import resource\n"
    "resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)",
    "limits of others": "import os, resource\n"
    "resource.prlimit(os.getppid() or 1, resource.RLIMIT_CPU, (0, 0))",
    "priority": "import os; os.setpriority(os.PRIO_PROCESS, 0, -5)",
    "large file": "open('x', 'wb').write(bytes(64 << 20))",
    "many files": "for k in range(10**6): open(f'x{k}', 'w').close()",
    "files that fill the disk": "for k in range(9): open(f'x{k}', 'wb').write(bytes(8 << 20))",
}  # fmt: skip


@pytest.mark.parametrize("attack", REFUSED)
def test_refused(protected, attack):
    before = len(os.listdir(tempfile.gettempdir()))
    result = protected(REFUSED[attack], timeout=5)
    # The kernel refuses, which Python says in an OSError, a MemoryError or the like.
    assert result.status == "failed", result
    assert re.match(
        r"(Permission|FileNotFound|ProcessLookup|Memory|OS|BlockingIO)Error|"
        r"RuntimeError: can't start new thread|ValueError: not allowed to raise",
        result.message,
    ), result
    assert len(os.listdir(tempfile.gettempdir())) <= before + 1  # another test's, at most


_RAW = {  # x86-64 numbers
    "ptrace": 101, "execve": 59, "mount": 165, "unshare": 272, "setns": 308, "pivot_root": 155,
    "chroot": 161, "io_uring_setup": 425, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323,
    "memfd_create": 319, "memfd_secret": 447, "shmget": 29, "msgget": 68, "mq_open": 240,
    "add_key": 248, "keyctl": 250, "process_vm_readv": 310, "process_vm_writev": 311,
    "pidfd_open": 434, "pidfd_getfd": 438, "tkill": 200, "setpgid": 109, "personality": 135,
    "open_by_handle_at": 304, "name_to_handle_at": 303, "seccomp": 317, "landlock": 444,
    "setuid": 105, "capset": 126, "chmod": 90, "truncate": 76, "utimensat": 280, "setxattr": 188,
    "clone3": 435, "fork": 57, "openat2": 437, "sched_setaffinity": 203, "reboot": 169,
    "settimeofday": 164, "x32 getpid": 0x40000000 + 39, "connect": 42, "bind": 49, "sendmsg": 46,
}  # fmt: skip


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86-64")
def test_raw_system_calls_are_refused(protected):
    program = f"""
        import ctypes
        call = ctypes.CDLL(None, use_errno=True).syscall
        for name, number in {_RAW}.items():
            ctypes.set_errno(0)
            result = call(number, 0, 0, 0, 0, 0, 0)
            assert result == -1 and ctypes.get_errno() in (1, 38), (name, ctypes.get_errno())
        # prctl: the parent's death would no longer be this one's; a namespace of threads.
        assert call(157, 1, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1
        assert call(56, 0x10000000, 0, 0, 0, 0) == -1 and ctypes.get_errno() == 1
        """
    result = protected(program)
    assert result.passed, result


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86-64")
def test_system_calls_of_32_bits_end_the_process(protected):
    program = """
        import ctypes, mmap
        code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(bytes.fromhex("b814000000cd80c3"))  # getpid by int 0x80
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        print("at", flush=True)
        print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())
        """
    result = protected(program)
    assert (result.status, result.output) == ("ended", "at\n")


LOOPS = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(10**6)",
    "loop without signals": """
        import signal
        for s in range(1, 65):
            try: signal.signal(s, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
        """,
    "loop without exceptions": """
        while True:
            try:
                while True: pass
            except BaseException: pass
        """,
    "stopped": "import os, signal; signal.raise_signal(signal.SIGSTOP)\nwhile True: pass",
    "a thread that goes on": "import threading\ndef f():\n    while True: pass\n"
    "threading.Thread(target=f).start(); f()",
    "a number too large": "10 ** 10 ** 10",
    "prints for ever": "import os\nwhile True: os.write(1, b'x' * 65536)",
}  # fmt: skip


@pytest.mark.parametrize("attack", LOOPS)
def test_time_runs_out(protected, attack):
    start = time.monotonic()
    result = protected(LOOPS[attack], timeout=0.7)
    assert (result.status, result.message) == ("timeout", "not done after 0.7 s")
    assert time.monotonic() - start < 10
    assert len(result.output) <= execute.OUTPUT_BYTES
    assert_nothing_stays()


def test_a_gigabyte_of_output_does_not_stay_in_memory(protected):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = protected("import os\nfor _ in range(2**14): os.write(1, b'x' * 2**16)", timeout=60)
    assert result.passed and result.output == "x" * execute.OUTPUT_BYTES
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_files_outside_stay_as_they_are(protected, tmp_path):
    """The program may have files of these names of its own; these here must not change."""
    victim = tmp_path / "victim"
    victim.write_text(SECRET)
    repository = ROOT / "llada_jax" / "__init__.py"
    before = repository.read_bytes()
    names = [str(victim), str(repository), str(tmp_path / "new")]
    result = protected(f"""
        import os, shutil
        for name in {names!r}:
            for act in (
                lambda: print(open(name).read()),
                lambda: open(name, "w").write("x"),
                lambda: os.truncate(name, 0),
                lambda: os.unlink(name),
                lambda: os.rename(name, name + "2"),
                lambda: os.symlink("/", name),
                lambda: os.mkdir(name),
                lambda: os.utime(name, (0, 0)),
                lambda: shutil.rmtree(os.path.dirname(name), ignore_errors=True),
            ):
                try: act()
                except OSError: pass
        """)
    assert result.passed and SECRET not in result.output
    assert victim.read_text() == SECRET and victim.stat().st_mtime > 0
    assert repository.read_bytes() == before
    assert os.listdir(tmp_path) == ["victim"]


def test_the_environment_stays_a_secret(protected, monkeypatch):
    monkeypatch.setenv("LLADA_JAX_KEY", SECRET)
    parents = [os.getpid(), os.getppid()]
    result = protected(f"""
        import os
        print(os.environ)
        for pid in ["self", "1", "2", os.getpid(), os.getppid(), *{parents}]:
            for name in "environ", "cmdline", "maps", "mem", "root/etc/passwd", "cwd", "fd":
                try: print(open(f"/proc/{{pid}}/{{name}}", errors="replace").read())
                except OSError: pass
        """)
    assert result.passed and SECRET not in result.output and "LLADA" not in result.output


def test_open_files_of_the_parent_are_closed(protected, tmp_path):
    (tmp_path / "file").write_text(SECRET)
    with (tmp_path / "file").open() as f:
        os.set_inheritable(f.fileno(), True)
        result = protected("""
            import os
            for fd in range(3, 256):
                try: print(fd, os.pread(fd, 99, 0))
                except OSError: pass
            """)
    assert result.passed and SECRET not in result.output


def test_an_abstract_socket_of_the_parent_is_out_of_reach(protected):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0llada_jax_test")
        server.listen()
        server.settimeout(0.2)
        result = protected("""
            import socket
            a, b = socket.socketpair()
            try: a.connect("\\0llada_jax_test")
            except OSError: pass
            """)
        assert result.passed
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_parent_survives(protected):
    """This process and a sibling of the same user; signals that would end both."""
    sibling = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    got = []
    previous = signal.signal(signal.SIGTERM, lambda *a: got.append(a))
    try:
        pids = [os.getpid(), os.getppid(), sibling.pid, -os.getpgid(0), -sibling.pid]
        result = protected(f"""
            import os
            for pid in [*{pids}, os.getppid(), -1, 0]:
                for act in os.kill, os.killpg:
                    try: act(pid, 15)
                    except OSError: pass
            """)
        assert result.passed and sibling.poll() is None and not got
    finally:
        signal.signal(signal.SIGTERM, previous)
        sibling.kill()
        sibling.wait()


def test_what_honest_programs_use_works(protected):
    result = protected("""
        import asyncio, concurrent.futures, dataclasses, datetime, decimal, hashlib, heapq, json
        import multiprocessing, os, pickle, random, re, signal, sys, threading, time, typing
        @dataclasses.dataclass
        class Point:
            x: int
        class Name(typing.NamedTuple):
            y: int
        assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
        async def wait():
            await asyncio.sleep(0.01)
            return 1
        assert asyncio.run(wait()) == 1
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(len, ["a"] * 9)) == 9
        signal.signal(signal.SIGALRM, lambda *a: None)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        time.sleep(0.02)
        assert hashlib.md5(b"").hexdigest().startswith("d41d")
        assert os.urandom(3) and random.random() < 1 and datetime.datetime.now().year > 2000
        os.kill(os.getpid(), 0)
        sys.setrecursionlimit(5000)
        import numpy
        assert (numpy.ones((9, 9)) @ numpy.ones(9)).sum() == 81
        """)
    assert result.passed, result


def test_a_folder_of_its_own_ends_with_the_program(protected):
    if protected.name == "landlock":
        pytest.skip("landlock has no folder to write to")
    result = protected("open('note', 'w').write('x')", "assert open('/tmp/note').read() == 'x'")
    assert result.passed and not pathlib.Path("/tmp/note").exists()
    assert not protected("open('/tmp/note')").passed


@needs_root
def test_root_becomes_a_user_of_no_rights_another_each_time(protected):
    program = "import os\nprint(os.getresuid(), os.getresgid(), os.getgroups())"
    said = {protected(program).output for _ in range(4)}
    assert len(said) == 4
    for line in said:
        users, groups, others = re.fullmatch(r"(\(.*\)) (\(.*\)) (\[.*\])\n", line).groups()
        assert users == groups and others == "[]"
        assert len(set(users.strip("()").split(", "))) == 1 and "(0," not in users


def test_many_at_once(protected):
    """Each gets its own output and verdict, and none stays."""

    def one(k):
        return protected(f"import time; time.sleep(0.02); print({k})", f"assert {k} % 3")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(24)))
    assert [r.output for r in results] == [f"{k}\n" for k in range(24)]
    assert [r.passed for r in results] == [bool(k % 3) for k in range(24)]
    assert_nothing_stays()
    assert threading.active_count() < 8 + 4


# Which protection


def test_without_protection_nothing_runs_unless_unsafe(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "PROTECTIONS", ())
    mark = tmp_path / "mark"
    program = f"open({str(mark)!r}, 'w').close()"
    with pytest.raises(ValueError, match=r"^generated code is not run without .*--unsafe"):
        sandbox.run(program, timeout=5)
    assert sandbox.protection() == "none" and not mark.exists()
    assert sandbox.run(program, timeout=5, unsafe=True) == sandbox.Result("passed", "", "", "none")
    assert mark.exists()


def test_unsafe_has_limits_and_a_folder_that_goes(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "PROTECTIONS", ())
    (tmp_path / "kept").write_text("x")
    made = sandbox.run(
        f"import os; os.symlink({str(tmp_path)!r}, 'link'); os.mkdir('a')\nprint(os.getcwd())\n"
        "open('a/b', 'w').close(); os.chmod('a', 0)",
        timeout=5,
        unsafe=True,
    )
    assert made.passed and not os.path.exists(made.output.strip())
    assert (tmp_path / "kept").exists()
    endless = "import os\nos.fork()\nwhile True: pass"
    late = sandbox.run(endless, timeout=0.5, unsafe=True)
    assert late.status == "timeout"
    assert "MemoryError" in sandbox.run("bytearray(9 << 30)", timeout=5, unsafe=True).message


def test_the_strongest_that_works_is_taken(monkeypatch):
    reasons = {"bubblewrap": "not here", "namespaces": "", "landlock": ""}
    monkeypatch.setattr(choice, "_why_not", reasons.get)
    assert sandbox.protection() == "namespaces"
    reasons["namespaces"] = "refused"
    assert sandbox.protection() == "landlock"
    reasons["landlock"] = "an old kernel"
    with pytest.raises(ValueError, match=r"\(not here; refused; an old kernel\)"):
        sandbox.run("", timeout=1)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("bubblewrap", "bwrap --unshare-pid --ro-bind / / true"),
        ("namespaces", "unshare --mount --pid --net --fork true"),
        ("namespaces", "unshare --user --map-current-user --mount --pid --net --fork true"),
    ],
)
def test_a_protection_works_where_the_kernel_and_its_tools_do(name, command):
    """Truth: the tools of others. A layer of ours that fails would only choose a weaker one."""
    words = command.split()
    if not shutil.which(words[0]) or subprocess.run(words, capture_output=True).returncode:
        pytest.skip(f"{command!r} does not work here")
    assert choice._why_not(name) == ""


def test_layers_that_others_would_cover_for(protected):
    """Read-only mounts hold for any user, and the process sees no other."""
    if protected.name == "landlock":
        pytest.skip("landlock has no mounts and processes of its own")
    result = protected("""
        import os
        for path in "/", os.__file__, "/usr/lib":
            flags = os.statvfs(path).f_flag
            assert flags & os.ST_RDONLY and flags & os.ST_NOSUID, path
        assert os.getpid() in (1, 2) and not os.path.exists("/proc/self")
        assert not {"proc", "sys"} & set(os.listdir("/")), os.listdir("/")
        assert os.listdir("/etc") in ([], ["ld.so.cache"]) and len(os.listdir("/dev")) == 4
        """)
    assert result.passed, result


def test_a_protection_with_a_hole_is_not_used():
    """The trial itself: without protection it must find every way out."""
    found = choice._why_not.__wrapped__("none")
    assert "could" in found
    # A filter that lets sockets through.
    probe = choice._PROBE.format(secret="/nowhere/secret", parent=1, memory=MEMORY)
    result = execute.execute("none", probe, "", timeout=10, memory=MEMORY, cut=False)
    assert re.search("open sockets, start processes", result.message)


def test_a_sandbox_that_cannot_start_is_no_failure_of_the_program(monkeypatch):
    monkeypatch.setattr(execute, "_START", "raise OSError('no space')")
    with pytest.raises(OSError, match="no space"):
        execute.execute("namespaces", "", "", timeout=1, memory=MEMORY, cut=False)


def test_arguments_of_bubblewrap(monkeypatch):
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: f"/opt/{name}")
    for uid, for_root in ((0, True), (1000, False)):
        monkeypatch.setattr(bubblewrap.os, "geteuid", lambda uid=uid: uid)
        words = bubblewrap.arguments(["/etc/ld.so.cache", "/home/x/python"], 1234)
        line = " ".join(words)
        assert words[0] == "/opt/bwrap" and words[-1] == "--"
        for wanted in (
            "--die-with-parent", "--unshare-pid", "--unshare-net", "--unshare-ipc",
            "--size 1234 --tmpfs /tmp", "--ro-bind /home/x/python /home/x/python",
            "--perms 0755 --dir /home --perms 0755 --dir /home/x", "--remount-ro /",
        ):  # fmt: skip
            assert wanted in line
        assert ("--cap-add CAP_SETUID" in line) == for_root and "--cap-drop ALL" in line
        # Nothing can be written but /tmp and four devices, and nothing else is shown.
        assert "--bind" not in words and words.count("--dev-bind") == 4
        assert words.count("--ro-bind") == 2 and "--proc" not in words
        assert words.index("--tmpfs") < words.index("--ro-bind")


def test_bubblewrap_is_not_installed(monkeypatch):
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda name: None)
    with pytest.raises(OSError, match="bwrap is not installed"):
        bubblewrap.arguments([], 1)


def test_users_of_a_small_container(monkeypatch, tmp_path):
    def users(table):
        (tmp_path / "map").write_text(table)
        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", lambda *a, f=open: f(tmp_path / "map"))
            return {execute._unused_uid() for _ in range(50)}

    assert all(uid in execute._UIDS[0] for uid in users("0 0 4294967295\n"))
    assert all(uid in execute._UIDS[1] for uid in users("0 1000 1\n1 100000 65536\n"))
    assert users("0 1000 1\n") == {65534}


# The filter, by an interpreter of its instructions


def decide(program, arch, number, *arguments):
    """Runs a filter as the kernel does: one accumulator, 32 bits."""
    words = {0: number, 4: arch}
    for k, argument in enumerate(arguments):
        words[16 + 8 * k] = argument & 0xFFFFFFFF
    accumulator, at = 0, 0
    while True:
        code, true, false, value = program[at]
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            accumulator = words.get(value, 0)
        else:
            holds = accumulator == value if code == 0x15 else bool(accumulator & value)
            at += true if holds else false


HEADERS = {
    "x86_64": ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"__NR_(\w+)\s+(\d+)"),
    "aarch64": ("/usr/include/asm-generic/unistd.h", r"__NR(?:3264)?_(\w+)\s+(\d+)"),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_of_system_calls(machine):
    """Truth: the kernel's headers."""
    path, pattern = HEADERS[machine]
    if not os.path.exists(path):
        pytest.skip(f"{path} is not installed")
    text = pathlib.Path(path).read_text()
    truth = {name: int(number) for name, number in re.findall(f"#define {pattern}", text)}
    truth["newfstatat"] = truth.get("newfstatat", truth.get("fstatat"))
    table = seccomp._PLAIN + seccomp._WRITES + seccomp._CHECKED
    found = seccomp.numbers(table, machine)
    assert found == {name: truth[name] for name in found}


@pytest.mark.parametrize("machine", HEADERS)
@pytest.mark.parametrize("writable", [True, False])
def test_the_filter_decides_as_it_says(machine, writable):
    program = seccomp.program(machine, 77, writable)
    arch = seccomp._AUDIT[machine]
    number = seccomp.numbers(seccomp._PLAIN + seccomp._WRITES + seccomp._CHECKED, machine)

    def said(name, *arguments):
        return decide(program, arch, number[name], *arguments)

    allow, refuse, absent = seccomp.ALLOW, seccomp.REFUSE, seccomp.ABSENT
    plain = seccomp.numbers(seccomp._PLAIN, machine)
    assert all(said(name) == allow for name in plain)
    writes = seccomp.numbers(seccomp._WRITES, machine)
    assert all(said(name) == (allow if writable else refuse) for name in writes)
    known = set(number.values())
    assert all(decide(program, arch, n) == refuse for n in range(1000) if n not in known)
    assert decide(program, 0x40000003, 39) == 0x80000000  # of 32 bits: killed
    assert decide(program, arch, 0x40000000 + number["read"]) == refuse
    assert said("kill", 77) == said("tgkill", 77) == said("prlimit64", 0) == allow
    for other in (0, 1, -1, 78, -77):
        assert said("kill", other) == said("tgkill", other) == refuse
    assert said("prlimit64", 1) == refuse
    assert said("clone", 0x3D0F00) == allow  # a thread, as the C library makes it
    assert said("clone", 0x1200011) == said("clone", 0x4111) == refuse  # fork, vfork
    assert said("clone3") == said("openat2") == absent
    assert said("openat", 0, 0, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY) == allow
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_TMPFILE | os.O_RDWR):
        assert said("openat", 0, 0, flags) == (allow if writable else refuse)
    assert said("socketpair", 1, 1 | os.O_CLOEXEC) == allow
    assert said("socketpair", 1, 2) == said("socketpair", 2, 1) == refuse
    assert said("fcntl", 0, 4) == allow and said("fcntl", 0, 8) == refuse  # F_SETFL, F_SETOWN
    assert said("ioctl", 0, 0x5401) == allow and said("ioctl", 0, 0x5412) == refuse  # TIOCSTI
    assert said("prctl", 15) == allow and said("prctl", 1) == refuse


# Other users, and the parent's death


ALONE = """
import os, sys
sys.path.insert(0, {folder!r})
sys.dont_write_bytecode = True
from llada_jax.tasks.sandbox import choice, execute
for name in choice.PROTECTIONS:
    why = choice._why_not(name)
    print(name, why or execute.execute(
        name, "import os\\nprint(os.getuid())", "", timeout=10, memory=1 << 29, cut=False).output)
"""


@pytest.fixture
def alone(tmp_path_factory):
    """A copy of the sandbox that any user can read, and an interpreter that any can start."""
    python = pathlib.Path("/usr/bin/python3")
    if os.geteuid() != 0 or not python.exists():
        pytest.skip("needs root, and an interpreter for all users")
    version = subprocess.check_output(
        [python, "-c", "import sys; print(sys.version_info >= (3, 11))"]
    )
    if version != b"True\n":
        pytest.skip("/usr/bin/python3 is older than 3.11")
    with tempfile.TemporaryDirectory() as folder:
        package = pathlib.Path(folder, "llada_jax", "tasks")
        subprocess.run(
            ["cp", "-r", ROOT / "llada_jax/tasks/sandbox", "-t", "."],
            check=True,
            cwd=_made(package),
        )
        for path in (package, package.parent):
            (path / "__init__.py").touch()
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        yield python, folder


def _made(path):
    path.mkdir(parents=True)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "prefix",
    [
        ["setpriv", "--reuid=4321", "--regid=4321", "--clear-groups"],
        ["setpriv", "--bounding-set=-sys_admin"],  # as the root of a container
    ],
)
def test_as_a_user_and_as_the_root_of_a_container(alone, prefix):
    if not works("namespaces") or not works("landlock"):
        pytest.skip("this kernel has not both")
    python, folder = alone
    program = ALONE.format(folder=folder)
    said = subprocess.run(
        [*prefix, python, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    users = re.findall(r"^(\w+) (\d+)$", said, re.MULTILINE)
    assert {"namespaces", "landlock"} <= {name for name, _ in users}, said
    # bwrap itself needs the right that root lacks in the second case.
    bubblewrap = works("bubblewrap") and "--reuid=4321" in prefix
    assert bubblewrap == ("bubblewrap" in {name for name, _ in users}), said
    assert all((uid == "4321") == ("--reuid=4321" in prefix) and uid != "0" for _, uid in users)


@pytest.mark.slow
@needs_root
def test_the_program_dies_with_its_parent(alone, protected):
    python, folder = alone
    program = (
        f"import sys; sys.path.insert(0, {folder!r})\n"
        "from llada_jax.tasks.sandbox import execute\n"
        f"execute.execute({protected.name!r}, 'import time; time.sleep(99)', '', timeout=60,"
        " memory=1 << 29, cut=False)"
    )
    with subprocess.Popen([python, "-c", program]) as parent:
        deadline = time.monotonic() + 20
        while not strays() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert strays()
        parent.kill()
    assert_nothing_stays()
