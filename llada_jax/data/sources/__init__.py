"""Where records come from, one kind of source a file. A new one is one file and one entry of SOURCES.

A source is written NAME:REST. Several are joined by commas: `jsonl:a.jsonl,jsonl:b.jsonl`.
"""

import re
from collections.abc import Iterator

from llada_jax.data.sources.jsonl import JSONL
from llada_jax.data.sources.python import PYTHON
from llada_jax.data.sources.source import Source
from llada_jax.data.sources.tfds import TFDS

SOURCES: dict[str, Source] = {"jsonl": JSONL, "tfds": TFDS, "python": PYTHON}


def raw_records(source: str) -> Iterator[tuple[str, object]]:
    """("file:line", record) of each record; a jsonl record is still its line."""
    for name, rest in _split(source):
        yield from SOURCES[name].records(rest)


def identify(source: str, digest, limit: int) -> None:
    """Feeds the content of the first `limit` records (0: all) of a source to a hash."""
    for name, rest in _split(source):
        digest.update(name.encode())
        SOURCES[name].identify(rest, digest, limit)


def _split(source: str) -> list[tuple[str, str]]:
    """[(name, rest)] of the sources that commas join."""
    names = "|".join(map(re.escape, SOURCES))
    parts = [part.partition(":") for part in re.split(rf",(?=(?:{names}):)", source)]
    for name, _, rest in parts:
        if name not in SOURCES or not rest:
            raise ValueError(
                f"data source {source!r}: {name!r} is none of {', '.join(SOURCES)}; write jsonl:PATH"
            )
    return [(name, rest) for name, _, rest in parts]
