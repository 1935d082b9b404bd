"""Requests of the authors' lm-eval adapter: ids, values at given masks, greedy checks, texts."""

import json

import jax
import numpy as np
import pytest
from golden import samplers_adapter as adapter
from helpers import ROOT

from llada_jax import tokenizer

pytest.importorskip("lm_eval", reason="the lm-evaluation-harness is not installed")
from llada_jax.evaluate.lm_eval.engine import Engine, Options
from llada_jax.evaluate.lm_eval.texts import Texts

SHARED = ROOT.parent / "shared" / "golden"
FOLDER = SHARED / "samplers" / "llada_mha"
CASES = FOLDER / "likelihood.json"
ABOUT = json.loads(CASES.read_text()) if CASES.exists() else {"requests": [], "generate_until": []}
MASK, EOS, LONGEST = 510, 266, 128
# What we do otherwise, and why.
OTHER_IDS = {
    "merged_over_the_boundary": "the letters of the continuation are lost",
    "merged_partly": 'the prompt is "He ran th", the continuation "other way": an e is lost',
}
# A response goes on after EoT or EOS.
OTHER_TEXTS = {"no_stop", "stop_a", "stop_two_a", "stop_absent_a"}
OTHER_TEXTS |= {"stop_b", "stop_two_b", "stop_absent_b"}


def cases(kind):
    found = [case for case in ABOUT[kind] if kind == "requests" or "error" not in case]
    return pytest.mark.parametrize("case", found, ids=lambda case: case["id"])


@pytest.fixture(scope="module")
def arrays(shared):
    return np.load(FOLDER / "likelihood.npz")


@pytest.fixture(scope="module")
def logits_fn(shared):
    return adapter.open(SHARED / "llada_mha" / "policy")


@pytest.fixture(scope="module")
def engines(shared, tmp_path_factory):
    """The engine that imitates the authors', and ours."""
    folder = tmp_path_factory.mktemp("golden")
    for file in (*(SHARED / "llada_mha" / "policy").iterdir(), FOLDER / "tokenizer.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return {
        published: Engine(
            Options(str(folder), "float32", published=published, estimator="published"), {}
        )
        for published in (True, False)
    }


def texts(published):
    return Texts(tokenizer.load(FOLDER / "tokenizer.json"), LONGEST, EOS, published=published)


@cases("requests")
def test_ids(shared, case):
    theirs = (case["context_ids"], case["continuation_ids"])
    request = (case["context"], case["continuation"])
    assert texts(published=True).pair(*request) == theirs
    assert (texts(published=False).pair(*request) == theirs) == (case["id"] not in OTHER_IDS)


def test_where_letters_are_merged_ours_has_all_of_them(shared):
    words = tokenizer.load(FOLDER / "tokenizer.json")
    for case in ABOUT["requests"]:
        prompt, answer = texts(published=False).pair(case["context"], case["continuation"])
        if case["id"] in OTHER_IDS:
            assert words.decode(prompt + answer) == case["context"] + case["continuation"]
            assert words.decode(answer)


@cases("requests")
def test_values_at_given_masks(arrays, logits_fn, case):
    if "error" in case:
        return
    name = f"requests/{case['id']}"
    masks, num_masked = arrays[f"{name}/masks"], arrays[f"{name}/num_masked"]
    prompt, answer = texts(published=True).pair(case["context"], case["continuation"])
    found = adapter.log_likelihood_terms(
        logits_fn, prompt, answer, masks, num_masked, case["cfg_scale"], MASK
    )
    assert found.mean() == pytest.approx(case["loglikelihood_float64"], rel=1e-5)


def test_answers_of_the_engine(engines):
    """Greedy checks; values where every draw is the same: an answer of one token."""
    wanted = [case for case in ABOUT["requests"] if "error" not in case and not case["cfg_scale"]]
    work = [[case["context"], case["continuation"], i] for i, case in enumerate(wanted)]
    found = {}
    engines[True].loglikelihood(work, found.__setitem__)
    of_one = 0
    for i, case in enumerate(wanted):
        value, is_greedy = found[i]
        assert is_greedy == bool(case["is_greedy"]), case["id"]
        if len(case["continuation_ids"]) == 1:
            of_one += 1
            assert value == pytest.approx(case["loglikelihood_float64"], rel=1e-5)
        else:
            assert value == pytest.approx(case["loglikelihood_float64"], rel=0.3)
    assert of_one == 2


def test_an_empty_continuation(engines):
    found = {}
    engines[False].loglikelihood([["He was", "", 0]], found.__setitem__)
    assert found == {0: (0.0, True)}


@pytest.mark.parametrize("published", [True, False])
def test_generated_texts(engines, published):
    names = ("until", "steps", "gen_length", "block_length")
    wanted = [case for case in ABOUT["generate_until"] if "error" not in case]
    work = [[case["context"], {k: case[k] for k in names}, 0] for case in wanted]
    found = {}
    engines[published].generate_until(work, found.__setitem__)
    same = {case["id"] for i, case in enumerate(wanted) if found[i] == case["text"]}
    different = {case["id"] for case in wanted} - same
    assert different == (set() if published else OTHER_TEXTS)
    for i, case in enumerate(wanted):
        assert case["text"].startswith(found[i])


def test_the_engine_uses_all_devices(engines):
    assert engines[True].about()["devices"].startswith(f"{jax.device_count()} ")
