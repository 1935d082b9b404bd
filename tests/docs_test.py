"""The documents: Python runs, commands parse, links lead somewhere, numbers stand once.

A fenced block of commands has a label. CI runs `sh` and `sh long` as written, by
.ci/docs_commands.py. `sh by hand` takes an hour or a place of its own. `sh elsewhere` needs a
cloud, an accelerator, an extra package or files of the reader.
"""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT

from llada_jax import cli
from llada_jax.train import __main__ as train

PACKAGE = ROOT / "llada_jax"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*DOCUMENTS, ROOT / "CHANGELOG.md"]
LABELS = {"", "python", "sh", "sh long", "sh by hand", "sh elsewhere"}
# Their Python compiles for more than a few seconds.
SLOW = {"estimators.md", "likelihood.md", "results.md", "sampling.md"}
# What a command may begin with, beside `python -m MODULE`, `python FILE` and `bash FILE`.
PROGRAMS = {".", "mkdir", "pip", "printf", "python3", "ruff"}
WITH_ERROR = re.compile(r"(-?\d[\d.]*)(?:\s*%)?\s*\+-\s*(\d[\d.]*)")
JOURNEY = re.compile(r"^\| \d+ \| `([\w/]+\.py)` `([\w.]+)` \|", re.MULTILINE)


def by_name(paths):
    """Parametrises a test by documents, each under its file's name."""
    return pytest.mark.parametrize("path", list(paths), ids=lambda path: path.name)


def blocks(path):
    """(label, text) of each fenced block."""
    return re.findall(r"^```([^\n`]*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def commands(path):
    """The words of each command of the sh blocks; a line may hold several, joined by && or |."""
    for label, text in blocks(path):
        if label.split(" ")[0] != "sh":
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word not in ("&&", "|"):
                    words.append(word)
                elif words:
                    while re.match(r"[A-Z_]+=", words[0]):  # a variable set for this command
                        words.pop(0)
                    yield words
                    words = []


def calls(words):
    """(module below llada_jax, arguments) of each command of ours that these words start."""
    for k in range(len(words) - 2):
        if words[k : k + 2] == ["python", "-m"] and words[k + 2].startswith("llada_jax."):
            yield words[k + 2].removeprefix("llada_jax."), words[k + 3 :]
    if words[0] == "bash":
        rest = (
            words[words.index("--") + 1 :]
            if "--" in words
            else [w for w in words[2:] if w != "--print"]
        )
        yield "train", rest


CALLS = [
    pytest.param(module, arguments, id=f"{path.name}-{k}-{module}")
    for path in DOCUMENTS
    for k, words in enumerate(commands(path))
    for module, arguments in calls(words)
]


@by_name(DOCUMENTS)
def test_blocks_have_a_known_label(path):
    assert {label for label, _ in blocks(path)} <= LABELS


@by_name(
    pytest.param(path, marks=pytest.mark.slow if path.name in SLOW else (), id=path.name)
    for path in DOCUMENTS
    if "```python" in path.read_text()
)
def test_python_runs_as_written(path):
    code = "".join(f"exec({text!r}, {{}})\n" for label, text in blocks(path) if label == "python")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(("module", "arguments"), CALLS)
def test_commands_are_accepted_by_their_own_parser(module, arguments, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)  # configs are named from there
    is_folder = (PACKAGE / module).is_dir()
    command = importlib.import_module(
        f"llada_jax.{module}.__main__" if is_folder else f"llada_jax.{module}"
    )
    if "--help" in arguments:
        with pytest.raises(SystemExit) as ended:
            cli.parse(command.parser(), arguments)
        assert ended.value.code in (0, None)
    else:
        cli.parse(command.parser(), arguments)


def test_a_wrong_flag_is_not_accepted(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse(
            train.parser(), ["--config=configs/vrpo_sudoku.py", "--workdir=w", "--no_such_flag=1"]
        )
    assert ended.value.code == 2


@by_name(DOCUMENTS)
def test_commands_name_programs_that_exist(path):
    for words in commands(path):
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), words
        elif words[0] in ("python", "bash"):
            assert (ROOT / words[1]).is_file(), words
        else:
            assert words[0] in PROGRAMS, words


def anchors(path):
    """Collects the anchors that GitHub gives the headings of a document."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_name(LINKED)
def test_links_and_pictures_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        file = (path.parent / file).resolve() if file else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_a_measured_number_stands_in_one_document():
    found = {path.name: set(WITH_ERROR.findall(path.read_text())) for path in DOCUMENTS}
    # The README has the table of the default run. Every other number is in docs/results.md.
    readme, results = found.pop("README.md"), found.pop("results.md")
    assert readme and results and not readme & results
    assert not any(found.values()), f"put these numbers in docs/results.md: {found}"


def names(path):
    """Collects top-level names of a file, and `Class.name` of what its classes define."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        for name in _defined(node):
            found.add(name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{name}.{below}" for part in node.body for below in _defined(part)}
    return found


def _defined(node):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return [
        part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)
    ]


def test_the_journeys_name_what_is_there():
    steps = JOURNEY.findall((ROOT / "docs" / "architecture.md").read_text())
    assert len(steps) > 40
    missing = [
        f"{file} {name}"
        for file, name in steps
        if not (PACKAGE / file).is_file() or name not in names(PACKAGE / file)
    ]
    assert not missing, missing


def test_the_table_of_keys_has_its_place():
    text = (ROOT / "docs" / "training.md").read_text()
    assert text.count("<!-- keys: begin -->") == text.count("<!-- keys: end -->") == 1
