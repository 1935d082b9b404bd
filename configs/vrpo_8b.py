r"""LLaDA 1.5: VRPO on LLaDA 8B Instruct by the published recipe.

    python -m llada_jax.train --config=configs/vrpo_8b.py --workdir=gs://bucket/run \
        --config.init_from=LLaDA-8B-Instruct --config.data.train=jsonl:pairs.jsonl.gz \
        --config.data.cache_dir=/tmp/rows

Source: arXiv:2505.19223v2, section 4 and appendix. 350,000 pairs once, in batches of 64 (5,468
steps), n = 8, beta 0.2, SFT weight 0.05. Here a batch is 16 packed rows of 4096 tokens. This is 64
pairs if a pair takes 1024 tokens; `--dry_run` prints how many of your pairs are in a step.

The published cost is about 405 H100 hours. The published scores of LLaDA 1.5 are the ones to
expect: GSM8K 83.3, MATH 42.6, HumanEval 52.4, MBPP 42.8. We have compiled the recipe for TPU pods,
but have not run it.

State, gradient and reference take about 165 GiB, sharded over `fsdp`. That is 13 GiB a chip on 16
TPU chips, activations included. A word after a colon names a pod, as in
`configs/vrpo_8b.py:v5e-16` (MESHES below). docs/pods.md#presets has memory and step time of each.
"""

from configs import base

# The entries of LLaDA 8B's published config.json that define the architecture.
LLADA_8B = dict(
    d_model=4096,
    n_heads=32,
    n_kv_heads=32,
    n_layers=32,
    mlp_hidden_size=12288,
    vocab_size=126464,
    embedding_size=126464,
    max_sequence_length=4096,
    mask_token_id=126336,
    eos_token_id=126081,
    pad_token_id=126081,
)


# Pod type -> (fsdp, tensor). The number of a v5p type counts cores, two for each chip.
# docs/pods.md#presets has memory and step time of each, as compiled.
MESHES = {
    "": (-1, 1),  # all devices; on 16 chips this is the same as the first three below
    "v5p-32": (16, 1),
    "v6e-16": (16, 1),
    "v5e-16": (16, 1),
    "v5e-32": (16, 2),
    "v5e-64": (16, 4),
}


def get_config(chips: str = ""):
    if chips not in MESHES:
        raise ValueError(
            f"configs/vrpo_8b.py:{chips} is not one of {', '.join(filter(None, MESHES))}"
        )
    c = base.get_config("vrpo")
    c.model.arch = LLADA_8B
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.data.row_length = 4096
    c.data.batch_rows = 16
    c.data.too_long = "drop"
    c.vrpo.beta = 0.2
    c.vrpo.n_t = 8
    c.vrpo.n_yt = 1
    c.vrpo.share_noise = True
    c.vrpo.sft_weight = 0.05
    c.vrpo.mc_chunk = 1
    c.vrpo.reference_dtype = "bfloat16"
    c.optimizer.peak = 5e-7
    c.optimizer.warmup_steps = 15
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.01
    c.model.logps_chunk = 9728  # 13 chunks of the vocabulary
    c.mesh.data = 1
    c.mesh.fsdp, c.mesh.tensor = MESHES[chips]
    c.checkpoint.every = 250
    c.eval.every = 500
    return c
