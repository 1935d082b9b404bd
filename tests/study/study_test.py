"""Studies: their runs, choices, resume and reports by a fake trainer; and one for real."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from etils import epath
from helpers import ROOT, refusal, run_command

from llada_jax.parallel.stop import Stop
from llada_jax.study import Arm, Study, Tune, choice, definition, picture, report, runs, summary
from llada_jax.study import __main__ as command
from llada_jax.study.runs import Planner, digest
from llada_jax.study.session import Session
from llada_jax.train import STOPPED

TINY = str(ROOT / "configs" / "studies" / "tiny.py")
STUDY = definition.load(TINY)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs are named from there


class Trainer:
    """Takes the place of training: its evaluations are a formula of the run."""

    def __init__(self, stop_at=0, fails=lambda run: False):
        self.ran, self.stop_at, self.fails = [], stop_at, fails

    def __call__(self, run, watch, stop):
        if len(self.ran) + 1 == self.stop_at:
            self.stop_at = 0
            return None
        self.ran.append(str(run))
        if self.fails(run):
            return {"steps": 3, "passes": 96, "failed": "the loss is nan", "evaluations": []}
        rate, noise = run.config.optimizer.peak, 0.01 * run.seed
        gain = {"shared": 20, "naive": 10, "strict": 30}[run.arm] * rate + noise * run.seed
        evaluations = [
            {"step": 0, **evaluation(0.5 + noise, 0.2)},
            {"step": 3, **evaluation(0.5 + noise + gain, 0.2 + 400 * rate)},
        ]
        for at in evaluations:
            watch(at["step"], {f"eval/{n}": float(value) for n, value in at.items()})
        return {"steps": 3, "passes": 96, "evaluations": evaluations, "seconds": 2.0}


def evaluation(accuracy, sft):
    return {
        "solve/rate": 0.3,
        "solve/rate_stderr": 0.1,
        "rewards/accuracies": accuracy,
        "loss/sft": sft,
    }


def finish(study, out, trainer=None):
    """(the session at its end, what the trainer ran)."""
    trainer, out, stop = trainer or Trainer(), epath.Path(out), Stop()
    expected = STOPPED if trainer.stop_at else 0
    session = Session(study, out, trainer)
    try:
        status = session.to_the_end(stop, lambda: None)
    finally:
        stop.restore()
    report.write(session, out, "the command")
    assert status == expected
    return session, trainer.ran


# ---- what a study file may say


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must be different integers"),
        ({"arms": {}}, "arms is empty"),
        ({"metrics": {}}, "metrics is empty"),
        ({"baseline": "n8"}, "baseline='n8' is no arm: there are shared, naive, strict"),
        ({"x": "kl"}, "'kl' of the picture is not one of solved, accuracy, sft"),
        ({"arms": {"a/b": Arm()}, "baseline": "a/b"}, "arm 'a/b': a folder has its name"),
        ({"before": "naive"}, "arm 'naive' is the name of the evaluations at step 0"),
        ({"overrides": {"seed": 1}}, "overrides sets seed: list the seeds"),
        ({"tune": None}, "arm 'strict' has a grid or inherits one, but the study has no tune"),
        (
            {"arms": {"shared": Arm(grid=[{"vrpo.beta": 0.1}]), "naive": Arm()}},
            "unequal numbers of grid points: shared 1, naive 2",
        ),
        (
            {"arms": {"naive": Arm(inherit="naive")}},
            "arm 'naive' inherits from 'naive', which is no tuned arm",
        ),
        (
            {"tune": Tune("solved"), "arms": {"naive": Arm()}},
            "tune has no grid points",
        ),
        ({"tune": dataclasses.replace(STUDY.tune, seeds=())}, "tune.seeds is empty"),
    ],
)
def test_a_study_that_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STUDY, **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has no get_study(), which returns a Study"),
        ("def get_study(): return 3", "get_study() returns int, not a Study"),
        ("import no_such_module", "No module named 'no_such_module'"),
        (
            "from llada_jax.study import *\n"
            "def get_study(): return Study('configs/vrpo_sudoku.py', {'wide': Arm("
            "{'vrpo.nt': 1})}, [0], {'a': 'b'}, 'wide', 'a minute')",
            "arm 'wide': config.vrpo.nt: the section vrpo (objective 'vrpo') has no key 'nt';",
        ),
        (
            "from llada_jax.study import *\n"
            "def get_study(): return Study('configs/vrpo_sudoku.py', {'wide': Arm("
            "{'vrpo.n_t': 'a'})}, [0], {'a': 'b'}, 'wide', 'a minute')",
            "arm 'wide': config.vrpo.n_t='a' is not of type int",
        ),
        (
            "from llada_jax.study import *\n"
            "def get_study(): return Study('configs/vrpo_sudoku.py', {'wide': Arm("
            "{'vrpo.n_t': 0})}, [0], {'a': 'b'}, 'wide', 'a minute')",
            "arm 'wide': config.vrpo.n_t=0, n_yt=1: both must be at least 1",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, capsys, text, message):
    (tmp_path / "wrong.py").write_text(text)
    said = refusal(capsys, command, str(tmp_path / "wrong.py"), f"--out={tmp_path}")
    assert message in said


def test_wrong_flags_are_refused_in_one_line(tmp_path, capsys):
    out = f"--out={tmp_path}"
    assert "there is no such file" in refusal(capsys, command, "no.py", out)
    assert "give integers" in refusal(capsys, command, TINY, out, "--seeds=1,a")
    assert "has no key 'nt'" in refusal(capsys, command, TINY, out, "--set=vrpo.nt=3")


# ---- which runs it has


def test_grid_points_come_first_then_each_seed_is_a_round_of_all_arms(tmp_path):
    session, ran = finish(STUDY, tmp_path)
    assert ran == [
        *(f"{arm}, grid point {k}, seed 0" for arm in ("shared", "naive") for k in (0, 1)),
        *(f"{arm}, seed {seed}" for seed in (0, 1) for arm in ("shared", "naive", "strict")),
    ]
    assert session.total == len(ran) == 10
    configs = {str(run): run.config for run in session.runs()}
    assert configs["shared, grid point 1, seed 0"].num_steps == 2
    assert configs["naive, seed 1"].num_steps == 3 and configs["naive, seed 1"].seed == 1
    # The larger learning rate is better within the budget, and "strict" inherits it.
    assert all(configs[f"{arm}, seed 0"].optimizer.peak == 1e-2 for arm in STUDY.arms)
    assert configs["strict, seed 0"].vrpo.beta == 0.5
    assert not configs["naive, seed 0"].vrpo.share_noise


def test_only_runs_that_changed_run_again(tmp_path):
    finish(STUDY, tmp_path)
    assert finish(STUDY, tmp_path)[1] == []
    more = dataclasses.replace(STUDY, seeds=[0, 1, 2], overrides={**STUDY.overrides})
    assert [run.endswith("seed 2") for run in finish(more, tmp_path)[1]] == [True] * 3
    arms = {**STUDY.arms, "strict": Arm({"vrpo.beta": 0.7}, inherit="shared")}
    changed = dataclasses.replace(STUDY, arms=arms)
    assert finish(changed, tmp_path)[1] == ["strict, seed 0", "strict, seed 1"]
    assert finish(STUDY, tmp_path)[1] == []  # the old results are still there


def test_the_name_of_a_run_follows_content_and_not_what_has_no_effect(tmp_path):
    def name(**changes):
        study = dataclasses.replace(STUDY, overrides={**STUDY.overrides, **changes})
        return digest(Planner(study, epath.Path(tmp_path)).final("naive", {})[0].config)

    first = name()
    free = {"checkpoint.keep": 1, "eval.seconds_between_lines": 1.0, "data.cache_dir": "elsewhere"}
    assert name(**free) == name(**{"optimizer.b1": 0.9}) == first  # the last is the default
    assert name(**{"optimizer.b1": 0.8}) != first
    source = ROOT / "llada_jax" / "assets" / "sudoku"
    shutil.copytree(source, tmp_path / "model")
    copied = name(init_from=str(tmp_path / "model"))
    with (tmp_path / "model" / "config.json").open("a") as file:
        file.write("\n")
    runs._content.cache_clear()  # another process would read the files again
    assert name(init_from=str(tmp_path / "model")) != copied


@pytest.mark.parametrize(
    ("values", "costs", "largest", "chosen", "remark"),
    [
        ([1, 3, 2], [0, 9, 1], True, 2, ""),
        ([1, 3, 2], [0, 9, 1], False, 0, ""),
        ([2, 2, 1], [0, 0, 0], True, 0, ""),
        ([math.nan, 1, 2], [0, 0, 9], True, 1, ""),
        ([3, 1, 2], [9, 7, 8], True, 1, "no grid point is within the budget of 5"),
        ([math.nan, 1, 2], [6, 9, 8], True, 2, "no grid point is within the budget of 5"),
    ],
)
def test_the_best_point_within_the_budget_is_chosen(values, costs, largest, chosen, remark):
    point, said = choice.choose(values, costs, 5, largest=largest)
    assert point == chosen and said.startswith(remark) and bool(said) == bool(remark)


def test_an_arm_whose_points_all_failed_has_no_choice(tmp_path):
    with pytest.raises(ValueError, match="arm 'naive': all of its grid points failed"):
        finish(STUDY, tmp_path, Trainer(fails=lambda run: run.arm == "naive"))


def test_a_metric_that_no_run_has_ends_the_study_at_its_first_evaluation(tmp_path):
    trainer = Trainer()
    study = dataclasses.replace(STUDY, metrics={**STUDY.metrics, "kl": "solve/kl"})
    with pytest.raises(ValueError, match="no solve/kl: they have solve/rate, rewards/accuracies"):
        finish(study, tmp_path, trainer)
    assert len(trainer.ran) == 1


# ---- what it leaves


def test_a_stopped_study_reports_what_is_there_and_ends_the_same(tmp_path, capsys):
    finish(STUDY, tmp_path / "whole")
    _, ran = finish(STUDY, tmp_path / "parts", Trainer(stop_at=7))
    assert len(ran) == 6 and "6 of 10 runs are finished" in capsys.readouterr().out
    partial = json.loads((tmp_path / "parts" / "study.json").read_text())
    assert [row["arm"] for row in partial] == ["before", "shared", "naive"]
    _, rest = finish(STUDY, tmp_path / "parts")
    assert len(rest) == 4
    for name in ("study.json", "curves.json", "study.png", "grid.png"):
        whole, parts = ((tmp_path / k / name).read_bytes() for k in ("whole", "parts"))
        assert whole == parts, name


def test_rows_and_tables_have_means_errors_and_paired_differences(tmp_path):
    study = dataclasses.replace(STUDY, seeds=[0, 1, 2])
    session, _ = finish(study, tmp_path)
    rows = json.loads((tmp_path / "study.json").read_text())
    assert rows == summary.rows(session) and len(rows) == 12
    assert rows[0] == {
        "arm": "before",
        "seed": 0,
        "step": 0,
        "solved": 0.3,
        "solved_stderr": 0.1,
        "accuracy": 0.5,
        "sft": 0.2,
        "passes": 0,
    }
    assert (rows[-1]["arm"], rows[-1]["step"], rows[-1]["passes"]) == ("strict", 3, 96)
    # At rate 0.01 the accuracies of "naive" are 0.6, 0.62 and 0.66; of "shared" 0.1 more each.
    of = {arm: summary.by_seed(rows, arm, "accuracy") for arm in study.arms}
    naive = summary.estimate(of["naive"])
    assert naive.mean == pytest.approx(0.6267, abs=1e-4)
    assert naive.stderr == pytest.approx(
        math.sqrt((0.0267**2 + 0.0067**2 + 0.0333**2) / 6), rel=2e-3
    )
    apart = summary.paired(of["shared"], of["naive"])
    assert apart.mean == pytest.approx(0.1) and apart.stderr == pytest.approx(0, abs=1e-12)
    text = report.tables(session, rows)
    assert "0.627 +- 0.018" in text and re.search(r"\| n = 1, shared +\| 0 +\| 0.1 +\|", text)
    before = summary.paired(summary.by_seed(rows, "before", "accuracy"), of["naive"])
    assert before.errors == pytest.approx(before.mean / before.stderr)
    assert f"({before.errors:+.1f})" in text
    page = (tmp_path / "study.md").read_text()
    for part in ("the command", text, "![A tiny study](study.png)", STUDY.takes, "2s", "chosen"):
        assert part in page
    assert page.count("chosen") == 2 and "strict takes the point of n = 1, shared." in page
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert len(curves) == session.total and [at["step"] for at in curves[0]["evaluations"]] == [
        0,
        3,
    ]
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_is_named_and_is_in_no_mean(tmp_path):
    fails = Trainer(fails=lambda run: str(run) == "naive, seed 1")
    session, ran = finish(STUDY, tmp_path, fails)
    assert len(ran) == 10
    rows = summary.rows(session)
    assert [row["seed"] for row in rows if row["arm"] == "naive"] == [0]
    text = report.tables(session, rows)
    assert "Failed, and in no mean: naive, seed 1." in text
    assert finish(STUDY, tmp_path)[1] == []  # it would fail again


def test_the_picture_needs_no_second_metric_and_no_second_seed():
    study = Study("c.py", {"a": Arm()}, [0], {"m": "eval/m"}, "a", "no time")
    found = {"arm": "a", "point": None, "seed": 0, "changes": {}}
    found["evaluations"] = [{"step": k, "eval/m": k} for k in (0, 5)]
    assert picture.draw(study, [found]).startswith(b"\x89PNG")
    assert picture.draw(study, []) is None


def test_the_grid_has_a_picture_if_its_points_change_one_number_only():
    found = {arm: [[0.5, 0.6], [math.nan, 0.7]] for arm in ("shared", "naive")}
    assert picture.draw_grid(STUDY, found).startswith(b"\x89PNG")
    for point in ({"vrpo.beta": 0.1, "vrpo.n_t": 2}, {"vrpo.kind": "ipo"}):
        tune = dataclasses.replace(STUDY.tune, grid=[point, point])
        study = dataclasses.replace(STUDY, tune=tune)
        assert picture.draw_grid(study, found) is None
    assert picture.draw_grid(STUDY, {}) is None


def test_report_only_writes_reports(tmp_path, capsys, monkeypatch):
    finish(STUDY, tmp_path)
    before = (tmp_path / "study.json").read_text()
    (tmp_path / "study.json").unlink()
    monkeypatch.setattr(Session, "to_the_end", None)
    assert run_command(command, TINY, f"--out={tmp_path}", "--report") == 0
    assert (tmp_path / "study.json").read_text() == before
    assert "less naive DPO, paired by seed" in capsys.readouterr().out
    assert run_command(command, TINY, f"--out={tmp_path}", "--report", "--seeds=1") == 0
    assert {row["seed"] for row in json.loads((tmp_path / "study.json").read_text())} == {1}


# ---- for real


@pytest.mark.slow
def test_a_killed_study_ends_as_an_undisturbed_one_and_compiles_once(tmp_path):
    def start(out, *more):
        argv = [sys.executable, "-m", "llada_jax.study", TINY, f"--out={tmp_path / out}", *more]
        one_device = os.environ | {"XLA_FLAGS": ""}
        return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=one_device)

    def programs():
        return len(list((tmp_path / "whole" / "compiled").glob("*-cache")))

    whole = start("whole", "--seeds=0")
    assert whole.wait() == 0
    compiled = programs()
    whole = start("whole")
    said, _ = whole.communicate()
    assert whole.returncode == 0 and "run 8 of 10 (shared, seed 1)" in said
    assert compiled > 20 and programs() == compiled  # another seed compiles nothing
    shutil.copytree(tmp_path / "whole" / "compiled", tmp_path / "parts" / "compiled")
    for sign, status, after in ((signal.SIGTERM, STOPPED, "run 3"), (signal.SIGKILL, -9, "run 6")):
        stopped = start("parts")
        for line in stopped.stdout:
            if line.startswith(after):
                break
        time.sleep(2)
        stopped.send_signal(sign)
        assert stopped.wait() == status
    assert start("parts").wait() == 0
    for name in ("study.json", "curves.json"):
        one, other = ((tmp_path / k / name).read_text() for k in ("whole", "parts"))
        assert one == other
