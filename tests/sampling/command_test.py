"""The command `sampling`: responses to a file, continued, and pictures of how they were written."""

import io
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT

from llada_jax import cli, sampling
from llada_jax.checkpoints import loading
from llada_jax.sampling import __main__ as command
from llada_jax.sampling import picture, replay

PUZZLES = ["0010020000400300", "0001040240003010", "4000010000200003"]
FLAGS = [
    f"--model={ROOT / 'llada_jax/assets/sudoku'}",
    "--template=plain",
    "--gen_length=16",
    "--block_length=16",
    "--steps=8",
    "--batch_size=2",
]


def run(*flags):
    return cli.run(command.main, command.parser(), [*FLAGS, *flags])


@pytest.mark.slow
def test_a_file_of_responses_is_continued(tmp_path, monkeypatch, capsys):
    run(*(f"--prompt={puzzle}" for puzzle in PUZZLES))
    printed = capsys.readouterr().out.splitlines()
    out, whole = tmp_path / "new" / "out.jsonl", tmp_path / "whole.jsonl"
    lines = [json.dumps({"prompt": puzzle, "text": "not read"}) + "\n" for puzzle in PUZZLES]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    run(f"--prompts=jsonl:{tmp_path}/prompts.jsonl", f"--out={whole}")
    found = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [line["prompt"] for line in found] == PUZZLES
    assert [line["text"] for line in found] == printed
    assert all(line["passes"] == 8 and line["seconds"] > 0 for line in found)
    assert found[0]["settings"]["steps"] == 8 and found[0]["settings"]["seed"] == 0

    # A run that was killed while it wrote its second line.
    out.parent.mkdir()
    out.write_text("".join(whole.read_text().splitlines(keepends=True)[:2])[:-9])
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PUZZLES)))
    run("--prompts=-", f"--out={out}")
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["text"] for line in again] == printed
    assert again[0] == found[0] and "response 3/3" in capsys.readouterr().out

    with pytest.raises(SystemExit):
        run(f"--prompts=jsonl:{tmp_path}/prompts.jsonl", f"--out={out}", "--seed=1")
    assert "is not of these prompts and settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(f"--prompts=jsonl:{tmp_path}/prompts.jsonl", f"--out={out}", "--model=another")
    assert "is not of these prompts and settings" in capsys.readouterr().err
    (tmp_path / "notes.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit):
        run(f"--prompt={PUZZLES[0]}", f"--out={tmp_path}/notes.jsonl")
    assert "is not of these prompts and settings" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_on_eight_devices_writes_the_same(capsys):
    prompts = [f"--prompt={puzzle}" for puzzle in PUZZLES]
    run(*prompts, "--cache=dual")
    alone = capsys.readouterr().out
    run(*prompts, "--cache=dual", "--fsdp=2", "--tensor=2", "--batch_size=4")
    assert capsys.readouterr().out == alone


@pytest.mark.slow
def test_of_two_hosts_the_first_prints_and_writes(tmp_path, capsys):
    """They compute together: rows and parameters are split over the devices of both."""
    prompts = [f"--prompt={puzzle}" for puzzle in PUZZLES]
    run(*prompts)
    alone = capsys.readouterr().out.splitlines()
    out = tmp_path / "out.jsonl"

    def two_hosts(*flags):
        command = [sys.executable, "launch/local_cluster.py", "--processes=2", "--devices=2", "--"]
        command += [sys.executable, "-m", "llada_jax.sampling", *FLAGS, *prompts, *flags]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr
        return [line for line in found.stdout.splitlines() if "] 20" not in line]

    assert two_hosts("--fsdp=2", "--batch_size=4") == [f"[0] {text}" for text in alone]
    flags = ("--batch_size=4", f"--out={out}")
    two_hosts(*flags)
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["index"], line["text"]) for line in written] == list(enumerate(alone))
    out.write_text(json.dumps(written[1]) + "\n")  # the others are missing
    two_hosts(*flags)
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["text"] for line in again] == alone and again[1] == written[1]
    assert two_hosts(*flags) == [f"[0] {out} has all 3 responses"]


def test_the_page_of_a_response_has_its_tokens(tmp_path, capsys):
    run(f"--prompt={PUZZLES[0]}", f"--picture={tmp_path}/a.html")
    text, page = capsys.readouterr().out.strip(), (tmp_path / "a.html").read_text()
    assert "".join(re.findall(r'<span class="word">(.)</span>', page)) == text
    steps = json.loads(re.search(r"steps = (\[.*?\])", page)[1])
    assert sorted(set(steps)) == list(range(1, 9)) and PUZZLES[0] in page


@pytest.mark.parametrize("kind, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_has_a_point_for_each_commit(kind, start):
    words, steps = ["a", "<b>", " "], np.array([2, 0, 1])
    content = picture.renderer(f"x.{kind}")(
        words, steps, np.array([0.5, np.nan, 1.0]), np.array([1, 0, 0]), title="t"
    )
    assert content.startswith(start)
    if kind == "svg":
        (points,) = re.findall(rb'<g id="PathCollection_1">(.*?)</g>\s*</g>', content, re.DOTALL)
        assert points.count(b"<use ") == 2 and content.count(b"PathCollection_2") == 1


def test_the_page_escapes_its_text():
    page = picture.animate(["</script>", "&"], np.array([1, -1]), np.array([1.0, np.nan]))
    assert "&lt;/script&gt;" in page and "&amp;" in page and page.count("</script>") == 1
    assert "confidence = [1.0, null]" in page and "steps = [1, -1]" in page


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--prompt=1", "--picture=a.jpg"], "picture 'a.jpg' must end in .html, .png, .svg, .pdf"),
        (["--prompt=1", "--gen_length=4096", "--block_length=4096"], "lower --gen_length"),
        (["--prompts=jsonl:/nowhere"], "no file matches"),
        (["--prompt=1", "--fsdp=8", "--batch_size=12"], "no multiple of the 8 parts of the rows"),
        (["--prompt=1", "--out=gs://bucket/x"], "must be a local file"),
    ],
)
def test_what_cannot_be_done_is_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*flags)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1 and message in said


def test_probabilities_are_what_the_sampler_saw():
    """Truth: the confidence that the sampler records, which is the probability of the token."""
    logits_fn, config, words = loading.open_model(f"{ROOT}/llada_jax/assets/sudoku", "float32")
    prompt = [words.bos_id, *words.encode(PUZZLES[0])]
    given = {"mask_id": config.mask_token_id}
    for remasking, temperature in (("low_confidence", 1.0), ("random", 1.0)):
        settings = {"remasking": remasking, "temperature": temperature, "steps": 8}
        response = next(
            sampling.respond(
                logits_fn,
                [prompt],
                gen_length=16,
                block_length=8,
                pad_id=words.eos_id,
                batch_size=1,
                key=jax.random.key(0),
                **given,
                **settings,
            )
        )
        found = replay.probabilities(logits_fn, prompt, response, **given)
        kept = replay.with_confidence(logits_fn, prompt, response, remasking=remasking, **given)
        if remasking == "random":
            np.testing.assert_array_equal(kept.confidence, found)
            assert np.abs(found - response.confidence).max() > 0.1
        else:
            assert kept is response
            np.testing.assert_allclose(found, response.confidence, atol=1e-5)
    response.steps[3] = -1
    assert np.isnan(replay.probabilities(logits_fn, prompt, response, **given)[3])
