"""Source: what the library asks of a place that records come from."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Source:
    """One kind of source, `NAME:REST` in a config.

    `records(rest)` yields ("where", record): where it stands, for error messages, and the record as a
    dict or as a line of JSON in bytes. It yields the same records every time.
    `identify(rest, digest, limit)` feeds the content of the first `limit` records (0: all) to a hash:
    another content gets other packed rows.
    Both raise FileNotFoundError or ValueError, in one line, for a `rest` that names nothing.
    """

    records: Callable[[str], Iterator[tuple[str, Any]]]
    identify: Callable[[str, Any, int], None]
