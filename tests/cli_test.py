"""What all commands share: one-line errors, exit statuses, tracebacks on demand, Ctrl-C."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

from llada_jax import cli

COMMANDS = (
    "train",
    "convert",
    "pairs",
    "sampling",
    "variance",
    "compile",
    "benchmark",
    "tokenizer",
    "metrics",
)


class Command:
    """A command whose work is `work`."""

    def __init__(self, work):
        self.main = work

    def parser(self):
        parser = cli.Parser("nothing", "Does nothing.")
        parser.add_argument("--count", type=int, default=1)
        return parser


def run(work, *argv):
    command = Command(work)
    return cli.run(command.main, command.parser(), argv)


def raising(error):
    def work(args):
        raise error

    return work


def test_the_status_is_what_main_returns():
    assert run(lambda args: None) == 0 and run(lambda args: args.count, "--count=143") == 143


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a value\n  of two lines"),
        FileNotFoundError("a value of two lines"),
        ImportError("a value of two lines"),
        FloatingPointError("a value of two lines"),
        MemoryError("a value of two lines"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, capsys, monkeypatch):
    monkeypatch.delenv("LLADA_JAX_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        run(raising(error))
    assert ended.value.code == 1 and capsys.readouterr().err == "error: a value of two lines\n"
    monkeypatch.setenv("LLADA_JAX_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        run(raising(error))
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("error: a value of two lines\n")


def test_a_bug_shows_its_traceback(capsys):
    with pytest.raises(SystemExit) as ended:
        run(raising(TypeError("a bug")))
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("Traceback") and "TypeError: a bug" in said


def test_ctrl_c_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run(raising(KeyboardInterrupt()))
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("flag", ["--count=x", "--counts=1", "--coun=1", "more"])
def test_a_wrong_flag_is_one_line_and_status_2(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        run(lambda args: 0, flag)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and said.startswith("error: ")


def test_flags_of_a_config_in_every_form(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from llada_jax.config import section\n"
        "from configs import base\n"
        "def get_config(word='x'):\n"
        "    c = base.get_config('sft')\n"
        "    c.init_from = word\n"
        "    return c\n"
    )
    parser = cli.Parser("nothing", "Does nothing.")
    parser.take_config(lambda c: "keys")
    parser.add_argument("--workdir")
    path = f"{tmp_path / 'mine.py'}:word"
    for argv in (
        ["--config", path, "--config.num_steps", "3", "--noconfig.data.append_eos"],
        [f"--config={path}", "--config.num_steps=3", "--config.data.append_eos=False"],
    ):
        args = cli.parse(parser, [*argv, "--workdir=w"])
        assert args.config.init_from == "word" and args.config.num_steps == 3
        assert args.config.data.append_eos is False and args.workdir == "w"
        assert args.config.is_locked


def test_a_broken_config_file_is_one_line(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    parser = cli.Parser("nothing", "Does nothing.")
    parser.take_config(lambda c: "keys")
    with pytest.raises(SystemExit) as ended:
        cli.parse(parser, [f"--config={tmp_path / 'broken.py'}"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "invalid syntax" in said


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config=configs/none.py"], "--config=configs/none.py: there is no such file"),
        (["--config=configs/vrpo_8b.py:v9"], "configs/vrpo_8b.py:v9 is not one of v5p-32"),
        (["--config.num_steps=3"], "without --config=FILE"),
        (
            ["--config=configs/sft_8b.py", "--config.vrpo.beta=1"],
            "config.vrpo.beta: configs/sft_8b.py (objective 'sft') has no key 'vrpo'; it has",
        ),
        (
            ["--config=configs/sft_8b.py", "--config.optimizer.peek", "1"],
            "config.optimizer.peek: the section optimizer (objective 'sft') has no key 'peek'; "
            'did you mean "peak"?',
        ),
        (["--config=configs/sft_8b.py", "--config.seed.x=1"], "the section seed"),
        (
            ["--config=configs/sft_8b.py", "--config.denoising.n_t=2.5"],
            "error: config.denoising.n_t=2.5 is not of type int",
        ),
        (
            ["--config=configs/sft_8b.py", "--config.data.append_eos=maybe"],
            "error: config.data.append_eos=maybe is not of type bool",
        ),
    ],
)
def test_a_wrong_config_or_key_says_what_there_is(flags, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser = cli.Parser("nothing", "Does nothing.")
    parser.take_config(lambda c: "keys")
    with pytest.raises(SystemExit) as ended:
        cli.parse(parser, flags)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and message in said, said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_refuses_a_wrong_flag(name, capsys):
    import importlib

    folder = (ROOT / "llada_jax" / name).is_dir()
    module = importlib.import_module(f"llada_jax.{name}{'.__main__' if folder else ''}")
    with pytest.raises(SystemExit) as ended:
        cli.parse(module.parser(), ["--help"])
    said = capsys.readouterr().out
    assert not ended.value.code and said.startswith(f"usage: python -m llada_jax.{name}")
    with pytest.raises(SystemExit) as ended:
        cli.parse(module.parser(), ["--no_such_flag"])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_runs_as_a_module(name):
    command = [sys.executable, "-m", f"llada_jax.{name}", "--help"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"llada_jax.{name}" in done.stdout, done.stderr
