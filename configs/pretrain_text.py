r"""Pre-trains a LLaDA on plain text, with a tokenizer of its own.

    python -m llada_jax.tokenizer train --input='text/*.jsonl.xz' --vocab_size=2048 \
        --out=runs/tokenizer
    python -m llada_jax.train --config=configs/pretrain_text.py:small \
        --workdir=runs/pretrain_text \
        --config.data.train=jsonl:text/stories.jsonl.xz,jsonl:text/books.jsonl.xz

The word after the colon is the size:

- "small": 1.8 M parameters at a vocabulary of 2048, for two CPU cores. It takes about ten minutes
  on two free cores (2,700 tokens/s). Expect a held-out ELBO of -6.26 nats a token (-7.66 before).
- "medium" (the default): about 20 M parameters at a vocabulary of 8192, for one GPU: 10,000 steps
  of 65,536 tokens. It has not been run.
"""

from configs import base

ARCH = {
    "small": dict(
        d_model=128, n_heads=4, n_layers=6, mlp_hidden_size=384, max_sequence_length=1024
    ),
    "medium": dict(
        d_model=384, n_heads=6, n_layers=8, mlp_hidden_size=1024, max_sequence_length=1024
    ),
}


def get_config(size: str = "medium"):
    if size not in ARCH:
        raise ValueError(f"configs/pretrain_text.py:{size} is not one of {', '.join(ARCH)}")
    c = base.get_config("pretrain")
    c.model.arch = ARCH[size]
    c.data.tokenizer = "runs/tokenizer"
    c.data.row_length = 256
    c.data.holdout = 0.02
    c.denoising.crop_probability = 0.01
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.1
    c.optimizer.end_fraction = 0.1
    c.checkpoint.every = 200
    if size == "small":
        c.model.unroll = 6
        c.data.limit = 740  # number of records: the stories and about forty books
        c.data.holdout = 0.01
        c.data.batch_rows = 16
        c.num_steps = 500
        c.optimizer.peak = 2e-3
        c.optimizer.warmup_steps = 50
        c.eval.every = 250
    else:
        c.model.dtype = "bfloat16"
        c.model.logps_chunk = 1024
        c.data.batch_rows = 256
        c.num_steps = 10_000
        c.optimizer.peak = 1e-3
        c.optimizer.warmup_steps = 500
        c.eval.every = 2000
    return c
