"""Synthetic rows: full rows of random tokens, for benchmarks and compiles."""

import numpy as np

from llada_jax.data.packing import Stats
from llada_jax.data.rows import Rows

# Tokens of a synthetic pair or sample, prompt included: a row of 4096 holds four, as in the
# published batch.
PAIR_TOKENS = 1024


class SyntheticRows(Rows):
    """Full rows of random tokens, which `loader` accepts in place of packed rows.

    A row holds max(row_length // PAIR_TOKENS, 1) pairs or samples of equal size (text: one).
    A quarter of each segment is the prompt (text: none). Raises ValueError if row_length is less
    than 4 tokens a segment.
    """

    def __init__(self, kind: str, row_length: int, vocab_size: int, count: int):
        self.row_length, self.kind, self.pad_id, self._count = row_length, kind, 0, count
        self._vocab_size = vocab_size
        per_row = 1 if kind == "text" else max(row_length // PAIR_TOKENS, 1)
        self.num_segments = 2 * per_row if kind == "preference" else per_row
        if row_length < 4 * self.num_segments:
            raise ValueError(
                f"data.row_length={row_length} holds no synthetic pair:"
                f" at least {4 * self.num_segments}"
            )
        samples, answers = count * per_row, count * int(self[0]["response_mask"].sum())
        self.stats = Stats(
            row_length, samples, 0, 0, 0, samples, count, count * row_length, answers
        )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        place = np.arange(self.row_length)
        segment = place * self.num_segments // self.row_length
        start = np.searchsorted(segment, segment)
        length = np.bincount(segment)[segment]
        return {
            "tokens": np.random.default_rng(index).integers(
                0, self._vocab_size, self.row_length, np.int32
            ),
            "segment_ids": (segment + 1).astype(np.int32),
            "response_mask": np.ones(self.row_length, bool)
            if self.kind == "text"
            else place - start >= length // 4,
        }
