r"""Trains a tiny model with a context of 4096 on GSM8K, to try benchmarks from end to end.

    python -m llada_jax.tokenizer train --input=gsm8k_train.jsonl.gz --field=answer \
        --vocab_size=1024 --out=runs/tok_gsm8k
    python -m llada_jax.train --config=configs/sft_gsm8k.py --workdir=runs/sft_gsm8k \
        --config.data.train=jsonl:gsm8k_train.jsonl.gz

200 steps take under a minute on two CPU cores. It solves nothing: see docs/results.md.
"""

from configs import base


def get_config():
    c = base.get_config("sft")
    c.model.arch = dict(
        d_model=32, n_heads=2, n_layers=2, mlp_hidden_size=96, max_sequence_length=4096
    )
    c.data.tokenizer = "runs/tok_gsm8k"
    c.data.row_length = 512
    c.data.batch_rows = 4
    c.data.too_long = "drop"
    c.data.limit = 2000
    c.num_steps = 200
    c.optimizer.peak = 3e-3
    c.optimizer.warmup_steps = 20
    return c
