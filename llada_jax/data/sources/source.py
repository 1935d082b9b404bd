"""Source: the functions that a kind of data source provides."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any


class BadRecord(ValueError):
    """The reason why a record cannot be used. The caller adds where the record is."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One kind of source, written `NAME:REST` in a config.

    `records(rest)` yields (where, record). `where` is the place of the record, for error messages.
    The record is a dict, or a line of JSON in bytes, or a BadRecord that says why there is none. It
    must yield the same records every time.

    `identify(rest, digest, limit)` adds the content of the first `limit` records (0: all) to a
    hash. Packed rows are named by this hash, so changed content is packed again.

    Both raise FileNotFoundError or ValueError, in one line, if `rest` names nothing.
    """

    records: Callable[[str], Iterator[tuple[str, Any]]]
    identify: Callable[[str, Any, int], None]
