r"""Trains the small LLaDA that ships with the package on film reviews from a grammar.

    python -m llada_jax.train --config=configs/sft_reviews.py --workdir=runs/sft_reviews
    python -m llada_jax.convert export runs/sft_reviews runs/reviews_base --dtype=bfloat16

3,000 steps of 128 reviews take about 25 CPU minutes. Expect 96 % of 400 held-out prompts answered
by a whole review, at temperature 1 and in random order, and 43 % by a positive one.
configs/vrpo_reviews.py makes pairs of its samples.
"""

import pathlib

from configs import base

REVIEWS = pathlib.Path(__file__).resolve().parent.parent / "llada_jax" / "assets" / "reviews"


def reviews(objective: str):
    """Returns the settings that all objectives on reviews share."""
    c = base.get_config(objective)
    c.model.unroll = 4
    c.data.tokenizer = str(REVIEWS / "tokenizer.json")
    c.data.template = "plain"
    c.data.answer_multiple = 26  # 25 tokens of the longest review, and EOS
    c.optimizer.b2 = 0.99
    c.solve.prompts = "python:llada_jax.tasks.reviews:records?count=400&seed=1&split=heldout"
    c.solve.scorer = "reviews"
    c.solve.gen_length = 26
    c.solve.block_length = 26
    c.solve.steps = 26
    c.solve.temperature = 1.0
    c.solve.remasking = "random"  # with temperature 1: samples of the model itself
    c.solve.batch_size = 400
    c.solve.show = 3
    c.checkpoint.every = 100
    c.checkpoint.keep = 1
    return c


def get_config():
    c = reviews("sft")
    c.num_steps = 3000
    c.model.arch = dict(
        d_model=96,
        n_heads=4,
        n_layers=4,
        mlp_hidden_size=256,
        vocab_size=162,
        embedding_size=162,
        max_sequence_length=128,
        rope_theta=100.0,
        mask_token_id=161,
        eos_token_id=160,
        pad_token_id=160,
    )
    c.data.train = "python:llada_jax.tasks.reviews:records?count=100000&seed=0"
    c.data.row_length = 37  # bos, 10 tokens of the prompt, 26 of the review
    c.data.batch_rows = 128
    c.optimizer.peak = 3e-3
    c.optimizer.warmup_steps = 100
    return c
