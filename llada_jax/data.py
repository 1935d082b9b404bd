"""Packed rows on disk, and batches of them.

`prepare` packs a source (see `records` and `packing`) once into rows with random access, cached by content; `loader`
turns rows into batches whose order depends on the seed alone, so that one integer resumes it on any number of hosts.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence

import grain
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from llada_jax.batch import Batch
from llada_jax.packing import Packer, Settings, Stats
from llada_jax.records import identify
from llada_jax.tokenizer import Tokenizer

FORMAT = 1  # of the files on disk, part of the cache key: raise it when the same input gives other rows
STALE_SECONDS = 24 * 3600.0


class _Builder(tfds.core.GeneratorBasedBuilder):
    """Writes an iterator of rows in its order."""

    name = "llada_jax_rows"
    VERSION = tfds.core.Version(f"{FORMAT}.0.0")
    pkg_dir_path = None  # there is no folder of documentation

    def __init__(self, rows: Iterator[dict[str, np.ndarray]], data_dir: epath.Path):
        self._rows = rows
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self):
        types = {"tokens": np.int32, "segment_ids": np.uint16, "response_mask": np.bool_}
        features = {key: tfds.features.Tensor(shape=(None,), dtype=dtype) for key, dtype in types.items()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"rows": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self._rows)

    def _log_download_bytes(self):
        """Nothing is downloaded, so nothing is said about it."""

    _log_download_done = _log_download_bytes


class Rows(Sequence):
    """Packed rows with random access; `rows[i]` is a dict of tokens, segment_ids, response_mask, all [length] and
    without padding (the loader pads).

    `stats`: `Stats`; `num_segments`: most segments in any row; `row_length`; `pad_id`; `kind`; `fingerprint`: hash of
    the records, the tokenizer and every setting.
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
        return self._source[range(len(self))[index]]  # IndexError ends an iteration, the source has its own


def prepare(
    source: str,
    kind: str,
    tokenizer: Tokenizer,
    *,
    row_length: int,
    cache_dir: str | os.PathLike,
    template: str = "chat",
    append_eos: bool = True,
    answer_multiple: int = 1,
    too_long: str = "drop",
    bad_records: str = "stop",
    holdout: float = 0.0,
    split: str = "train",
    limit: int = 0,
) -> Rows:
    """Packs a source into rows of at most `row_length` tokens under cache_dir/<hash>, or opens those already there.

    kind: "preference" (pairs), "sft" (a prompt and a response) or "text" (documents, between bos and EOS, laid end to
        end and cut into rows; the last short row is dropped; `template` and `too_long` do not matter).
    template: see `encode_prompt`. append_eos: a response or document ends with EOS.
    answer_multiple: ("sft") EOS pads the response, as part of it, to a multiple of so many tokens, never past the row;
        row_length gives the published form, one sample a row.
    too_long: what happens to a sample (for "preference" a pair, twice its prompt and both responses) that is longer
        than a row: "drop", or "truncate", which cuts the end of the longer response, then of both; an EOS goes with
        the end. A prompt that leaves no room, or a pair whose responses become equal, is dropped all the same.
    bad_records: "stop" with an error that names the first, or "skip" and count them.
    holdout, split: this fraction of the records is "heldout", the others are "train".
    limit: only so many records of the source, before they are split; 0 is all.
    ValueError or FileNotFoundError, in one line, for a source that gives no row. cache_dir is a local directory.
    """
    settings = Settings(
        kind, row_length, template, append_eos, answer_multiple, too_long, bad_records, holdout, split, limit
    )
    if "://" in os.fspath(cache_dir):
        raise ValueError(
            f"cache_dir={cache_dir} is not local, and ArrayRecord reads local files; use a local directory"
        )
    if tokenizer.eos_id is None:
        raise ValueError("rows are padded with EOS, which this tokenizer does not have; use one with <|endoftext|>")
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint} {dataclasses.asdict(settings)}".encode())
    identify(source, digest, limit)
    fingerprint = digest.hexdigest()[:20]
    directory = epath.Path(cache_dir).expanduser() / fingerprint
    if not directory.exists():
        _write(Packer(source, tokenizer, settings), directory, fingerprint)
    return Rows(directory)


