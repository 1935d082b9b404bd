"""The source python:module:function?key=value: a function that yields records."""

import ast
import inspect
import itertools
import json
import urllib.parse
from collections.abc import Iterable, Iterator

from llada_jax.data.sources.source import Source
from llada_jax.files import load_function


def _records(spec: str) -> Iterator[tuple[str, object]]:
    name, _, query = spec.partition("?")
    make = load_function(name, "data source python:")
    arguments = {
        key: _literal(value) for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True)
    }
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"data source python:{spec}: {error}; see the function") from None
    records = make(**arguments)
    if not isinstance(records, Iterable):
        kind = type(records).__name__
        raise ValueError(f"data source python:{name} gives {kind}, which holds no records")
    yield from ((f"{name}:{number}", record) for number, record in enumerate(records, 1))


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _identify(spec: str, digest, limit: int) -> None:
    for _, record in itertools.islice(_records(spec), limit or None):
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())


PYTHON = Source(_records, _identify)
