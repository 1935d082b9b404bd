"""Our sampler as ../shared/golden/samplers/check_samplers.py wants it.

    python ../shared/golden/samplers/check_samplers.py FOLDER CHECKPOINTS THIS_FILE

`why_not` says which runs are not imitated, and why.
"""

import jax
import numpy as np

import llada_jax
from llada_jax import sampling

FAMILIES = {"llada", "fast_dllm"}
METHODS = {"plain", "prefix", "dual"}


def open(path):
    """The model and its parameters, as the sampler takes them."""
    model, params = llada_jax.load(path, "float32")  # as the golden files were made
    return jax.tree_util.Partial(model.apply, {"params": params})


def why_not(run):
    """The reason for which a run is not imitated, or None."""
    if run["family"] not in FAMILIES or run["method"] not in METHODS:
        return f"{run['family']}, {run['method']}: not built"
    has_quotas = run.get("threshold") is None and run.get("factor") is None
    new_dual = run["method"] == "dual" and run.get("version") == "2026-05-30"
    if new_dual and run["masks_left"] and not has_quotas:
        return "stops a block after steps / blocks passes; we run each block to its end"
    return None


def settings_of(run):
    """The arguments of `generate` for a run: blocks and infilling are as published."""
    settings = {
        "mask_id": run["mask_id"],
        "steps": run["steps"],
        "gen_length": run["gen_length"],
        "block_length": run["block_length"],
        "cfg_scale": run.get("cfg_scale", 0.0),
        "infill": "published",
        "lockstep": True,
    }
    settings["cache"] = "none" if run["method"] == "plain" else run["method"]
    if run["family"] != "llada":
        settings["remasking"] = "probability"  # these take a float64 softmax, LLaDA a float32 one
    if run.get("factor") is not None:
        settings |= {"commit": "factor_published", "factor": run["factor"]}
    elif run.get("threshold") is not None:
        settings |= {"commit": "threshold", "threshold": run["threshold"]}
    return settings


def comparable_passes(run):
    """The number of passes of the run, or None where it is no property of the tokens."""
    if run.get("version") == "2025-06-27":
        return None  # the first release makes a pass more after each block that one pass finishes
    if run["family"] == "llada" and run["steps"] > run["gen_length"]:
        return None  # we make no passes that commit nothing
    return run["nfe"]


def trace(logits_fn, prompt, run):
    """The trace of a run."""
    mask = None
    if run["family"] == "llada":
        mask = np.ones_like(prompt)  # the published loop needs one for guidance
    return sampling.generate(logits_fn, prompt, attention_mask=mask, trace=True, **settings_of(run))


def generate(logits_fn, prompt, run):
    """(tokens, number of passes) of a run, or None."""
    if why_not(run):
        return None
    result = trace(logits_fn, prompt, run)
    return np.asarray(result.tokens), int(result.passes) if comparable_passes(run) else None
