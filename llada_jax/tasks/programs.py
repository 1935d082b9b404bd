"""The program within a response: fenced or not, a whole function or only its body, prose around."""

import re
import textwrap
from collections.abc import Collection

# Markdown: a fence may be indented by three spaces. Four are code, say a docstring with an example.
_FENCE = re.compile(r"^ {0,3}```[^`\n]*$\n?", re.MULTILINE)
_OPENING = re.compile(
    r"^(?:import \w|from [\w.]+ import |(?:async )?def \w|class \w|@\w|\w+ *(?::[^=\n]+)?= *\S)",
    re.MULTILINE,
)
_INDENT = "    "


def code_of(response: str, names: Collection[str]) -> str:
    """The part of a response that is code: what a fence or [BEGIN] ... [DONE] holds, or all of it.

    Of several fenced blocks it is the first that defines one of the functions `names`, else the
    first that defines any, else the first; it keeps its indentation. Prose before an unfenced
    function is dropped. What follows the code is not, since only a parser knows where it ends.
    """
    text = response.replace("\r\n", "\n").partition("[DONE]")[0].rpartition("[BEGIN]")[2]
    before, *blocks = _FENCE.split(text)
    if blocks and not _is_code(before, names):
        inside = blocks[::2]
        any_name = (r"\w+",)
        return next(
            (b for wanted in (names, any_name) for b in inside if defines(b, wanted)), inside[0]
        )
    start = _OPENING.search(before) if defines(before, (r"\w+",)) else None
    return before if start is None or _starts_indented(before) else before[start.start() :]


def defines(code: str, names: Collection[str]) -> bool:
    """Whether a line that no other contains defines a function of one of these names."""
    heads = "|".join(names)
    return bool(re.search(rf"^(?:async )?def (?:{heads})\b", textwrap.dedent(code), re.MULTILINE))


def complete(prompt: str, code: str, name: str) -> str:
    """The program that a prompt, which ends within the function `name`, and a response make.

    A whole function replaces the prompt's, and keeps what stands before it: imports and helpers.
    Anything else continues the prompt; a body that lost its indentation gets it back.
    """
    whole = textwrap.dedent(code)
    if not _starts_indented(whole) and defines(whole, (name,)):
        heads = list(re.finditer(rf"^(?:async )?def {name}\b", prompt, re.MULTILINE))
        return prompt[: heads[-1].start()] + whole if heads else whole
    return prompt + _indented(code)


def _is_code(text: str, names: Collection[str]) -> bool:
    """Whether what stands before the first fence is code, so that the fence only closes it."""
    return bool(text.strip()) and (_starts_indented(text) or defines(text, names))


def _starts_indented(text: str) -> bool:
    return text.lstrip("\n")[:1] in (" ", "\t")


def _indented(body: str) -> str:
    """A body with its indentation, where all of it, or the first line alone, has lost it."""
    body = body.strip("\n")
    if _starts_indented(body):
        return body
    first, _, rest = body.partition("\n")
    depths = [len(line) - len(line.lstrip()) for line in rest.split("\n") if line.strip()]
    least = min(depths, default=0)
    # A block that the first line opens has one depth. A deeper start means that a line outside of
    # it follows, with the depth that the first line had.
    opens = first.rstrip().endswith(":")
    if least == 0 or (opens and depths[0] == least):
        return textwrap.indent(body, _INDENT)
    return " " * least + body
