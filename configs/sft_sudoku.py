"""Trains the small LLaDA that ships with the package on 4x4 Sudoku.

    python -m llada_jax.train --config=configs/sft_sudoku.py --workdir=runs/sft_sudoku
    python -m llada_jax.convert export runs/sft_sudoku runs/sudoku_base --dtype=bfloat16

300 steps of 128 puzzles take about two minutes on two CPU cores. Expect 57 % of 500 held-out
puzzles solved. Training stops early on purpose, so that VRPO has errors to remove.
"""

import pathlib

from configs import base

SUDOKU = pathlib.Path(__file__).resolve().parent.parent / "llada_jax" / "assets" / "sudoku"


def sudoku(objective: str):
    """Returns the settings that all objectives on Sudoku share."""
    c = base.get_config(objective)
    c.model.unroll = 4
    c.data.tokenizer = str(SUDOKU / "tokenizer.json")
    c.data.template = "plain"
    c.data.append_eos = False
    c.optimizer.peak = 2e-3
    c.checkpoint.every = 20
    c.checkpoint.keep = 30
    c.solve.prompts = "python:llada_jax.tasks.sudoku:records?count=500&seed=1&split=heldout"
    c.solve.scorer = "llada_jax.tasks.sudoku:score"
    c.solve.gen_length = 16
    c.solve.steps = 16
    c.solve.block_length = 16
    c.solve.batch_size = 100
    return c


def get_config():
    c = sudoku("sft")
    c.num_steps = 300
    c.model.arch = dict(
        d_model=64,
        n_heads=4,
        n_layers=4,
        mlp_hidden_size=192,
        vocab_size=12,
        embedding_size=16,
        max_sequence_length=128,
        rope_theta=100.0,  # wavelengths from 6 to 350 tokens distinguish the 33 places of a row
        mask_token_id=10,
        eos_token_id=6,
        pad_token_id=6,
    )
    c.data.train = "python:llada_jax.tasks.sudoku:records?count=40000&seed=0"
    c.data.row_length = 33  # bos, 16 cells of the puzzle, 16 cells of the solution
    c.data.batch_rows = 128
    c.optimizer.warmup_steps = 50
    # The learning rate never decays here. VRPO goes on from this model and decays it to zero.
    c.optimizer.schedule = "constant"
    c.optimizer.end_fraction = 1.0
    return c
