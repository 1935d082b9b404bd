"""The module map: every module imports what it may of ours, and nothing else does (DESIGN: Layout)."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "llada_jax"
# Module -> the whole list of internal imports it may have.
MAP = {
    "__init__": "",
    "batch": "",
    "chips": "",
    "tokenizer": "",
    "records": "tokenizer",
    "packing": "tokenizer records",
    "data": "batch packing records tokenizer",
    "noise": "",
    "attention": "",
    "model": "attention",
    "elbo": "noise",
    "losses": "",
    "mesh": "",
    "optim": "",
    "state": "mesh model",
    "metrics": "",
    "distributed": "",
    "parallel": "mesh",
    "steps": "batch noise elbo losses model state",
    "checkpoint": "",
    "convert": "model checkpoint",
    "sampling": "",
    "variance": "noise elbo losses",
    "evaluate": "batch noise losses metrics model steps packing records sampling variance",
    "reference": "batch",
    "plan": (
        "attention convert data distributed evaluate mesh model noise optim packing parallel records "
        "sampling steps tokenizer"
    ),
    "train": "checkpoint convert data distributed evaluate mesh metrics noise plan reference state steps",
    # Beside, never imported by train.py.
    "benchmark_load": "convert mesh model",
    "benchmark_step": "batch chips convert data distributed mesh noise packing plan state steps train",
    "benchmark_torch": "batch benchmark_step model steps",
    "benchmark": "benchmark_load benchmark_step benchmark_torch distributed train",
    "hlo": "",
    "compile": "batch benchmark_step chips hlo mesh plan state train",
    "sudoku": "",
    "variance_report": "variance",
    "variance_run": (
        "checkpoint convert data distributed mesh metrics model noise parallel steps tokenizer variance variance_report"
    ),
    "pairs": "convert evaluate metrics packing records sampling tokenizer",
}


def internal_imports(tree: ast.AST, top_level_only: bool = False) -> set[str]:
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "llada_jax"
        ):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("llada_jax.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_imports_follow_the_map(path):
    assert path.stem in MAP, f"{path.name} has no place in the map of this test"
    # A command line may open a model by importing inside a function; a module's own code may not.
    found = internal_imports(
        ast.parse(path.read_text()), top_level_only=path.stem in ("sampling", "variance")
    )
    assert found <= set(MAP[path.stem].split()), (
        f"{path.name} imports {sorted(found - set(MAP[path.stem].split()))}"
    )


def test_the_map_has_no_module_that_is_not_there():
    assert set(MAP) == {path.stem for path in PACKAGE.glob("*.py")}


def test_configs_import_only_configs():
    for path in (PACKAGE.parent / "configs").glob("*.py"):
        assert not internal_imports(ast.parse(path.read_text())), path.name


def test_the_map_has_no_cycle():
    done: set[str] = set()
    waiting = {name: set(allowed.split()) for name, allowed in MAP.items()}
    while waiting:
        ready = {name for name, needs in waiting.items() if needs <= done}
        assert ready, f"a cycle among {sorted(waiting)}"
        done |= ready
        waiting = {name: needs for name, needs in waiting.items() if name not in ready}
