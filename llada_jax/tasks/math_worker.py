"""Compares answers of MATH for `competition_math`, which runs this file as a process of its own.

A line [wanted, found] in JSON comes in, the line 1 or 0 goes out.
"""

import contextlib
import json
import logging
import os
import resource
import signal
import sys

from math_verify import LatexExtractionConfig, parse, verify

_SECONDS = 10  # of computing, so that a busy machine gives the same verdicts
_BYTES = 4 * 2**30
_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]


def main() -> None:
    """Answers until the input ends. A comparison over the limit ends the process."""
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)  # what the libraries print is no reply
        logging.disable()
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
        print("ready", file=replies, flush=True)
        for line in sys.stdin:
            # A signal's default action also ends a long multiplication, an exception does not.
            signal.setitimer(signal.ITIMER_PROF, _SECONDS)
            verdict = _equal(*json.loads(line))
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(int(verdict), file=replies, flush=True)


def _equal(wanted: str, found: str) -> bool:
    try:
        pair = [
            parse(rf"\boxed{{{text}}}", _LATEX, parsing_timeout=None) for text in (wanted, found)
        ]
        return verify(*pair, timeout_seconds=None)
    except (Exception, RecursionError, MemoryError):
        return False


if __name__ == "__main__":
    main()
