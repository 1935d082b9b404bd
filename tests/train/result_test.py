"""What a run says at its end: the table, and responses before and after."""

import math

import pytest
from helpers import ROOT, config_of

from llada_jax.tasks import reviews
from llada_jax.train import make_plan, result

PROMPT = "Nora made a western about two thieves in Rome."
OLD = "The thieves are wooden. She fills her story with fog. I hated it."
NEW = "The thieves are witty. She fills her story with wonder. I loved it."
CHANGES = {
    "model.arch": dict(d_model=16, n_heads=2, n_layers=1, mlp_hidden_size=16),
    "data.tokenizer": str(ROOT / "llada_jax" / "assets" / "reviews" / "tokenizer.json"),
    "data.template": "plain",
    "num_steps": 9,
    "optimizer.warmup_steps": 1,
    "solve.prompts": "python:llada_jax.tasks.reviews:records?count=2&split=heldout",
    "solve.scorer": "reviews",
    "solve.show": 1,
}


@pytest.fixture
def plan(tmp_path):
    return make_plan(config_of(CHANGES), tmp_path, dry_run=True)


def example(text, score):
    pieces = [list(piece) for piece in reviews.TASK.shaded({"prompt": PROMPT}, text)]
    return {"prompt": PROMPT, "pieces": pieces, "score": score}


def history():
    names = ("solve/reward", "solve/whole", "solve/kl", "rewards/accuracies")
    values = [(-1.726, 0.1705), (0.5, 0.035), (0.0, 0.0), (0.5, 1e-9)]
    later = [(0.191, 0.1493), (0.9, 0.021), (3.25, 0.4), (0.75, math.nan)]
    found = []
    for step, numbers in ((0, values), (9, later)):
        pairs = zip(names, numbers, strict=True)
        found.append({"step": step, "solve/count": 200})
        for name, (value, error) in pairs:
            found[-1] |= {name: value, f"{name}_stderr": error}
    found[0] |= {"solve/gone": 1.0, "examples": [example(OLD, "reward -3, whole")]}
    found[1] |= {"examples": [example(NEW, "reward 4, whole")]}
    return found


def test_the_table_has_before_and_after_in_digits_that_mean_something(plan, capsys):
    result.print_result(plan, history())
    shown = capsys.readouterr().out.splitlines()
    table = [line.split() for line in shown[1:8]]
    assert shown[0] == f"done: 9 steps, {plan.workdir}"
    assert table == [
        ["before", "(step", "0)", "after", "(step", "9)"],
        ["answers", "to", "200", "prompts"],
        ["reward", "-1.73", "+-", "0.17", "0.19", "+-", "0.15"],
        ["whole", "0.500", "+-", "0.035", "0.900", "+-", "0.021"],
        ["KL", "from", "reference", "(nats)", "0.00", "+-", "0.00", "3.25", "+-", "0.40"],
        ["held-out", "pairs"],
        ["rewards/accuracies", "0.5000", "+-", "0.0000", "0.7500"],
    ]
    assert shown[8:] == [
        "",
        PROMPT,
        "  before: reward -3, whole",
        f"    {OLD}",
        "  after: reward 4, whole",
        f"    {NEW}",
    ]


def test_a_share_has_a_share_of_errors_removed(plan, capsys):
    for rates, said in (((0.5, 0.75), True), ((-1.0, 0.75), False), ((1.0, 1.0), False)):
        pairs = zip((0, 9), rates, strict=True)
        found = [{"step": s, "solve/rate": r, "solve/count": 4} for s, r in pairs]
        result.print_result(plan, found)
        assert ("share of the errors removed: 50.0%" in capsys.readouterr().out) == said
    assert result.one_line(plan, found[0]) == "solve/rate 1.0000"


def test_a_terminal_shows_good_and_bad_words_in_its_width(plan, monkeypatch, capsys):
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "40"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    (plan.workdir / "unmasking.html").touch()
    result.print_result(plan, history())
    shown = capsys.readouterr().out
    for word in ("wooden", "fog", "I hated it."):
        assert f"\x1b[31m{word}\x1b[0m" in shown
    for word in ("witty", "wonder", "I loved it."):
        assert f"\x1b[32m{word}\x1b[0m" in shown
    plain = shown.replace("\x1b[31m", "").replace("\x1b[32m", "").replace("\x1b[0m", "")
    *examples, path = plain[plain.index("  before: reward") :].splitlines()
    assert max(map(len, examples)) <= 40 and all(line[:2] == "  " for line in examples[:-1])
    assert path == f"how the first of them was written: {plan.workdir / 'unmasking.html'}"