def _write(packer: Packer, directory: epath.Path, fingerprint: str) -> None:
    """Writes the packer's rows to a temporary directory and renames it when it is complete."""
    # A killed process leaves its directory behind; one younger than a day may be at work still.
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
            # Another process was faster; its rows are the same.
    finally:
        temporary.rmtree(missing_ok=True)


# ---- batches


class Loader(Iterator[Batch]):
    """Iterator of batches; `next_index` is the global index of the next row, the loader's whole state."""

    def __init__(self, batches: grain.IterDataset, start: int, batch_rows: int):
        self._batches, self._batch_rows, self.next_index = iter(batches), batch_rows, start

    def __next__(self) -> Batch:
        batch = Batch(**next(self._batches))
        self.next_index += self._batch_rows
        return batch


def loader(
    rows: Rows,
    *,
    batch_rows: int,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = None,
    start: int = 0,
    pad: bool = False,
    shard_index: int = 0,
    shard_count: int = 1,
    threads: int = 8,
) -> Loader:
    """Batches of `batch_rows` rows over all shards, in numpy arrays; this shard gets batch_rows / shard_count of them.

    The global batch at row index k (k = step * batch_rows) is a function of rows, seed and k; a shard takes its rows
    [shard_index::shard_count]. Each epoch is shuffled anew. epochs=None repeats for ever; else a last partial batch is
    dropped, or with `pad` filled up with empty rows (segment_ids 0, row_ids -1). `start`: the index to go on from.
    """
    if batch_rows < 1 or batch_rows % shard_count or not 0 <= shard_index < shard_count:
        raise ValueError(
            f"batch_rows={batch_rows} cannot be shared by shard {shard_index} of {shard_count};"
            " use a positive multiple of the number of shards"
        )
    count = len(rows)
    order = grain.MapDataset.range(count)
    if shuffle:
        # grain adds the epoch to the seed: spread seeds out, or seed 0 in epoch 1 is seed 1 in epoch 0.
        order = order.shuffle(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    total = 1 << 62 if epochs is None else count * epochs
    batches = (total - start + (batch_rows - 1) * pad) // batch_rows
    if batches < 1 and start == 0:
        raise ValueError(f"{count} rows x {epochs} epochs fill no batch of {batch_rows}; lower batch_rows or pad")

    def row(k: int) -> dict[str, np.ndarray]:
        if k >= total:
            return _padded({}, rows, row_id=-1, epoch=epochs - 1)
        index = int(order[k]) % count
        return _padded(rows[index], rows, row_id=index, epoch=k // count)

    indices = grain.MapDataset.range(start + shard_index, start + max(batches, 0) * batch_rows, shard_count)
    local_rows = batch_rows // shard_count
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 2 * local_rows))
    return Loader(indices.map(row).to_iter_dataset(options).batch(local_rows), start, batch_rows)


def _padded(row: dict[str, np.ndarray], rows: Rows, row_id: int, epoch: int) -> dict[str, np.ndarray]:
    """One row of a batch."""
    length = rows.row_length
    tokens, segment_ids = np.full(length, rows.pad_id, np.int32), np.zeros(length, np.int32)
    response_mask = np.zeros(length, bool)
    if row:
        size = len(row["tokens"])
        tokens[:size], segment_ids[:size] = row["tokens"], row["segment_ids"]
        response_mask[:size] = row["response_mask"]
    place = np.arange(length, dtype=np.int32)
    begins = np.diff(segment_ids, prepend=-1) != 0
    return {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "positions": place - np.maximum.accumulate(np.where(begins, place, 0)),
        "response_mask": response_mask,
        "row_ids": np.int32(row_id),
        "epochs": np.int32(epoch),
    }
