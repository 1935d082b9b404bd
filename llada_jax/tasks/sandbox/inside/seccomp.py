"""A filter of system calls, by seccomp: a list of what a Python program needs, and no other call.

Covers: no new process (so no daemon, no other program), no socket but an anonymous pair, no signal
to another process, no tracing, no mount, no namespace, no change of users, limits of others, modes
or owners of files, no memory that the limits do not count (memfd, System V), no io_uring, bpf,
keyring and so on. Threads are allowed. Without a private root (`writable` False) no file can be
opened for writing, made, renamed or removed. Does not cover: which files may be read.
Known for x86-64 and arm64; numbers from the kernel's headers.
"""

import ctypes
import os
import struct

from . import kernel
from .kernel import MACHINES

_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name:number on x86-64:number on arm64; an empty number where an architecture lacks the call.
_PLAIN = """
read:0:63 write:1:64 close:3:57 stat:4: fstat:5:80 lstat:6: poll:7: lseek:8:62 pread64:17:67
pwrite64:18:68 readv:19:65 writev:20:66 access:21: pipe:22: select:23: dup:32:23 dup2:33:
sendto:44:206 recvfrom:45:207 shutdown:48:210 getsockname:51:204 getpeername:52:205
getsockopt:55:209 flock:73:32 fsync:74:82 fdatasync:75:83 getcwd:79:17 chdir:80:49 fchdir:81:50
readlink:89: umask:95:166 statfs:137:43 fstatfs:138:44 epoll_create:213: getdents64:217:61
fadvise64:221:223 epoll_wait:232: epoll_ctl:233:21 newfstatat:262:79 readlinkat:267:78
faccessat:269:48 pselect6:270:72 ppoll:271:73 epoll_pwait:281:22 eventfd2:290:19
epoll_create1:291:20 dup3:292:24 pipe2:293:59 statx:332:291 close_range:436:436
faccessat2:439:439 epoll_pwait2:441:441
mmap:9:222 mprotect:10:226 munmap:11:215 brk:12:214 mremap:25:216 msync:26:227 mincore:27:232
madvise:28:233
sched_yield:24:124 getpid:39:172 exit:60:93 wait4:61:260 uname:63:160 getrlimit:97:163
getrusage:98:165 sysinfo:99:179 times:100:153 getuid:102:174 getgid:104:176 geteuid:107:175
getegid:108:177 getppid:110:173 getpgrp:111: getgroups:115:158 getresuid:118:148
getresgid:120:150 getpgid:121:155 getsid:124:156 sched_getparam:143:121
sched_getscheduler:145:120 sched_get_priority_max:146:125 sched_get_priority_min:147:126
arch_prctl:158: gettid:186:178 futex:202:98 sched_getaffinity:204:123 set_tid_address:218:96
exit_group:231:94 waitid:247:95 set_robust_list:273:99 get_robust_list:274:100 getcpu:309:168
getrandom:318:278 membarrier:324:283 rseq:334:293 futex_waitv:449:449
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 pause:34: getitimer:36:102
alarm:37: setitimer:38:103 rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigsuspend:130:133
sigaltstack:131:132 restart_syscall:219:128 signalfd4:289:74
nanosleep:35:101 gettimeofday:96:169 time:201: clock_gettime:228:113 clock_getres:229:114
clock_nanosleep:230:115 timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87
"""
_WRITES = """
ftruncate:77:46 rename:82: mkdir:83: rmdir:84: link:86: unlink:87: symlink:88: mkdirat:258:34
unlinkat:263:35 renameat:264:38 linkat:265:37 symlinkat:266:36 fallocate:285:47
renameat2:316:276
"""
# Calls that depend on an argument, or that must fail as on an old kernel.
_CHECKED = """
open:2: ioctl:16:29 socketpair:53:199 clone:56:220 kill:62:129 fcntl:72:25 prctl:157:167
tgkill:234:131 openat:257:56 prlimit64:302:261 clone3:435:435 openat2:437:437
"""
_CLONE_THREAD = 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_STREAMS = [1 | os.O_CLOEXEC * a | os.O_NONBLOCK * b for a in (0, 1) for b in (0, 1)]

