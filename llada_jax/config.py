"""A config section is a settings dataclass: key, default, refusal and comment stand in one place.

The comment of a key is the comment of its field: behind it, or in the lines right above it.
"""

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict


def key(default: Any, *, given: bool = False, changes_result: bool = True) -> Any:
    """A field of a settings dataclass that is more than a key with a default.

    `given`: the program sets it, no config can. `changes_result` False: it moves memory or speed,
    and a run may change it in the middle.
    """
    return dataclasses.field(
        default=default, metadata={"given": given, "changes_result": changes_result}
    )


def section(*classes: type, **changes: Any) -> ConfigDict:
    """A locked section with the fields of settings dataclasses side by side.

    A field that is itself a settings dataclass adds its fields, with the defaults of its own default
    value: `Preference.scheme` gives `vrpo.n_t`. `changes` are other defaults.
    """
    values = {}
    for cls in classes:
        for name, field, default in _keys(cls):
            if name in values:
                raise TypeError(f"two settings of one section have a key {name}")
            values[name] = (
                default if default is not dataclasses.MISSING else field.default_factory()
            )
    unknown = changes.keys() - values.keys()
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: no key of {[c.__name__ for c in classes]}")
    return ConfigDict(values | changes).lock()


def build(cls: type, values: ConfigDict, where: str, **given: Any) -> Any:
    """The settings that a section (or the top of a config) holds.

    `given` sets the fields that no config can. Raises ValueError, which begins with `where` and the
    key, for a value of another type or one that the dataclass refuses.
    """
    try:
        return _build(cls, None, values, given)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def at_least(settings: Any, **least: float | int) -> None:
    """Raises ValueError for a field below its least value."""
    for name, bound in least.items():
        if not getattr(settings, name) >= bound:
            raise ValueError(f"{name}={getattr(settings, name)} must be at least {bound}")


def one_of(settings: Any, **known: Any) -> None:
    """Raises ValueError for a field that is none of the known values."""
    for name, values in known.items():
        value = getattr(settings, name)
        if value not in values:
            shown = ", ".join(repr(v) if v == "" else str(v) for v in values)
            raise ValueError(f"{name}={value!r} is not one of {shown}")


def identity(settings: Any) -> dict[str, Any]:
    """The value of every field that changes what is computed, nested ones by their own names."""
    values = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            values |= identity(value)
        elif field.metadata.get("changes_result", True):
            values[field.name] = value
    return values


def keys(*classes: type) -> Iterator[tuple[str, Any, str]]:
    """(name, default, comment) of every key of settings dataclasses, for --help and the docs."""
    for cls in classes:
        comments = {}
        for owner in _nested(cls):
            for parent in reversed(owner.__mro__):
                comments |= _comments(parent)
        for name, field, default in _keys(cls):
            value = default if default is not dataclasses.MISSING else field.default_factory()
            yield name, value, comments.get(name, "")


def _nested(cls: type) -> Iterator[type]:
    yield cls
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            yield from _nested(type(field.default))


def _keys(cls: type, instance: Any = None) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(name, field, default) of every key, nested ones in their place."""
    for field in dataclasses.fields(cls):
        default = field.default if instance is None else getattr(instance, field.name)
        if field.metadata.get("given"):
            continue
        if dataclasses.is_dataclass(default):
            yield from _keys(type(default), default)
        else:
            yield field.name, field, default


def _build(cls: type, instance: Any, section: ConfigDict, given: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        name = field.name
        default = field.default if instance is None else getattr(instance, name)
        if dataclasses.is_dataclass(default):
            values[name] = _build(type(default), default, section, given)
        elif name in given:
            values[name] = given[name]
        elif not field.metadata.get("given"):
            values[name] = _typed(name, section[name], hints[name])
    return cls(**values)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as its field wants it: a whole number serves as a float, a ConfigDict as a dict."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) not in allowed:
        wanted = " or ".join(t.__name__ for t in allowed)
        raise ValueError(f"{name}={value!r} is {type(value).__name__}, not {wanted}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value} is no finite number")
    return value


def _comments(cls: type) -> dict[str, str]:
    """The comment of every field, from the source of the class; none where there is no source."""
    try:
        lines = inspect.getsource(cls).splitlines()
    except (OSError, TypeError):
        return {}
    comments, above = {}, []
    for line in lines:
        if found := re.fullmatch(r"    # (.*)", line):
            above.append(found.group(1))
            continue
        if found := re.match(r"    (\w+): [^#]*(?:#(?: )?(.*))?$", line):
            comments[found.group(1)] = " ".join([*above, found.group(2) or ""]).strip()
        above = []
    return comments
