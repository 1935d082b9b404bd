r"""The first example: VRPO makes film reviews positive and keeps their language whole.

    python -m llada_jax.train --config=configs/vrpo_reviews.py --workdir=runs/vrpo_reviews

The shipped model writes reviews of which half are positive. The pairs are samples of it: the winner
has the higher reward, the number of positive words minus that of negative words, and 6 less if the
review breaks the grammar (llada_jax/tasks/reviews.py).

It takes n = 8 draws, shares the noise, and weighs the denoising loss on the winner by 0.05, as
published. For comparison, naive DPO and the winners alone:

    python -m llada_jax.train --config=configs/vrpo_reviews.py --workdir=runs/naive_reviews \
        --config.vrpo.n_t=1 --config.vrpo.share_noise=False
    python -m llada_jax.train --config=configs/vrpo_reviews.py --workdir=runs/winners_reviews \
        --config.vrpo.beta=1e-6 --config.vrpo.sft_weight=1
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
