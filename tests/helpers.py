"""What several tests share: paths, a tiny model's configuration, packed batches, toy logits."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from llada_jax import cli
from llada_jax.batch import Batch

ROOT = pathlib.Path(__file__).resolve().parent.parent


def make_batch(layout, length, vocab=39, first_row=0):
    """Packed rows: (prompt, response) lengths of the segments of each row, tokens at random.

    A row without segments is a row of padding.
    """
    rng = np.random.default_rng(first_row)
    rows = len(layout)
    fields = {
        name: np.zeros((rows, length), np.int32) for name in ("tokens", "segment_ids", "positions")
    }
    response = np.zeros((rows, length), bool)
    fields["tokens"][:] = rng.integers(0, vocab, (rows, length))
    for r, segments in enumerate(layout):
        start = 0
        for s, (prompt, answer) in enumerate(segments):
            stop = start + prompt + answer
            fields["segment_ids"][r, start:stop] = s + 1
            fields["positions"][r, start:stop] = np.arange(stop - start)
            response[r, start + prompt : stop] = True
            start = stop
    row_ids = [r + first_row if segments else -1 for r, segments in enumerate(layout)]
    ids = {"row_ids": np.asarray(row_ids, np.int32), "epochs": np.zeros(rows, np.int32)}
    batch = Batch(
        **fields, response_mask=response, **ids, num_segments=max(map(len, layout), default=0)
    )
    return jax.tree.map(jnp.asarray, batch)


def config_of(changes):
    """The config of `changes["objective"]` (VRPO without it), changed."""
    config = base.get_config(changes.get("objective", "vrpo"))
    config.update_from_flattened_dict(changes)
    return config


def run_command(module, *argv):
    """The exit status of a command, run in this process."""
    return cli.run(module.main, module.parser(), argv)


def refusal(capsys, module, *argv, status=1):
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        run_command(module, *argv)
    said = capsys.readouterr().err.splitlines()
    assert error.value.code == status and len(said) == 1, (error.value.code, said)
    return said[0]
