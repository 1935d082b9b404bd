r"""VRPO on HH-RLHF pairs, from the model of configs/sft_text.py.

    python -m llada_jax.train --config=configs/vrpo_hh.py --workdir=runs/vrpo_hh \
        --config.data.train=jsonl:hh_rlhf_harmless.jsonl.gz

A tenth of the pairs is held out. 60 steps are for two CPU cores, and take 10 to 20 s each if the
cores are busy. Expect a held-out implicit-reward accuracy of 62.3 +- 3.9 % of 159 pairs (50 %
before). On the instructions instead of HH-RLHF it was 56.8 +- 4.2 %.

A GPU should take a whole epoch at n = 8 in minutes; this has not been run:
`--config.num_steps=0 --config.vrpo.n_t=8 --config.model.dtype=bfloat16`.
"""

from configs import base


def get_config():
    c = base.get_config("vrpo")
    c.init_from = "runs/sft_text"
    c.model.unroll = 6
    c.data.row_length = 512
    c.data.batch_rows = 8
    c.data.holdout = 0.1
    c.data.too_long = "truncate"
    c.data.bad_records = (
        "skip"  # some transcripts differ before the last turn, some answers are empty
    )
    c.num_steps = 60
    c.vrpo.n_t = 4
    c.optimizer.peak = 1e-4
    c.optimizer.warmup_steps = 10
    c.checkpoint.every = 25
    return c
