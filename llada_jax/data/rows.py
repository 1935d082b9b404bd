"""Packed rows on disk.

`prepare` packs a source (see `records` and `packing`) once. The result has random access and is
cached under a hash of the source's content and all settings. `batches.loader` forms batches of
these rows.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from llada_jax.data.packing import Packer, Packing, Stats
from llada_jax.data.sources import identify
from llada_jax.tokenizer import Tokenizer

# Version of the files, part of the cache key. Raise it when the same input gives other rows.
FORMAT = 1
STALE_SECONDS = 24 * 3600.0


class _Builder(tfds.core.GeneratorBasedBuilder):
    """Writes rows in the order of the iterator."""

    name = "llada_jax_rows"
    VERSION = tfds.core.Version(f"{FORMAT}.0.0")
    pkg_dir_path = None  # this builder has no folder of documentation

    def __init__(self, rows: Iterator[dict[str, np.ndarray]], data_dir: epath.Path):
        self._rows = rows
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self):
        types = {"tokens": np.int32, "segment_ids": np.uint16, "response_mask": np.bool_}
        features = {
            key: tfds.features.Tensor(shape=(None,), dtype=dtype) for key, dtype in types.items()
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"rows": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self._rows)

    def _log_download_bytes(self):
        """Logs nothing, since nothing is downloaded."""

    _log_download_done = _log_download_bytes


class Rows(Sequence):
    """Packed rows with random access.

    `rows[i]` is a dict of tokens, segment_ids and response_mask, each [length] and without padding
    (the loader pads).

    stats: the `Stats` of the preparation.
    num_segments: the largest number of segments in any row.
    row_length, pad_id, kind: as prepared; pad_id is the EOS id.
    fingerprint: hash of the records, the tokenizer and every setting.
    """

    def __init__(self, directory: str | os.PathLike):
        meta = json.loads((epath.Path(directory) / "prepared.json").read_text())
        self.stats = Stats(**meta["stats"])
        self.row_length: int = self.stats.row_length
        self.num_segments: int = meta["num_segments"]
        self.pad_id: int = meta["pad_id"]
        self.kind: str = meta["kind"]
        self.fingerprint: str = meta["fingerprint"]
        self._source = tfds.builder_from_directory(directory).as_data_source(split="rows")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        # `range` raises IndexError, which ends an iteration; the source raises another error.
        return self._source[range(len(self))[index]]


def prepare(
    source: str, tokenizer: Tokenizer, packing: Packing, *, cache_dir: str | os.PathLike
) -> Rows:
    """Packs a source into rows under cache_dir/<hash>, or opens the rows that are there already.

    `cache_dir` must be on a local disk. Raises ValueError or FileNotFoundError if the source gives
    no row.
    """
    if "://" in os.fspath(cache_dir):
        raise ValueError(
            f"cache_dir={cache_dir} is not local, and ArrayRecord reads local files;"
            " use a local directory"
        )
    if tokenizer.eos_id is None:
        raise ValueError(
            "rows are padded with EOS, which this tokenizer does not have;"
            " use one with <|endoftext|>"
        )
    digest = hashlib.sha256(
        f"{FORMAT} {tokenizer.fingerprint} {dataclasses.asdict(packing)}".encode()
    )
    identify(source, digest, packing.limit)
    fingerprint = digest.hexdigest()[:20]
    directory = epath.Path(cache_dir).expanduser() / fingerprint
    if not directory.exists():
        _write(Packer(source, tokenizer, packing), directory, fingerprint)
    return Rows(directory)


def _write(packer: Packer, directory: epath.Path, fingerprint: str) -> None:
    """Writes the packer's rows to a temporary directory and renames it when it is complete."""
    # A killed process leaves its temporary directory behind. We remove those older than a day;
    # younger ones may belong to a process that is still working.
    for left in directory.parent.glob(f"{directory.name}.*.incomplete"):
        if time.time() - left.stat().mtime > STALE_SECONDS:
            left.rmtree(missing_ok=True)
    most = 0

    def counted():
        nonlocal most
        for row in packer.rows():
            most = max(most, int(row["segment_ids"][-1]))
            yield row

    rows = counted()
    first = next(rows, None)
    if first is None:
        raise ValueError(packer.why_empty())
    temporary = directory.with_name(f"{directory.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        tfds.disable_progress_bar()
        builder = _Builder(itertools.chain([first], rows), temporary)
        builder.download_and_prepare()
        meta = {
            "fingerprint": fingerprint,
            "source": packer.source,
            "kind": packer.settings.kind,
            "num_segments": most,
            "pad_id": packer.tokenizer.eos_id,
            "stats": dataclasses.asdict(packer.stats),
        }
        (builder.data_path / "prepared.json").write_text(json.dumps(meta, indent=1))
        try:
            builder.data_path.rename(directory)
        except OSError:
            if not directory.exists():
                raise
            # Another process was faster. Its rows are the same, so we use them.
    finally:
        temporary.rmtree(missing_ok=True)