# Of <linux/filter.h>: load a word, jump if equal, jump if any bit is set, return.
_LOAD, _EQUAL, _ANY, _RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x50000, 0x80000000
REFUSE, ABSENT = _ERRNO | 1, _ERRNO | 38  # EPERM, ENOSYS

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, value


def install(writable: bool) -> None:
    """Puts the filter on this process, for ever. Raises OSError where it is not possible."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"seccomp: the system calls of {machine} are not known; has {MACHINES}")
    filter_ = program(machine, os.getpid(), writable)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in filter_))
    head = struct.pack("@HP", len(filter_), ctypes.addressof(code))
    kernel.prctl(kernel.PR_SET_SECCOMP, 2, head)


def program(machine: str, pid: int, writable: bool) -> list[Instruction]:
    """The filter for a process, as BPF instructions over the kernel's `seccomp_data`."""
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT[machine]), (_RETURN, 0, 0, _KILL)]
    code.append((_LOAD, 0, 0, 0))
    plain = numbers(_PLAIN, machine) | (numbers(_WRITES, machine) if writable else {})
    for number in plain.values():
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, ALLOW)]
    rules = _rules(pid, writable)
    for name, number in numbers(_CHECKED, machine).items():
        body = rules[name]
        code += [(_EQUAL, 0, len(body), number), *body]
    return [*code, (_RETURN, 0, 0, REFUSE)]


def numbers(table: str, machine: str) -> dict[str, int]:
    """The calls of a table that an architecture has, and their numbers."""
    rows = [row.split(":") for row in table.split()]
    column = 1 + MACHINES.index(machine)
    return {row[0]: int(row[column]) for row in rows if row[column]}


def _rules(pid: int, writable: bool) -> dict[str, list[Instruction]]:
    """What each call of _CHECKED must satisfy; every list ends with a return."""
    allow, refuse = (_RETURN, 0, 0, ALLOW), (_RETURN, 0, 0, REFUSE)
    absent = [(_RETURN, 0, 0, ABSENT)]
    own = [*_one_of(0, [pid]), allow]

    def opens(flags: int) -> list[Instruction]:
        return [allow] if writable else [_load(flags), (_ANY, 0, 1, _WRITING), refuse, allow]

    return {
        "open": opens(1),
        "openat": opens(2),
        "openat2": absent,  # its flags are in memory, which a filter cannot read
        # Threads only. clone3 hides its flags too; the C library then falls back on clone.
        "clone": [_load(0), (_ANY, 1, 0, _CLONE_THREAD), refuse, allow],
        "clone3": absent,
        "kill": own,
        "tgkill": own,
        "prlimit64": [*_one_of(0, [0]), allow],
        # The pair that an event loop wakes itself with: Unix streams, which cannot be sent
        # elsewhere.
        "socketpair": [*_one_of(0, [1]), *_one_of(1, _STREAMS), allow],
        # Names of threads.
        "prctl": [*_one_of(0, [15, 16]), allow],
        # Terminal? Bytes to read, window size, blocking, close on exec.
        "ioctl": [*_one_of(1, [0x5401, 0x541B, 0x5413, 0x5421, 0x5450, 0x5451]), allow],
        # Copies, flags, locks; not F_SETOWN, which sends signals.
        "fcntl": [*_one_of(1, [0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032]), allow],
    }


def _load(argument: int) -> Instruction:
    """Loads the lower 32 bits of an argument; the kernel reads no more of those used here."""
    return _LOAD, 0, 0, 16 + 8 * argument


def _one_of(argument: int, values: list[int]) -> list[Instruction]:
    """Refuses unless an argument has one of the values."""
    tests = [(_EQUAL, len(values) - k, 0, value) for k, value in enumerate(values)]
    return [_load(argument), *tests, (_RETURN, 0, 0, REFUSE)]
