r"""VRPO makes the film reviews of a small model positive, and keeps most of them whole.

    python -m llada_jax.train --config=configs/vrpo_reviews.py --workdir=runs/vrpo_reviews

The shipped model (configs/sft_reviews.py) writes reviews of which 43 % are positive. The pairs are
two samples for each of 3,000 prompts. The winner has the higher reward: the number of positive
words minus that of negative words, and 6 less if the review breaks the grammar
(llada_jax/tasks/reviews.py). 60 steps of 32 pairs take about four CPU minutes.
One run made 94 % positive and left 89 % whole (97 % before), at a KL of 1.0 nats.

It takes n = 8 draws, shares the noise, and weighs the denoising loss on the winner by 0.05, as
published. For comparison, naive DPO and the winners alone:

    python -m llada_jax.train --config=configs/vrpo_reviews.py --workdir=runs/naive_reviews \
        --config.vrpo.n_t=1 --config.vrpo.share_noise=False
    python -m llada_jax.train --config=configs/vrpo_reviews.py --workdir=runs/winners_reviews \
        --config.vrpo.beta=1e-6 --config.vrpo.sft_weight=1

configs/studies/reviews.py compares them at their best learning rates. This made the pairs:

    python -m llada_jax.pairs --model=llada_jax/assets/reviews --scorer=reviews --template=plain \
        --prompts='python:llada_jax.tasks.reviews:records?count=3000&seed=2' --samples=2 \
        --gen_length=26 --block_length=26 --steps=26 --remasking=random --batch_size=500 \
        --out=runs/reviews_pairs.jsonl.gz
"""

from configs import sft_reviews


def get_config():
    c = sft_reviews.reviews("vrpo")
    c.init_from = str(sft_reviews.REVIEWS)
    c.data.tokenizer = ""  # that of the shipped model
    c.data.train = f"jsonl:{sft_reviews.REVIEWS / 'pairs.jsonl.gz'}"
    c.data.holdout = 0.05
    c.data.row_length = 74  # one pair: bos, prompt and review, twice
    c.data.batch_rows = 32
    c.num_steps = 60
    c.vrpo.beta = 0.1
    c.vrpo.sft_weight = 0.05
    c.vrpo.n_t = 8
    c.solve.kl_draws = 8
    c.optimizer.peak = 2e-4
    c.optimizer.warmup_steps = 5
    return c
