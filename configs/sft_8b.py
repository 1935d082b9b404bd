r"""LLaDA 8B Instruct: supervised fine-tuning of LLaDA 8B Base by the published recipe.

    python -m llada_jax.train --config=configs/sft_8b.py --workdir=gs://bucket/run \
        --config.init_from=LLaDA-8B-Base --config.data.train=jsonl:sft.jsonl.gz \
        --config.data.cache_dir=/tmp/rows

Source: arXiv:2502.09992, section 2.3. Three epochs in batches of 256 samples. The learning rate
rises to 2.5e-5 in 50 steps, stays constant, and falls to a tenth in the last tenth of the steps.
Weight decay is 0.1. The published data are 4.5 million pairs.

Responses are padded with EOS, and the padding is part of the response. Here they are padded to the
end of the row, because static shapes need one length. The published recipe pads to the longest
response of a batch.

The recipe is for a pod of TPUs or GPUs. It has not been run, so there is no time or score to
expect.
"""

from configs import base, vrpo_8b


def get_config():
    c = base.get_config("sft")
    c.epochs = 3
    c.model.arch = vrpo_8b.LLADA_8B
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.model.logps_chunk = 9728
    c.data.row_length = 4096
    c.data.batch_rows = 256
    c.data.answer_multiple = 4096
    c.optimizer.peak = 2.5e-5
    c.optimizer.warmup_steps = 50
    c.optimizer.schedule = "constant"
    c.optimizer.end_fraction = 0.1
    c.optimizer.weight_decay = 0.1
    c.optimizer.accumulate = 16
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.checkpoint.every = 250
    c.eval.every = 1000
    return c
