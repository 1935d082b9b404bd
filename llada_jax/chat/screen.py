"""Where a conversation is read and shown: a terminal, or plain lines."""

import contextlib
import sys
import time
from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from llada_jax.chat.session import Frame

MASK = "\N{MIDDLE DOT}"
# Named colours are those of the user's own theme. Confidences from these limits on have a colour.
COLOURS = ((0.9, "green"), (0.5, "yellow"), (-np.inf, "red"))
_LINES_AROUND = 3  # of the terminal: the status, an empty line and the next prompt


def printable(text: str) -> str:
    """The text without control characters, which could do anything to a terminal."""
    return "".join(
        c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "" for c in text
    )


class Plain:
    """Lines from standard input, whole answers to standard output, all else to standard error."""

    every = 1_000_000  # passes between two frames: only the last is wanted

    def read(self) -> str:
        """The next line. Raises EOFError at the end."""
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    def say(self, text: str):
        """Says something about the conversation."""
        print(printable(text), file=sys.stderr, flush=True)

    def show(self, frames: Iterable[Frame], compiles: bool) -> tuple[Frame | None, bool]:
        """Shows an answer; returns its last frame, and whether it was interrupted."""
        del compiles
        *_, frame = frames
        print(printable(frame.text), flush=True)
        return frame, False


class Terminal:
    """A terminal: answers are shown while they are written, Ctrl-C stops them."""

    every = 1

    def __init__(self, console: Console):
        self._console = console
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, PLC0415 (gives `input` editing and a history)

    def read(self) -> str:
        """The next line. Raises EOFError at Ctrl-D, and KeyboardInterrupt at Ctrl-C."""
        return input("> ")

    def say(self, text: str):
        """Says something about the conversation."""
        self._console.print(Text(printable(text), "dim"))

    def show(self, frames: Iterable[Frame], compiles: bool) -> tuple[Frame | None, bool]:
        """Shows an answer; returns its last frame, and whether it was interrupted."""
        clock, interrupted = Clock(compiles), False

        def picture() -> Text:
            room = max(self._console.height - _LINES_AROUND, 1)
            answer = cropped(self._console, clock.frame, room) if clock.frame else Text()
            return answer.append(f"\n{clock}" if answer else str(clock), "dim")

        with Live(
            get_renderable=picture, console=self._console, transient=True, refresh_per_second=8
        ) as live:
            live.refresh()
            try:
                for frame in frames:
                    clock.tick(frame)
                    live.refresh()
            except KeyboardInterrupt:
                interrupted = True
        if clock.frame:
            self._console.print(coloured(clock.frame, final=True))
            self._console.print(Text(str(clock), "dim"))
        return clock.frame, interrupted


class Clock:
    """The state of an answer in one line: passes, tokens and tokens a second."""

    def __init__(self, compiles: bool):
        self._compiles, self._began = compiles, time.monotonic()
        self._first, self._now = (0, self._began), self._began
        self.frame: Frame | None = None

    def tick(self, frame: Frame):
        """Notes that a pass is done. Compilation does not count in the rate."""
        self._now = time.monotonic()
        if self.frame is None and self._compiles:
            self._first = (frame.tokens, self._now)
        self.frame = frame

    def __str__(self):
        if self.frame is None:
            doing = "compiling" if self._compiles else "first pass"
            return f"{doing} {time.monotonic() - self._began:.0f} s"
        f = self.frame
        line = f"pass {f.passes}  {f.tokens}/{len(f.words)} tokens"
        tokens, seconds = f.tokens - self._first[0], self._now - self._first[1]
        return f"{line}  {tokens / seconds:.1f} tokens/s" if tokens > 0 < seconds else line


def coloured(frame: Frame, final: bool = False) -> Text:
    """The answer: tokens by the colour of their confidence, masks as dots, new tokens in bold.

    A final one has no masks at its end.
    """
    words = list(frame.words)
    while final and words and words[-1] is None:
        words.pop()
    text = Text()
    for word, fresh, sure in zip(words, frame.fresh, frame.confidence, strict=False):
        if word is None:
            text.append(MASK, "dim")
        elif word:
            colour = next((c for limit, c in COLOURS if sure >= limit), "")
            text.append(printable(word), f"bold {colour}" if fresh and not final else colour)
    return text


def cropped(console: Console, frame: Frame, room: int) -> Text:
    """The answer, or the lines up to the last token if it has more than `room` lines."""
    text = coloured(frame)
    lines = text.wrap(console, console.width)
    if len(lines) > room:
        masks = len(text.plain) - len(text.plain.rstrip(MASK))
        lines = text[: len(text) - max(masks - 1, 0)].wrap(console, console.width)[-room:]
    return Text("\n").join(lines)


def open_screen() -> Plain | Terminal:
    """A terminal if standard input and output are one, else plain lines."""
    console = Console(highlight=False, markup=False, emoji=False)
    if sys.stdin.isatty() and sys.stdout.isatty() and not console.is_dumb_terminal:
        return Terminal(console)
    return Plain()
