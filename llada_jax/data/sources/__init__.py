"""data.sources.__init__."""

import itertools
import json
import re
from collections.abc import Iterator

from llada_jax.data.sources.jsonl import jsonl_records
from llada_jax.data.sources.python import python_records
from llada_jax.data.sources.tfds import tfds_builder, tfds_records
from llada_jax.files import expand


def _split_source(source: str) -> list[tuple[str, str]]:
    """[(scheme, rest)] of the comma-joined sources."""
    parts = [part.partition(":") for part in re.split(r",(?=(?:jsonl|tfds|python):)", source)]
    for scheme, _, rest in parts:
        if scheme not in SOURCES or not rest:
            raise ValueError(
                f"data source {source!r}: {scheme!r} is none of {', '.join(SOURCES)}; write jsonl:PATH"
            )
    return [(scheme, rest) for scheme, _, rest in parts]


def raw_records(source: str) -> Iterator[tuple[str, object]]:
    """("file:line", record) of each record; a jsonl record is still its line."""
    for scheme, rest in _split_source(source):
        yield from SOURCES[scheme](rest)


SOURCES = {"jsonl": jsonl_records, "tfds": tfds_records, "python": python_records}


def identify(source: str, digest, limit: int) -> None:
    """Feeds the content of a source to the digest: the bytes of files, the records of a function."""
    for scheme, rest in _split_source(source):
        digest.update(scheme.encode())
        if scheme == "jsonl":
            for path in expand(rest):
                digest.update(f"file {path.suffix} ".encode())
                with path.open("rb") as f:
                    while block := f.read(1 << 20):
                        digest.update(block)
        elif scheme == "tfds":
            builder, split = tfds_builder(rest)
            digest.update(f"{builder.data_path} {builder.version} {split}".encode())
            digest.update((builder.data_path / "dataset_info.json").read_bytes())
        else:
            for _, record in itertools.islice(python_records(rest), limit or None):
                digest.update(json.dumps(record, sort_keys=True, default=str).encode())
