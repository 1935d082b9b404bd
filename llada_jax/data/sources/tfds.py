"""The source tfds:NAME_OR_DIR, read without TensorFlow."""

import os
import re
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from llada_jax.data.sources.source import Source


def _records(spec: str) -> Iterator[tuple[str, object]]:
    builder, split = _builder(spec)
    for number, record in enumerate(builder.as_data_source(split=split)):
        yield f"{builder.data_path}:{split}:{number}", _from_tfds(record)


def _builder(spec: str) -> tuple[tfds.core.DatasetBuilder, str]:
    match = re.fullmatch(r"(.+?):(\w[^/]*)", spec)  # a split may contain colons: train[:100]
    name, split = match.groups() if match else (spec, "train")
    is_path = name.startswith(("/", ".", "~")) or "://" in name
    try:
        builder = (
            tfds.builder_from_directory(os.path.expanduser(name)) if is_path else tfds.builder(name)
        )
    except Exception as e:  # TFDS raises many types of error, with messages of many lines
        raise FileNotFoundError(
            f"data source tfds:{spec}: no prepared dataset at {name}; prepare it, or set "
            "TFDS_DATA_DIR to where it is"
        ) from e
    if not builder.data_path.exists():
        raise FileNotFoundError(
            f"data source tfds:{spec}: nothing at {builder.data_path}; prepare the dataset first"
        )
    if split.partition("[")[0] not in builder.info.splits:
        have = ", ".join(builder.info.splits)
        raise ValueError(
            f"data source tfds:{spec}: no split {split!r} in {builder.data_path}; it has {have}"
        )
    if builder.info.file_format.value != "array_record":
        raise ValueError(
            f"data source tfds:{spec}: {builder.data_path} is stored as "
            f"{builder.info.file_format.value}, which takes TensorFlow to read; prepare it with "
            'file_format="array_record"'
        )
    return builder, split


def _from_tfds(value: object) -> object:
    """Converts bytes to str, arrays to lists, {role: [..], content: [..]} to a list of messages."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | np.generic):
        return _from_tfds(value.tolist())
    if isinstance(value, list | tuple):
        return [_from_tfds(item) for item in value]
    if isinstance(value, dict):
        value = {key: _from_tfds(item) for key, item in value.items()}
        if {"role", "content"} <= value.keys() and all(
            isinstance(item, list) for item in value.values()
        ):
            return [
                dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)
            ]
    return value


def _identify(spec: str, digest, limit: int) -> None:
    del limit
    builder, split = _builder(spec)
    digest.update(f"{builder.data_path} {builder.version} {split}".encode())
    digest.update((builder.data_path / "dataset_info.json").read_bytes())


TFDS = Source(_records, _identify)
