"""Arena-Hard v0.1: 500 demanding questions of users, whose answers only a judge can compare.

`python -m llada_jax.evaluate judge` compares them with the answers of a baseline.
"""

from llada_jax.tasks.task import Settings, Task

# The LLaDA 1.5 paper reports win rates of 10.0 (LLaDA 8B Instruct) and 14.3 (LLaDA 1.5) per cent.
# It names neither sampler settings nor judge, and there is no public code for this benchmark. So
# the settings are ours, and no published score belongs to them.
TASK = Task(
    fields={"uid": str, "prompt": str},
    score=None,
    id_field="uid",
    settings={
        "ours": Settings(
            {"gen_length": 1024, "block_length": 32, "confidence_eos_eot_inf": True},
        ),
    },
)
