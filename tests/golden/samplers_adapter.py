"""Our sampler and likelihood as ../shared/golden/samplers/check_samplers.py wants them.

    python ../shared/golden/samplers/check_samplers.py FOLDER CHECKPOINTS THIS_FILE

`why_not` says which runs are not imitated, and why.
"""

import jax
import numpy as np

import llada_jax
from llada_jax import likelihood, sampling


def open(path):
    """The model and its parameters, as the sampler takes them."""
    model, params = llada_jax.load(path, "float32")  # as the golden files were made
    return jax.tree_util.Partial(model.apply, {"params": params})


def why_not(run):
    """The reason for which a run is not imitated, or None."""
    if run.get("cfg_scale") and run.get("cfg_interval_steps", 1) > 1:
        return "keeps the difference that guidance makes for some passes; we compute it in each"
    has_quotas = run.get("threshold") is None and run.get("factor") is None
    new_dual = run["method"] == "dual" and run.get("version") == "2026-05-30"
    if new_dual and run["masks_left"] and not has_quotas:
        return "stops a block after steps / blocks passes; we run each block to its end"
    return None


def settings_of(run, has_masks):
    """The arguments of `generate` for a run whose prompt has masks or not."""
    settings = {
        "mask_id": run["mask_id"],
        "steps": run.get("steps"),
        "gen_length": run["gen_length"],
        "block_length": run["block_length"],
        "cfg_scale": run.get("cfg_scale", 0.0),
        "infill": "published" if has_masks else "all",
        "lockstep": True,
    }
    if run["family"] not in ("llada", "dllm_cache"):
        settings["remasking"] = "probability"  # these take a float64 softmax, LLaDA a float32 one
    if run["family"] == "wino":
        rule = {"commit": "wino", "revoke": "wino", "threshold_back": run["threshold_back"]}
        return settings | rule | {"threshold": run["threshold"]}
    if run["family"] == "dkv_cache":
        return settings | {"cache": "delayed", "refresh": run["cache_reloading_step"]}
    if run["family"] == "dllm_cache":
        return settings | {
            "cache": "selective",
            "refresh": run["gen_interval_steps"],
            "refresh_prompt": run["prompt_interval_steps"],
            "transfer_ratio": run["transfer_ratio"],
        }
    settings["cache"] = "none" if run["method"] == "plain" else run["method"]
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
    has_masks = (prompt == run["mask_id"]).any() or run["masks_left"]
    settings = settings_of(run, has_masks)
    return sampling.generate(logits_fn, prompt, attention_mask=mask, trace=True, **settings)


def generate(logits_fn, prompt, run):
    """(tokens, number of passes) of a run, or None."""
    if why_not(run):
        return None
    result = trace(logits_fn, prompt, run)
    return np.asarray(result.tokens), int(result.passes) if comparable_passes(run) else None


def log_likelihood_terms(logits_fn, prompt, answer, masks, num_masked, cfg_scale, mask_id):
    """The terms [N] of the published likelihood at given masks."""
    return likelihood.terms(
        logits_fn, prompt, answer, masks, num_masked, mask_id=mask_id, cfg_scale=cfg_scale
    )


def grid(length, batch):
    """The mask counts [length, batch] of the published likelihood."""
    return likelihood.grid(length, batch)


def greedy(logits_fn, prefix, target, cfg_scale, mask_id):
    """Whether greedy decoding writes the target."""
    return likelihood.is_greedy(logits_fn, prefix, target, mask_id=mask_id, cfg_scale=cfg_scale)
