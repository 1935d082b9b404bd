"""Trains a small LLaDA from scratch on Countdown with two numbers: which operation reaches a third?

    python -m llada_jax.train --config=configs/sft_countdown.py --workdir=runs/sft_countdown

A problem is "21,63:84", its answer "63+21=84". 300 steps of 128 problems take under two minutes on
two CPU cores. Expect 45 % of 500 held-out problems solved. Training stops early on purpose, so that
VRPO has errors to remove.
"""

import pathlib

from configs import base

TOKENIZER = pathlib.Path(__file__).resolve().parent.parent / "llada_jax" / "assets" / "countdown"


def countdown(objective: str):
    """Returns the settings that all objectives on Countdown share."""
    c = base.get_config(objective)
    c.model.unroll = 4
    c.data.tokenizer = str(TOKENIZER / "tokenizer.json")
    c.data.template = "plain"
    c.data.append_eos = False
    c.optimizer.peak = 2e-3
    c.solve.prompts = (
        "python:llada_jax.tasks.countdown:records?count=500&seed=1&split=heldout&numbers=2&most=99"
    )
    c.solve.scorer = "countdown"
    c.solve.gen_length = 8
    c.solve.steps = 8
    c.solve.block_length = 8
    c.solve.batch_size = 100
    return c


def get_config():
    c = countdown("sft")
    c.num_steps = 300
    c.model.arch = dict(
        d_model=64,
        n_heads=4,
        n_layers=4,
        mlp_hidden_size=192,
        vocab_size=24,
        embedding_size=24,
        max_sequence_length=128,
        rope_theta=100.0,  # see configs/sft_sudoku.py
        mask_token_id=22,
        eos_token_id=18,
        pad_token_id=18,
    )
    c.data.train = "python:llada_jax.tasks.countdown:records?count=13000&seed=0&numbers=2&most=99"
    c.data.row_length = 17  # bos, 8 characters of the problem, 8 of the solution
    c.data.batch_rows = 128
    c.optimizer.warmup_steps = 50
    c.optimizer.schedule = "constant"
    c.optimizer.end_fraction = 1.0
    return c
