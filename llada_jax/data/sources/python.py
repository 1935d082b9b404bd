"""The source python:module:function?key=value."""

import ast
import importlib
import urllib.parse
from collections.abc import Iterator


def python_records(spec: str) -> Iterator[tuple[str, object]]:
    name, _, query = spec.partition("?")
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise ValueError(f"data source python:{spec}: {e}; write python:module:function") from e
    arguments = {
        key: _literal(value) for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True)
    }
    yield from ((f"{name}:{number}", record) for number, record in enumerate(make(**arguments), 1))


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
