r"""Fine-tunes the model of configs/pretrain_text.py on instructions and on winners of pairs.

    D=jsonl:hh_rlhf_harmless.jsonl.gz,jsonl:dolly_hhrlhf.jsonl.gz,jsonl:instructions.jsonl.gz
    python -m llada_jax.train --config=configs/sft_text.py:small --workdir=runs/sft_text \
        --config.data.train=$D

Give the preference pairs (hh_rlhf_harmless) first. A record is held out by its number, so this
config then holds out the same pairs as configs/vrpo_hh.py, and does not train on the held-out
winners of that config.

The word after the colon is the size. "small" takes six minutes on two CPU cores (2,400 tokens/s);
expect the held-out ELBO to rise from -6.78 to -5.93 nats a token. "medium" (the default) is for a
GPU and has not been run.
"""

from configs import base


def get_config(size: str = "medium"):
    c = base.get_config("sft")
    c.init_from = "runs/pretrain_text"
    c.data.row_length = 512
    c.data.holdout = 0.1
    c.data.too_long = "truncate"
    c.data.bad_records = "skip"
    c.optimizer.weight_decay = 0.1
    c.checkpoint.every = 100
    if size == "small":
        c.model.unroll = 6
        c.data.batch_rows = 8
        c.num_steps = 200
        c.optimizer.peak = 1e-3
        c.optimizer.warmup_steps = 20
    else:
        c.model.dtype = "bfloat16"
        c.data.batch_rows = 32
        c.epochs = 3
        c.optimizer.peak = 3e-4
        c.optimizer.warmup_steps = 20
    return c
