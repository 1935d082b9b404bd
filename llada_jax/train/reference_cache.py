"""The reference cache: ELBO terms of the reference policy, computed once and stored by row.

Noise is a function of seed, stream, row and epoch, so the masks of all future steps are known. The
cached terms belong to exactly these masks. A run that reads them needs no reference parameters, and
trains on exactly the same masks as a run that computes the terms itself.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterable

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from llada_jax.batch import Batch
from llada_jax.files import write_whole


class ReferenceCache:
    """Terms [n, s] of the reference policy for each row and epoch of one dataset, kept in files.

    directory: the folder for the files.
    identity: everything that the terms depend on: fingerprints of reference and data, noise
        settings, compute settings of the model. Each identity has its own files, so the cache never
        returns stale terms.
    num_rows, epochs: rows of the dataset, and passes over it.
    n, segments: draws, and the largest number of segments in a row.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        identity: dict,
        *,
        num_rows: int,
        epochs: int,
        n: int,
        segments: int,
    ):
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
        self._directory = epath.Path(directory) / digest
        self._identity = identity
        self._epochs = epochs
        self._terms = np.full((epochs, num_rows, n, segments), np.nan, np.float32)

    def fill(
        self,
        terms_of: Callable[[Batch], tuple[np.ndarray, np.ndarray]],
        batches_of: Callable[[int, int], Iterable[Batch]],
        *,
        batch_rows: int,
        progress: Callable[[int, int], object] | None = None,
        block: int = 64,
    ):
        """Reads the terms that are on disk and computes the others.

        terms_of: terms_of(batch) returns the row_ids [r] and terms [r, n, s] of the whole batch,
            with the rows of all hosts in any order.
        batches_of: batches_of(epoch, start) yields this host's share of the dataset's padded
            batches, in order, from row `start` on.
        progress: progress(rows done, rows in all) is called after each batch.
        block: number of batches in a file. An interrupted run continues after the last file.

        Every host gets all terms. Only the first host reads and writes the files.
        """
        num_rows = self._terms.shape[1]
        is_first = jax.process_index() == 0
        if is_first:
            write_whole(self._directory / "identity.json", json.dumps(self._identity, indent=1))
        for epoch in range(self._epochs):
            for start in range(0, num_rows, block * batch_rows):
                stop = min(start + block * batch_rows, num_rows)
                path = self._directory / f"epoch{epoch:04d}_row{start:09d}.npy"
                part = self._terms[epoch, start:stop]
                known = _of_first_host(_read(path, part.shape) if is_first else None, part.shape)
                if known is not None:
                    part[:] = known
                else:
                    for first, batch in zip(
                        range(start, stop, batch_rows), batches_of(epoch, start), strict=False
                    ):
                        row_ids, terms = terms_of(batch)
                        part[row_ids[row_ids >= 0] - start] = terms[row_ids >= 0]
                        if progress:
                            progress(
                                epoch * num_rows + min(first + batch_rows, stop),
                                self._epochs * num_rows,
                            )
                    if is_first:
                        _write(path, part)

    def __getitem__(self, batch: Batch) -> np.ndarray:
        """Returns the terms [r, n, s] of a batch, 0 for rows of padding.

        Raises ValueError for a row or an epoch whose terms were not computed.
        """
        known = batch.row_ids >= 0
        terms = np.zeros((len(known), *self._terms.shape[2:]), np.float32)
        try:
            terms[known] = self._terms[batch.epochs[known], batch.row_ids[known]]
        except IndexError:
            terms[known] = np.nan
        if np.isnan(terms).any():
            raise ValueError(
                f"rows {batch.row_ids.tolist()} of epochs {batch.epochs.tolist()} are not in the"
                " cache"
            )
        return terms


def _of_first_host(known: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns on every host what the first host read."""
    if jax.process_count() == 1:
        return known
    if not multihost_utils.broadcast_one_to_all(np.asarray(known is not None)):
        return None
    return multihost_utils.broadcast_one_to_all(
        np.zeros(shape, np.float32) if known is None else known
    )


def _read(path: epath.Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Reads a file of terms.

    Returns None, so that the terms are computed again, if the file is missing, is damaged, has
    another shape or holds values that are not finite.
    """
    if not path.exists():
        return None
    with path.open("rb") as f:
        try:
            terms = np.load(f)
        except (ValueError, EOFError, OSError):
            return None
    return terms if terms.shape == shape and np.isfinite(terms).all() else None


def _write(path: epath.Path, terms: np.ndarray):
    content = io.BytesIO()
    np.save(content, terms)
    write_whole(path, content.getvalue())
