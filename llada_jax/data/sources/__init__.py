"""The sources that records come from. Each kind is one file and one entry of SOURCES.

A source is written NAME:REST. Several are joined by commas: `jsonl:a.jsonl,jsonl:b.jsonl`.
"""

import re
from collections.abc import Iterator

from llada_jax.data.sources.hf import HF
from llada_jax.data.sources.jsonl import JSONL
from llada_jax.data.sources.python import PYTHON
from llada_jax.data.sources.source import Source
from llada_jax.data.sources.tfds import TFDS

SOURCES: dict[str, Source] = {"jsonl": JSONL, "tfds": TFDS, "hf": HF, "python": PYTHON}


def raw_records(source: str) -> Iterator[tuple[str, object]]:
    """Yields ("file:line", record) of every record; a jsonl record is still a line of bytes.

    Raises ValueError if `source` names a kind that is not in SOURCES.
    """
    for name, rest in _split(source):
        yield from SOURCES[name].records(rest)


def identify(source: str, digest, limit: int) -> None:
    """Adds the content of the first `limit` records of a source (0: all) to a hash."""
    for name, rest in _split(source):
        digest.update(name.encode())
        SOURCES[name].identify(rest, digest, limit)


def _split(source: str) -> list[tuple[str, str]]:
    """Returns [(name, rest)] of the sources that are joined by commas."""
    names = "|".join(map(re.escape, SOURCES))
    parts = [part.partition(":") for part in re.split(rf",(?=(?:{names}):)", source)]
    for name, _, rest in parts:
        if name not in SOURCES or not rest:
            raise ValueError(
                f"data source {source!r}: {name!r} is none of {', '.join(SOURCES)}; "
                "write jsonl:PATH"
            )
    return [(name, rest) for name, _, rest in parts]
