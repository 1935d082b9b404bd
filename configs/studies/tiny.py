"""A study of seconds: two arms and two learning rates on Sudoku, three steps each."""

from llada_jax.study import Arm, Study, Tune


def get_study():
    return Study(
        base="configs/vrpo_sudoku.py",
        title="A tiny study",
        about="It only shows how studies work.",
        takes="a minute on two CPU cores",
        overrides={
            "num_steps": 3,
            "data.batch_rows": 8,
            "optimizer.warmup_steps": 1,
            "vrpo.n_t": 1,
            "checkpoint.every": 2,
            "eval.every": 2,
            "eval.n_t": 2,
            "eval.batch_rows": 64,
            "solve.limit": 10,
            "solve.steps": 4,
        },
        arms={
            "shared": Arm(label="n = 1, shared"),
            "naive": Arm({"vrpo.share_noise": False}, label="naive DPO"),
            "strict": Arm({"vrpo.beta": 0.5}, inherit="shared"),
        },
        seeds=[0, 1],
        metrics={"solved": "solve/rate", "accuracy": "rewards/accuracies", "sft": "loss/sft"},
        baseline="naive",
        x="sft",
        y="accuracy",
        tune=Tune(
            "accuracy",
            grid=[{"optimizer.peak": 1e-3}, {"optimizer.peak": 1e-2}],
            budget=("loss/sft", 5.0),
            overrides={"num_steps": 2},
        ),
    )
