"""The published likelihood, as the authors' own code computes it: terms, grids, greedy checks."""

import json

import numpy as np
import pytest
from golden import samplers_adapter as adapter
from helpers import ROOT

SHARED = ROOT.parent / "shared" / "golden"
FOLDER = SHARED / "samplers" / "llada_mha"
CASES = FOLDER / "likelihood.json"
ABOUT = json.loads(CASES.read_text()) if CASES.exists() else {"log_likelihood": [], "greedy": []}
# Each shape compiles for itself, which takes seconds; the others are slow tests.
FAST = (
    "mask_in_prompt mask_in_answer mask_in_prompt_cfg1 published_128_16 9_5 mask_in_prefix 8_5_cfg"
)


def cases(kind, wanted):
    return [
        pytest.param(
            case,
            id=case["id"],
            marks=() if any(word in case["id"] for word in FAST.split()) else pytest.mark.slow,
        )
        for case in ABOUT[kind]
        if wanted(case)
    ]


@pytest.fixture(scope="module")
def arrays(shared):
    return np.load(FOLDER / "likelihood.npz")


@pytest.fixture(scope="module")
def logits_fn(shared):
    return adapter.open(SHARED / "llada_mha" / "policy")


@pytest.mark.parametrize("case", cases("log_likelihood", lambda case: "error" not in case))
def test_terms(arrays, logits_fn, case):
    # Truth: the authors' PyTorch code in float64.
    name = f"log_likelihood/{case['id']}"
    given = [arrays[f"{name}/{k}"] for k in ("prompt", "answer", "masks", "num_masked")]
    found = adapter.log_likelihood_terms(
        logits_fn, *given, case["cfg_scale"], ABOUT["mask_token_id"]
    )
    np.testing.assert_allclose(found, arrays[f"{name}/terms_float64"], rtol=2e-4)
    assert found.mean() == pytest.approx(case["value_float64"], rel=1e-5)


@pytest.mark.parametrize("case", cases("greedy", lambda case: case["is_check_greedy"]))
def test_greedy(arrays, logits_fn, case):
    prefix, target = (arrays[f"greedy/{case['id']}/{k}"] for k in ("prefix", "target"))
    found = adapter.greedy(logits_fn, prefix, target, case["cfg_scale"], ABOUT["mask_token_id"])
    assert found == case["result"]


@pytest.mark.parametrize(
    "lengths", [{5, 16, 23}, pytest.param(set(range(1, 65)), marks=pytest.mark.slow)], ids=len
)
def test_grids(arrays, lengths):
    compared = 0
    for name in arrays.files:
        if name.startswith("grid/"):
            length, batch = (int(x[1:]) for x in name.removeprefix("grid/").split("_"))
            if length in lengths:
                np.testing.assert_array_equal(adapter.grid(length, batch), arrays[name], name)
                compared += 1
    assert compared in {24, 152}
