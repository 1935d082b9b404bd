"""The command `chat`: turns, settings and refusals, in plain lines and in a terminal."""

import codecs
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT
from rich.console import Console

from llada_jax import cli, sampling, tokenizer
from llada_jax.chat import __main__ as command
from llada_jax.chat import screen, session
from llada_jax.checkpoints import published
from llada_jax.data.templates import encode_prompt
from llada_jax.models.llada import LLaDA, ModelConfig
from llada_jax.sampling import loop

TEXTS = ["hello there", "the café is über good", "numbers 12 and 345 日本"] * 9
FLAGS = ["--gen_length=16", "--block_length=16", "--steps=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tiny model with a tokenizer that has the tokens of the chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    tok = tokenizer.train(TEXTS, folder / "tokenizer", vocab_size=320)
    config = ModelConfig(
        d_model=16, n_heads=2, n_layers=1, vocab_size=tok.vocab_size, mask_token_id=tok.mask_id,
        eos_token_id=tok.eos_id, max_sequence_length=160,
    )  # fmt: skip
    model = LLaDA(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    published.export(model, nn.unbox(params), folder / "model", tokenizer_from=folder / "tokenizer")
    return folder / "model"


@pytest.fixture(scope="module")
def tok(folder):
    return tokenizer.load(folder)


class Script:
    """Stands for `sampling.stream`: writes the answers given, and keeps what it was asked."""

    def __init__(self, tok, *answers):
        self.tok, self.answers, self.asked = tok, list(answers), []

    def __call__(self, logits_fn, prompts, *, attention_mask, gen_length, **settings):
        ids = [int(i) for i in prompts[0][attention_mask[0] == 1]]
        self.asked.append({"ids": ids, "width": prompts.shape[1], **settings})
        answer, stop_after = self.answers.pop(0), None
        if isinstance(answer, tuple):
            answer, stop_after = answer
        written = self.tok.encode(answer)
        tokens = np.full(gen_length, self.tok.eos_id)
        tokens[: len(written)] = written
        for done in range(4, gen_length + 1, 4):  # even places first
            order = np.argsort(np.arange(gen_length) % 2, kind="stable")
            steps = np.full(gen_length, -1)
            steps[order[:done]] = 1 + np.arange(done) // 4
            yield self.trace(prompts[0], np.where(steps > 0, tokens, self.tok.mask_id), steps)
            if done == stop_after:
                raise KeyboardInterrupt

    def trace(self, prompt, tokens, steps):
        after = lambda given, x: np.concatenate([np.full(len(prompt), given), x])[None]
        steps = after(0, steps)
        return sampling.Trace(
            tokens=np.concatenate([prompt, tokens])[None],
            steps=steps,
            confidence=np.resize(np.float32([0.95, 0.3, 0.6]), steps.shape),
            revocations=np.zeros_like(steps),
            passes=np.array(steps.max()),
            row_passes=steps.max(1),
            lengths=np.array([len(tokens)]),
            finished=np.array([False]),
        )


def plain(monkeypatch, capsys, folder, lines, *flags):
    """(standard output, standard error) of the command, as lines."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    cli.run(command.main, command.parser(), [f"--model={folder}", *FLAGS, *flags])
    return [text.splitlines() for text in capsys.readouterr()]


def test_turns_go_on_in_the_chat_template(monkeypatch, capsys, folder, tok):
    script = Script(tok, "good numbers", "", "the 12", "the 12", "345")
    monkeypatch.setattr(sampling, "stream", script)
    lines = ["hello", "again", "/undo", "", "once more", "/new", " /etc is there", "/quit", "no"]
    out, said = plain(monkeypatch, capsys, folder, lines, "--temperature=1", "--seed=3")
    assert out == ["good numbers", "", "the 12", "the 12"]
    assert said[1:] == ["the answer is empty", "forgotten: again", "a new conversation"]
    turn = lambda role, text: {"role": role, "content": text}
    first = [turn("user", "hello"), turn("assistant", "good numbers")]
    for messages, asked in zip(
        (
            first[:1],
            [*first, turn("user", "again")],
            [*first, turn("user", "once more")],
            [turn("user", "/etc is there")],
        ),
        script.asked,
        strict=True,
    ):
        assert asked["ids"] == encode_prompt(tok, messages, "chat")
        assert asked["width"] % 64 == 0 and asked["temperature"] == 1 and asked["stop_at_eos"]
    keys = {tuple(jax.random.key_data(asked["key"]).tolist()) for asked in script.asked}
    assert len(keys) == 4  # no two answers draw alike


def test_what_is_refused_is_one_line_and_the_chat_goes_on(
    monkeypatch, capsys, folder, tok, tmp_path
):
    monkeypatch.setattr(sampling, "stream", Script(tok, "good"))
    (tmp_path / "there.json").touch()
    refused = {
        "/set stepz 3": "there is no setting 'stepz'; did you mean \"steps\"?",
        "/set steps": "write /set NAME VALUE",
        "/set steps x": "argument --steps: invalid int value: 'x'",
        "/set commit no": "invalid choice: 'no'",
        "/set stop_at_eos 1": "stop_at_eos=1 must be true or false",
        "/set commit threshold": 'commit="threshold" needs threshold=',
        "/set steps 2 top_k 3": "top_k=3 has no effect at temperature=0",
        "/set gen_length 160 block_length 160": "leaves no room for a prompt",
        "/undo": "there is no turn to undo",
        "/nothing": "there is no command /nothing; /help lists them",
        "/save": "write /save FILE",
        f"/save {tmp_path}/there.json": "exists: give another file",
        "word " * 60: "and gen_length=16, the model takes 160: /new begins anew, /undo",
    }
    out, said = plain(monkeypatch, capsys, folder, [*refused, "/show", "hello"])
    assert out == ["good"] and len(said) > len(refused)
    for line, message in zip(said[1:], refused.values(), strict=False):
        assert line.startswith("error: ") and message in line
    assert "steps                   4" in said  # "steps 2" was not taken alone


def test_settings_reach_the_sampler_and_the_file(monkeypatch, capsys, folder, tok, tmp_path):
    script = Script(tok, "one", "two")
    monkeypatch.setattr(sampling, "stream", script)
    lines = [
        "/set commit=threshold threshold=0.5 stop_at_eos=false initial_length=9",
        "hello",
        "/set commit schedule threshold none initial_length none --steps=8",
        "again",
        f"/save {tmp_path}/new/chat.json",
    ]
    _, said = plain(monkeypatch, capsys, folder, lines)
    assert said[1] == "commit=threshold, threshold=0.5, stop_at_eos=False, initial_length=9"
    first, second = script.asked
    assert (first["commit"], first["threshold"], first["stop_at_eos"]) == ("threshold", 0.5, False)
    assert first["growth"].initial_length == 9 and "growth" not in second
    assert (second["commit"], second["steps"]) == ("schedule", 8) and "threshold" not in second
    saved = json.loads((tmp_path / "new" / "chat.json").read_text())
    assert [m["content"] for m in saved["messages"]] == ["hello", "one", "again", "two"]
    assert saved["settings"]["steps"] == 8 and saved["model"] == str(folder)


@pytest.mark.slow
def test_a_real_model_answers(monkeypatch, capsys, folder, tok):
    # Truth: in one step, the best token of each position, from the model itself without padding.
    programs = loop.advance._cache_size()
    lines = ["hello", "/new", "the café"]
    out, _ = plain(monkeypatch, capsys, folder, lines, "--steps=1", "--logits_eos_inf")
    assert loop.advance._cache_size() == programs + 1  # for prompts of two lengths
    logits_fn, *_ = command.loading.open_model(str(folder))
    answers = []
    for text in lines[::2]:
        prompt = encode_prompt(tok, text, "chat")
        row = jnp.array([prompt + 16 * [tok.mask_id]])
        logits = np.array(logits_fn(row)[0, len(prompt) :])
        logits[:, [tok.mask_id, tok.eos_id]] = -np.inf
        answer = tok.decode(sampling.trim(logits.argmax(-1), tok.eos_id, tok.eot_id))
        answers.append(screen.printable(answer).strip())
    assert "\n".join(out) == "\n".join(answers) and len(answers[0]) > 3


class Tty:
    """A pseudo-terminal in this process: what is typed, and what is shown."""

    def __init__(self, monkeypatch, typed):
        self.main, other = pty.openpty()
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr("sys.stdin", os.fdopen(os.dup(other), "r"))
        monkeypatch.setattr("sys.stdout", os.fdopen(other, "w"))
        os.write(self.main, typed.encode())

    def shown(self):
        shown = b""
        while select.select([self.main], [], [], 0.1)[0]:
            shown += os.read(self.main, 1 << 16)
        return shown.decode()


def test_a_terminal_shows_the_unmasking(monkeypatch, folder, tok, tmp_path):
    script = Script(tok, "numbers 12 and 345", ("good numbers and 345", 8), ("", 4))
    monkeypatch.setattr(sampling, "stream", script)
    tty = Tty(monkeypatch, f"hello\nagain\nstop\n/save {tmp_path}/chat.json\n\x04")
    cli.run(command.main, command.parser(), [f"--model={folder}", *FLAGS])
    shown = tty.shown()
    assert "compiling 0 s" in shown and screen.MASK in shown
    assert "\x1b[32m" in shown and "\x1b[1;33m" in shown  # green at the end; yellow and new
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown)
    assert "numbers 12 and 345" in text and re.search(
        r"pass 4  (\d+)/\1 tokens  [\d.]+ tokens/s", text
    )
    assert text.count("stopped: what is written is kept; /undo forgets it") == 1
    assert text.count("stopped: nothing is written, the message is forgotten") == 1
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [m["content"] for m in messages][:3] == ["hello", "numbers 12 and 345", "again"]
    assert len(messages) == 4 and session.GAP in messages[3]["content"]


def test_words_are_the_text(tok):
    for text in [*TEXTS[:3], "ß 12 ☃ there"]:  # characters of several tokens
        ids = tok.encode(text)
        found = session.words(tok.decode, ids)
        assert "".join(found) == tok.decode(ids) and len(found) == len(ids)
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(found)
    broken = [i for i in tok.encode("ß") if "\N{REPLACEMENT CHARACTER}" in tok.decode([i])][:1]
    assert [bool(word) for word in session.words(tok.decode, broken * 9)].count(True) > 1
    found = session.words(tok.decode, [*ids[:2], None, *ids[3:]])
    assert found[2] is None and "".join(found[:2]) == tok.decode(ids[:2])


def frame_of(words, confidence=1.0):
    fresh = np.zeros(len(words), bool)
    return session.Frame(words, fresh, np.full(len(words), confidence), passes=1)


def test_a_gap_stands_for_masks():
    assert frame_of([None, "a", None, None, " b", None]).text == "…a… b"


def test_a_long_answer_shows_the_lines_up_to_its_last_token():
    console = Console(width=10, height=8, file=io.StringIO())
    words = [f"word {k:02}\n" for k in range(20)] + [None] * 100
    lines = screen.cropped(console, frame_of(words), 5).plain.splitlines()
    assert lines == [*(f"word {k}" for k in range(16, 20)), screen.MASK]
    short = frame_of(["a", None, None])
    assert screen.cropped(console, short, 5).plain == "a" + 2 * screen.MASK


def test_control_characters_reach_no_terminal():
    assert screen.printable("a\x1b[2Jb\r\x07\x9b é👩‍🚀\n") == "a[2Jb é👩‍🚀\n"


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_of_a_real_process(folder):
    main, other = pty.openpty()
    flags = ["--gen_length=96", "--block_length=96", "--steps=96", "--logits_eos_inf"]
    chat = subprocess.Popen(
        [sys.executable, "-m", "llada_jax.chat", f"--model={folder}", *flags],
        stdin=other, stdout=other, stderr=other, cwd=ROOT, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    shown, decode = "", codecs.getincrementaldecoder("utf-8")().decode

    def until(*texts):
        """Reads up to one of the texts; returns it."""
        nonlocal shown
        while not (found := [text for text in texts if text in shown]):
            assert select.select([main], [], [], 120)[0], shown
            shown += decode(os.read(main, 1 << 16))
        shown = shown.partition(found[0])[2]
        return found[0]

    try:
        until("> ")
        for _ in range(9):  # on a busy machine the answer may be whole before it can be stopped
            os.write(main, b"hello\n")
            until("/96 tokens")
            chat.send_signal(signal.SIGINT)
            said = until("stopped: what is written is kept", "Ctrl-D or /quit leaves")
            until("> ")
            if said.startswith("stopped"):
                break
        assert said.startswith("stopped")
        os.write(main, b"\x04")
        assert chat.wait(60) == 0
    finally:
        chat.kill()


@pytest.mark.slow
def test_a_pipe_gets_answers_and_no_control_codes(folder):
    done = subprocess.run(
        [sys.executable, "-m", "llada_jax.chat", f"--model={folder}", *FLAGS],
        input="hello\n/show\nagain\n", capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "FORCE_COLOR": "1"}, timeout=300,
    )  # fmt: skip
    assert "\x1b" not in done.stdout + done.stderr and "2 turns" not in done.stdout
    assert "1 turns, " in done.stderr
