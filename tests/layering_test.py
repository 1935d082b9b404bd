"""The house: which room may import which. Imports go down only, and no other is allowed."""

import ast
import importlib
import pathlib

import pytest
from helpers import ROOT

PACKAGE = ROOT / "llada_jax"
# From the ground up. A room (a folder or a file) may import the rooms named here, and no other.
FLOORS = (
    # The mathematics: arrays in, arrays out; no file, no device, no config.
    {"batch": "", "noise": "", "losses": ""},
    {"elbo": "noise"},
    # The ground.
    {"files": "", "chips": "", "config": ""},
    {"metrics": "files", "parallel": "files"},
    {"cli": "parallel"},
    {"tokenizer": "files"},
    # What a model is, what it reads, where it is kept.
    {"models": "", "data": "batch config files tokenizer"},
    {"checkpoints": "files models parallel tokenizer"},
    # What is done with a model.
    {
        "objectives": "batch config elbo losses noise",
        "likelihood": "elbo noise parallel",
        "sampling": "parallel",
        "tasks": "files",
    },
    {
        "variance": "batch elbo files losses metrics noise objectives",
        "evaluate": "batch checkpoints data files likelihood metrics objectives parallel sampling "
        "tasks tokenizer",
    },
    # The trainer, and what looks at it.
    {
        "train": "batch checkpoints config data evaluate files metrics models noise objectives "
        "parallel sampling tasks tokenizer variance",
    },
    {
        "compile": "batch chips models parallel sampling train",
        "benchmark": "batch checkpoints chips metrics models noise objectives parallel sampling "
        "train",
    },
    # Commands.
    {
        "study": "cli evaluate files metrics parallel train",
        "convert": "checkpoints cli files",
        "pairs": "checkpoints cli evaluate files metrics sampling tasks",
        "chat": "data sampling",
    },
)
ROOMS = {room: set(allowed.split()) for floor in FLOORS for room, allowed in floor.items()}
# What a command opens: it may import these beside what its room may.
COMMANDS = {
    "checkpoints", "cli", "data", "files", "metrics", "models", "parallel", "tokenizer"
}  # fmt: skip
IS_COMMAND = {"__main__.py", "measure.py"}  # variance/measure.py is the laboratory's command


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree):
    """Dotted names below llada_jax that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llada_jax":
            below = node.module.split(".")[1:]
            yield from ([*below, a.name] for a in node.names) if len(below) < 2 else [below]
        elif isinstance(node, ast.Import):
            yield from (
                a.name.split(".")[1:] for a in node.names if a.name.startswith("llada_jax.")
            )


FILES = {
    path: list(imports(ast.parse(path.read_text())))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_what_its_room_may(path):
    room = room_of(path)
    allowed = {room} | ROOMS[room] | (COMMANDS if path.name in IS_COMMAND else set())
    found = {below[0] for below in FILES[path]}
    assert found <= allowed, f"{path.name} imports {sorted(found - allowed)}"


def test_imports_go_down_only():
    below = set()
    for floor in FLOORS:
        for room, allowed in floor.items():
            assert set(allowed.split()) <= below, f"{room} imports from its own floor or above"
        below |= floor.keys()


def test_no_file_imports_itself_by_a_detour():
    graph = {}
    for path, found in FILES.items():
        name = path.relative_to(PACKAGE).with_suffix("").parts
        graph[name] = {tuple(below[:k]) for below in found for k in (1, 2)} - {name}
    waiting = {name: {d for d in needs if d in graph} for name, needs in graph.items()}
    while waiting:
        ready = {name for name, needs in waiting.items() if not needs & waiting.keys()}
        assert ready, f"a circle among {sorted('.'.join(name) for name in waiting)}"
        waiting = {name: needs for name, needs in waiting.items() if name not in ready}


def test_every_room_has_its_row_and_every_row_its_room():
    assert {room_of(path) for path in FILES} == ROOMS.keys()


def test_every_arrow_of_the_table_is_used():
    used = {room: set() for room in ROOMS}
    for path, found in FILES.items():
        if path.name not in IS_COMMAND:
            used[room_of(path)] |= {below[0] for below in found}
    unused = {room: sorted(allowed - used[room]) for room, allowed in ROOMS.items()}
    assert not {room: arrows for room, arrows in unused.items() if arrows}


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py")))
def test_no_file_has_the_name_of_a_public_name_of_its_folder(folder):
    """The file would hide the name, or the name the file."""
    public = getattr(importlib.import_module(f"llada_jax.{folder}"), "__all__", ())
    assert not {path.stem for path in (PACKAGE / folder).iterdir()} & set(public)


def test_configs_import_settings_and_configs_only():
    for path in (ROOT / "configs").rglob("*.py"):
        found = {".".join(below) for below in imports(ast.parse(path.read_text()))}
        studies = {"study.Arm", "study.Study", "study.Tune"}
        assert found <= ({"train.settings"} if path.parent.name == "configs" else studies), path


def test_the_names_of_the_package_are_there():
    import llada_jax

    for name in llada_jax.__all__:
        assert getattr(llada_jax, name) is not None
    assert pathlib.Path(llada_jax.variance.__file__).parent.name == "variance"
