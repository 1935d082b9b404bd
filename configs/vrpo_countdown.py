r"""VRPO on the small model of configs/sft_countdown.py, with pairs from its own samples.

    python -m llada_jax.pairs --model=runs/sft_countdown --scorer=countdown --template=plain \
        --prompts='python:llada_jax.tasks.countdown:records?count=4000&seed=2&numbers=2&most=99' \
        --samples=8 --gen_length=8 --block_length=8 --steps=8 --batch_size=500 \
        --out=runs/countdown_pairs.jsonl.gz
    python -m llada_jax.train --config=configs/vrpo_countdown.py --workdir=runs/vrpo_countdown

140 steps of 32 pairs take two minutes on two CPU cores. Expect the share of 500 held-out problems
solved to rise from 45 % to 65 %, and to 58 % with the published weight of the denoising loss
(`--config.vrpo.sft_weight=0.05`).
"""

from configs import sft_countdown, sft_sudoku


def get_config():
    c = sft_countdown.countdown(sft_sudoku.sudoku("vrpo"))
    c.init_from = "runs/sft_countdown"
    c.data.tokenizer = ""  # that of the model
    c.data.train = "jsonl:runs/countdown_pairs.jsonl.gz"
    c.data.holdout = 0.05
    c.data.row_length = 34  # one pair: bos, problem and answer, twice
    c.data.batch_rows = 32
    c.num_steps = 140
    c.optimizer.warmup_steps = 10
    c.optimizer.peak = 3e-4
    c.vrpo.beta = 0.2
    c.vrpo.sft_weight = 1.0
    c.vrpo.n_t = 8
    return c
