"""The published samplers, as the authors' own code runs them: tokens, commit steps, passes."""

import json

import numpy as np
import pytest
from golden import samplers_adapter as adapter
from helpers import ROOT

SHARED = ROOT.parent / "shared" / "golden"
FOLDERS = {"llada_mha": SHARED / "llada_mha", "sudoku": ROOT / "llada_jax/assets/sudoku"}


SLOW = pytest.mark.slow


def runs(folder):
    file = SHARED / "samplers" / folder / "samplers.json"
    if not file.exists():
        return []
    about = json.loads(file.read_text())
    return [{"mask_id": about["mask_token_id"], **run} for run in about["runs"]]


# Each run compiles a sampler of its own, which takes seconds; the others are slow tests.
FAST = (
    "llada_mha-fast_dllm/plain_quota_uneven llada_mha-fast_dllm/plain_factor4 llada/cfg1.5 "
    "llada/infill_fast prefix_infill_factor4 dual_quota_uneven reference_dual_thr0.06 "
    "sudoku-fast_dllm/plain_thr0.9_b4 sudoku-fast_dllm/prefix_factor0.5"
)
RUNS = [
    pytest.param(
        folder,
        run,
        id=f"{folder}-{run['id']}",
        marks=() if any(word in f"{folder}-{run['id']}" for word in FAST.split()) else SLOW,
    )
    for folder in FOLDERS
    for run in runs(folder)
    if "error" not in run and not adapter.why_not(run)
]
MODELS = {}


def model_of(folder, name):
    path = FOLDERS[folder] / name
    path = path if path.is_dir() else FOLDERS[folder]
    if path not in MODELS:
        MODELS[path] = adapter.open(path)
    return MODELS[path]


@pytest.mark.parametrize("folder, run", RUNS)
def test_run(shared, folder, run):
    # Truth: the authors' PyTorch code.
    arrays = np.load(SHARED / "samplers" / folder / "samplers.npz")
    got = adapter.trace(model_of(folder, run["checkpoint"]), arrays[run["id"] + "/prompt"], run)
    np.testing.assert_array_equal(got.tokens, arrays[run["id"] + "/tokens"])
    assert int((got.tokens == run["mask_id"]).sum()) == run["masks_left"]
    if nfe := adapter.comparable_passes(run):
        assert int(got.passes) == nfe
        if (step := run["id"] + "/step") in arrays:  # WINO's code records none
            np.testing.assert_array_equal(got.steps, arrays[step])
