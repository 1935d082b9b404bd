"""Names: of special tokens, of a tokenizer's files, and patterns that find them in text."""

import functools
import re
from collections.abc import Iterable

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
START_HEADER, END_HEADER, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
HEADERS = (BOS, START_HEADER, END_HEADER, EOT)  # special tokens of LLaDA's chat template
FILES = ("tokenizer.json", "tokenizer.model")  # in order of preference within a directory
MARK = "\ue000"  # of the private use area: no template has it
SPECIAL_TOKEN = re.compile(r"<\|[^|<>]+\|>")


def any_of(names: Iterable[str]) -> re.Pattern:
    """A pattern that finds any of the names, the longest first."""
    return _pattern(tuple(sorted(names, key=lambda name: (-len(name), name))))


@functools.lru_cache
def _pattern(names: tuple[str, ...]) -> re.Pattern:
    return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
