"""Config sections made from settings dataclasses.

A field of a settings dataclass declares a key, its default, its check and its comment in one place.
The comment of a key is the comment of its field: at the end of its line, or in the lines directly
above it.
"""

import copy
import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict, config_dict


def key(
    default: Any,
    *,
    given: bool = False,
    changes_result: bool = True,
    argument: bool = False,
    comment: str = "",
) -> Any:
    """A field of a settings dataclass that is not an ordinary key.

    given: the program sets the field; a config has no key for it.
    changes_result: if False, the key changes only memory or speed, and a run may change it when it
        resumes.
    argument: compiled programs take the number as an argument. Two runs that differ in it share one
        program.
    comment: the comment of a field that has no line in any source (`dataclasses.make_dataclass`).
    """
    metadata = {"given": given, "changes_result": changes_result, "argument": argument}
    return dataclasses.field(default=default, metadata=metadata | {"comment": comment})


def section(*classes: type, **changes: Any) -> ConfigDict:
    """Makes a locked section that has the fields of all the given settings dataclasses.

    A field that is itself a settings dataclass adds its own fields instead. Their defaults are the
    values in the field's default. For example, `Preference.scheme` gives the key `vrpo.n_t`.
    `changes` replace defaults. Raises TypeError if two dataclasses have the same key, or if
    `changes` names a key that does not exist.
    """
    values = {}
    for cls in classes:
        for name, default, hint in _keys(cls):
            if name in values:
                raise TypeError(f"two settings of one section have a key {name}")
            # A flag takes the type of its value from the placeholder.
            unset = config_dict.placeholder(typing.get_args(hint)[0]) if default is None else None
            values[name] = default if unset is None else unset
    unknown = changes.keys() - values.keys()
    if unknown:
        raise TypeError(f"{', '.join(sorted(unknown))}: no key of {[c.__name__ for c in classes]}")
    return ConfigDict(values | changes).lock()


def build(cls: type, values: ConfigDict, where: str, **given: Any) -> Any:
    """Makes the settings from a section, or from the top level of a config.

    `given` sets the fields that have no key. Raises ValueError if a value has the wrong type or if
    the dataclass refuses it; the message begins with `where` and the key.
    """
    try:
        return _build(cls, None, values, given)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def at_least(settings: Any, **least: float | int) -> None:
    """Raises ValueError if a field is below its minimum."""
    for name, bound in least.items():
        if not getattr(settings, name) >= bound:
            raise ValueError(f"{name}={getattr(settings, name)} must be at least {bound}")


def one_of(settings: Any, **known: Any) -> None:
    """Raises ValueError if a field has none of its known values."""
    for name, values in known.items():
        value = getattr(settings, name)
        if value not in values:
            shown = ", ".join(repr(v) if v == "" else str(v) for v in values)
            raise ValueError(f"{name}={value!r} is not one of {shown}")


def identity(settings: Any) -> dict[str, Any]:
    """Returns the values of all fields that change the result, by name; nested fields included."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            values |= identity(value)
        elif field.metadata.get("changes_result", True):
            values[field.name] = value
    return values


def arguments(settings: Any) -> dict[str, np.generic]:
    """Returns the numbers that compiled programs take as arguments, as int32 and float32, by name.

    An integer beyond 32 bits loses its upper bits, as in `jax.random.key`.
    """
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.metadata.get("argument")
    }
    return {
        name: np.int64(value).astype(np.int32) if isinstance(value, int) else np.float32(value)
        for name, value in values.items()
    }


def with_arguments(settings: Any, values: Mapping[str, Any]) -> Any:
    """Returns the settings with other values of their `arguments`, which may be traced.

    They are not checked: a traced value has no number yet, and the settings were checked before.
    """
    changed = copy.copy(settings)
    for name, value in values.items():
        object.__setattr__(changed, name, value)
    return changed


def without_arguments(settings: Any) -> Any:
    """Returns the settings without their `arguments`: equal if a program is the same with both."""
    return with_arguments(settings, dict.fromkeys(arguments(settings)))


def keys(*classes: type) -> Iterator[tuple[str, Any, str]]:
    """Yields (name, default, comment) of every key of settings dataclasses, for --help and docs."""
    for cls in classes:
        comments: dict[str, str] = {}
        for owner in _nested(cls):
            for parent in reversed(owner.__mro__):
                comments |= _comments(parent)
            told = {
                field.name: field.metadata.get("comment") for field in dataclasses.fields(owner)
            }
            comments |= {name: comment for name, comment in told.items() if comment}
        for name, default, _ in _keys(cls):
            yield name, default, comments.get(name, "")


def _nested(cls: type) -> Iterator[type]:
    yield cls
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default):
            yield from _nested(type(field.default))


def _keys(cls: type, instance: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, default, type) of each key; those of a nested class are in its field's place.

    The type of a key whose default is None is `T | None`.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = field.default if instance is None else getattr(instance, field.name)
        if field.metadata.get("given"):
            continue
        if dataclasses.is_dataclass(default):
            yield from _keys(type(default), default)
        elif default is dataclasses.MISSING:
            yield field.name, field.default_factory(), hints[field.name]  # type: ignore[operator]
        else:
            yield field.name, default, hints[field.name]


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
    """Returns the value in the type of its field: int becomes float, ConfigDict becomes dict.

    Raises ValueError for any other type, and for a float that is not finite.
    """
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) not in allowed:
        wanted = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
        raise ValueError(f"{name}={value!r} is {type(value).__name__}, not {wanted}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value} is no finite number")
    return value


def _comments(cls: type) -> dict[str, str]:
    """Returns the comment of every field from the source of the class; {} if there is no source."""
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
