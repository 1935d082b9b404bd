"""Trains a small LLaDA from scratch on Countdown with two numbers: which operation reaches a third?

    python -m llada_jax.train --config=configs/sft_countdown.py --workdir=runs/sft_countdown

A problem is "21,63:84", its answer "63+21=84". 300 steps of 128 problems take under two minutes on
two CPU cores. Expect 45 % of 500 held-out problems solved. Training stops early on purpose, so that
VRPO has errors to remove.
"""

from configs import sft_sudoku

TOKENIZER = sft_sudoku.SUDOKU.parent / "countdown" / "tokenizer.json"


def countdown(c):
    """Returns a config of Sudoku with the tokenizer and the held-out problems of Countdown."""
    c.data.tokenizer = str(TOKENIZER)
    c.solve.prompts = (
        "python:llada_jax.tasks.countdown:records?count=500&seed=1&split=heldout&numbers=2&most=99"
    )
    c.solve.scorer = "countdown"
    c.solve.gen_length = 8
    c.solve.steps = 8
    c.solve.block_length = 8
    return c


def get_config():
    c = countdown(sft_sudoku.get_config())
    c.model.arch.vocab_size = 24
    c.model.arch.embedding_size = 24
    c.model.arch.mask_token_id = 22
    c.model.arch.eos_token_id = 18
    c.model.arch.pad_token_id = 18
    c.data.train = "python:llada_jax.tasks.countdown:records?count=13000&seed=0&numbers=2&most=99"
    c.data.row_length = 17  # bos, 8 characters of the problem, 8 of the solution
    return c
