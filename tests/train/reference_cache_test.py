"""The reference cache: terms stored by row, continued after an interruption, never stale."""

import itertools

import numpy as np
import pytest

from llada_jax.batch import Batch
from llada_jax.train.reference_cache import ReferenceCache

ROWS, EPOCHS, N, S = 10, 2, 3, 4


def make(directory, identity="a", rows=ROWS):
    return ReferenceCache(
        directory, {"reference": identity}, num_rows=rows, epochs=EPOCHS, n=N, segments=S
    )


def batch(ids, epochs):
    zeros = np.zeros((len(ids), 2), np.int32)
    ids, epochs = np.array(ids, np.int32), np.array(epochs, np.int32)
    return Batch(zeros, zeros, zeros, zeros > 0, ids, epochs, num_segments=S)


class Terms:
    """Terms that hold row and epoch; counts its calls."""

    def __init__(self, stop_after=None):
        self.calls, self.stop_after = 0, stop_after

    def __call__(self, rows):
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        self.calls += 1
        terms = np.broadcast_to(
            (100.0 * rows.epochs + rows.row_ids)[:, None, None], (len(rows.row_ids), N, S)
        )
        return rows.row_ids[::-1], terms[::-1]  # in any order: several hosts give it so


def batches_of(epoch, start):
    for first in itertools.count(start, 2):
        ids = [first, first + 1]
        yield batch([i if i < ROWS else -1 for i in ids], [epoch] * 2)


def fill(cache, terms):
    cache.fill(terms, batches_of, batch_rows=2, block=2)


def test_terms_come_back_by_row_and_epoch(tmp_path):
    cache = make(tmp_path)
    fill(cache, Terms())
    np.testing.assert_array_equal(cache[batch([7, 0, -1], [1, 0, 0])][:, 0, 0], [107, 0, 0])


def test_an_interrupted_fill_continues(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(make(tmp_path), Terms(stop_after=6))
    terms = Terms()
    cache = make(tmp_path)
    fill(cache, terms)
    assert terms.calls == 10 - 5  # five batches an epoch; the block that was under way starts again
    np.testing.assert_array_equal(cache[batch([9], [1])][:, 0, 0], [109])
    again = Terms(stop_after=0)
    fill(make(tmp_path), again)
    assert again.calls == 0


def test_a_torn_file_is_computed_again(tmp_path):
    fill(make(tmp_path), Terms())
    path = sorted(tmp_path.glob("*/*.npy"))[0]
    path.write_bytes(path.read_bytes()[:-8])
    terms = Terms()
    cache = make(tmp_path)
    fill(cache, terms)
    assert terms.calls == 2
    np.testing.assert_array_equal(cache[batch([0], [0])][:, 0, 0], [0])


def test_another_identity_shares_nothing(tmp_path):
    fill(make(tmp_path), Terms())
    other = Terms()
    fill(make(tmp_path, identity="b"), other)
    assert other.calls == 10


def test_a_row_that_was_not_computed_is_an_error(tmp_path):
    cache = make(tmp_path)
    with pytest.raises(ValueError, match="not in the cache"):
        cache[batch([3], [0])]
    fill(cache, Terms())
    with pytest.raises(ValueError, match="not in the cache"):
        cache[batch([3], [EPOCHS])]
