"""Forms batches from packed rows, in an order that depends only on the seed."""

from collections.abc import Iterator

import grain
import numpy as np

from llada_jax.batch import Batch
from llada_jax.data.rows import Rows


class Loader(Iterator[Batch]):
    """Iterator of batches. Its whole state is `next_index`, the global index of the next row."""

    def __init__(self, batches: grain.IterDataset, start: int, batch_rows: int, num_segments: int):
        self._batches, self._batch_rows, self.next_index = iter(batches), batch_rows, start
        self._num_segments = num_segments

    def __next__(self) -> Batch:
        batch = Batch(**next(self._batches), num_segments=self._num_segments)
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
    num_segments: int = 0,
    threads: int = 8,
) -> Loader:
    """Returns an iterator of numpy batches: this shard's part of batches of `batch_rows` rows.

    The global batch that starts at row index k (k = step * batch_rows) depends only on the rows,
    the seed and k. A shard takes rows [shard_index::shard_count] of it, that is
    batch_rows / shard_count rows. Every epoch is shuffled differently.

    epochs: None repeats the rows for ever. With a number, a last partial batch is dropped, or with
        `pad` it is filled up with empty rows (segment_ids 0, row_ids -1).
    start: the index of the first row to yield (`Loader.next_index` of the run to continue).
    num_segments: of the batches; 0 takes the most segments of any row.
    threads: reader threads.

    Raises ValueError if batch_rows is not a positive multiple of shard_count, if shard_index is
    out of range, or if the rows do not fill one batch.
    """
    if batch_rows < 1 or batch_rows % shard_count or not 0 <= shard_index < shard_count:
        raise ValueError(
            f"batch_rows={batch_rows} cannot be shared by shard {shard_index} of {shard_count};"
            " use a positive multiple of the number of shards"
        )
    count = len(rows)
    order = grain.MapDataset.range(count)
    if shuffle:
        # grain shuffles epoch e with seed + e. We hash the seed first; otherwise epoch 1 of seed 0
        # would have the same order as epoch 0 of seed 1.
        order = order.shuffle(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    total = 1 << 62 if epochs is None else count * epochs
    batches = (total - start + (batch_rows - 1) * pad) // batch_rows
    if batches < 1 and start == 0:
        raise ValueError(
            f"{count} rows x {epochs} epochs fill no batch of {batch_rows}; lower batch_rows or pad"
        )

    def row(k: int) -> dict[str, np.ndarray]:
        if k >= total:
            return _padded({}, rows, row_id=-1, epoch=epochs - 1)
        index = int(order[k]) % count
        return _padded(rows[index], rows, row_id=index, epoch=k // count)

    indices = grain.MapDataset.range(
        start + shard_index, start + max(batches, 0) * batch_rows, shard_count
    )
    local_rows = batch_rows // shard_count
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, 2 * local_rows)
    )
    return Loader(
        indices.map(row).to_iter_dataset(options).batch(local_rows),
        start,
        batch_rows,
        num_segments or rows.num_segments,
    )


def _padded(
    row: dict[str, np.ndarray], rows: Rows, row_id: int, epoch: int
) -> dict[str, np.ndarray]:
    """Pads one row to the row length and adds its positions, id and epoch."""
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
