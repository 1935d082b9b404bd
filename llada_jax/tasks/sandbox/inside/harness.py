"""Runs a program and its tests in this process, and proves to the parent that both have passed.

The proof is a random token. It waits in the pipe from the parent, and is read only after the last
test: a program that exits early, prints a mark of success or raises SystemExit cannot send it.
What this does not cover: program and tests share one interpreter, as in the official scripts, so a
program written against this very file can find the pipe and read the token. Tests can also be
fooled by their own operands, as by an `__eq__` that is always true; the official scripts agree.
"""

import os
import sys
import types

HEADER = 24  # two lengths, in 12 digits each
READY = b"ready\n"
FAILED = b"failed: "
TOKEN = 32
_MESSAGE = 500  # characters of an error


def read_job() -> tuple[str, str]:
    """Reads the program and the tests from the standard input, and not the token behind them."""
    header = _read_exactly(HEADER)
    parts = [_read_exactly(int(header[k : k + 12])) for k in (0, 12)]
    return tuple(part.decode("utf-8", "surrogatepass") for part in parts)


def write_job(program: str, tests: str) -> bytes:
    """The bytes that `read_job` reads."""
    parts = [text.encode("utf-8", "surrogatepass") for text in (program, tests)]
    return b"".join(b"%12d" % len(part) for part in parts) + b"".join(parts)


def _read_exactly(size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        piece = os.read(0, size - len(content))
        if not piece:
            raise EOFError("the parent sent half a job")
        content += piece
    return bytes(content)


def hide_pipes() -> tuple[int, int]:
    """Moves the pipes of the parent to random numbers; returns those of the token, the report.

    What the program reads is empty then, and what it writes goes to the output.
    """
    first, second = os.urandom(2)
    places = 64 + first % 64, 128 + second % 64
    for pipe, place in zip((0, 2), places, strict=True):
        os.dup2(pipe, place, inheritable=False)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(1, 2)
    return places


def judge(program: str, tests: str, cut: bool, token: int, report: int) -> None:
    """Runs the program, then the tests in its module, reports, and ends the process.

    What is used after the program began is bound here before: it may replace any name of a module.
    """
    execute, read, write, leave = exec, os.read, os.write, os._exit
    flush, failure, parsed = sys.stdout.flush, _failure, _parsed
    module = types.ModuleType("program")
    sys.modules["program"] = module
    names = vars(module)
    try:
        asked = parsed(tests, "<tests>", False)
        execute(parsed(program, "<program>", cut), names)
        execute(asked, names)
        flush()
        verdict = read(token, TOKEN)
    except BaseException as error:  # SystemExit as well: the tests have not passed
        verdict = failure(error)
    write(report, verdict)
    leave(0)


def _failure(error: BaseException) -> bytes:
    try:
        sys.stdout.flush()
        message = f"{type(error).__name__}: {error}"[:_MESSAGE]
    except BaseException:  # the program's own exception, or its own sys.stdout
        message = "an error that cannot be shown"
    return FAILED + message.encode("utf-8", "backslashreplace")


def _parsed(source: str, name: str, cut: bool) -> types.CodeType:
    """Compiles a source; with `cut`, without its end if that does not parse."""
    reason = None
    while True:
        try:
            return compile(source, name, "exec", dont_inherit=True, optimize=0)
        except SyntaxError as error:
            reason = reason or error
            source = _shorter(source, error.lineno) if cut else ""
            if not source.strip():
                raise reason from None


def _shorter(source: str, error_line: int | None) -> str:
    """The lines before the last unindented one that is not after the error; "" if there is none."""
    lines = source.split("\n")
    last = min(error_line or len(lines), len(lines))
    for k in range(last - 1, 0, -1):
        if lines[k][:1].strip():
            return "\n".join(lines[:k])
    return ""
