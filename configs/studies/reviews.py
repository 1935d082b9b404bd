r"""The default study: VRPO on film reviews against what one would do instead of it.

    python -m llada_jax.study configs/studies/reviews.py --out=runs/study_reviews

Each arm is trained at eight grid points on validation prompts, and takes the one with the highest
reward within a KL of 1.5 nats from the reference. Then it is trained with five seeds, and judged on
test prompts.
"""

from llada_jax.study import Arm, Study, Tune

PROMPTS = "python:llada_jax.tasks.reviews:records?count=400&seed=3&split=validation"
SCHEME = {"vrpo.times": "importance", "vrpo.masks": "cyclic", "vrpo.share_in_pair": "masks"}
PEAKS = (1e-4, 2e-4, 4e-4, 8e-4)


def get_study():
    return Study(
        base="configs/vrpo_reviews.py",
        title="VRPO on film reviews",
        takes="about three hours on two CPU cores (an estimate)",
        overrides={"eval.every": 20, "solve.show": 0},
        arms={
            "vrpo": Arm(label="VRPO: n = 8, shared"),
            "naive": Arm({"vrpo.n_t": 1, "vrpo.share_noise": False}, label="naive DPO: n = 1"),
            "naive8": Arm({"vrpo.share_noise": False}, label="n = 8, not shared"),
            "shared1": Arm({"vrpo.n_t": 1}, label="n = 1, shared"),
            "winners": Arm(
                {"vrpo.beta": 1e-6, "vrpo.sft_weight": 1.0},
                label="winners alone",
                # beta has no effect here, so there are more learning rates.
                grid=[{"optimizer.peak": 5e-5 * 2**k} for k in range(8)],
            ),
            "scheme4": Arm(
                {"vrpo.n_t": 4, **SCHEME}, label="importance, cyclic, shared in the pair: n = 4"
            ),
            "scheme2": Arm(
                {"vrpo.n_t": 2, **SCHEME}, label="importance, cyclic, shared in the pair: n = 2"
            ),
        },
        seeds=[0, 1, 2, 3, 4],
        metrics={
            "reward": "solve/reward",
            "kl": "solve/kl",
            "whole": "solve/whole",
            "positive": "solve/positive",
            "accuracy": "rewards/accuracies",
        },
        baseline="vrpo",
        y="reward",
        x="kl",
        tune=Tune(
            "reward",
            grid=[
                {"optimizer.peak": peak, "vrpo.beta": beta} for beta in (0.1, 0.3) for peak in PEAKS
            ],
            budget=("kl", 1.5),
            seeds=[100],
            overrides={"solve.prompts": PROMPTS, "eval.every": 0},
        ),
    )
