"""The source hf:NAME?split=...: a data set of the Hugging Face hub, or a local folder of one."""

import itertools
import json
import os
import urllib.parse
from collections.abc import Iterator

from llada_jax.data.sources.source import Source

ARGUMENTS = ("split", "name", "revision", "data_files")


def _records(spec: str) -> Iterator[tuple[str, object]]:
    name, _, query = spec.partition("?")
    arguments = dict(urllib.parse.parse_qsl(query))
    unknown = sorted(arguments.keys() - set(ARGUMENTS))
    if unknown:
        raise ValueError(
            f"data source hf:{spec}: {', '.join(unknown)} is none of {', '.join(ARGUMENTS)}"
        )
    try:
        import datasets  # noqa: PLC0415 (only this source needs it)
    except ImportError:
        raise ImportError(
            f"data source hf:{spec} needs datasets: pip install 'llada_jax[evaluate]'"
        ) from None
    arguments.setdefault("split", "train")
    try:
        found = datasets.load_dataset(os.path.expanduser(name), **arguments)
    except Exception as error:  # datasets raises many types of error, with messages of many lines
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"data source hf:{spec} cannot be loaded ({type(error).__name__}: {reason}): see the "
            "network, the name and the split, or download it and use jsonl:FILE"
        ) from error
    yield from ((f"{name}:{arguments['split']}:{k}", record) for k, record in enumerate(found))


def _identify(spec: str, digest, limit: int) -> None:
    for _, record in itertools.islice(_records(spec), limit or None):
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())


HF = Source(_records, _identify)
