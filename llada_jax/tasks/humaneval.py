"""HumanEval: complete a Python function; a response counts if its tests pass.

Generated code is run, so it runs in `sandbox`.
"""

from collections.abc import Sequence

from llada_jax.tasks import sandbox
from llada_jax.tasks.programs import code_of, complete
from llada_jax.tasks.task import Settings, Task, one_user_turn

# Seconds on the clock for a program and its tests. The paper's script allows 3; a busy machine
# must not change a verdict. The slowest reference solution needs under 2.
TIMEOUT = 10.0


def prompt(record: dict, shots: Sequence[dict], template: str) -> str | list[dict]:
    """The request to complete the code, as a turn of a chat; the code alone as a text."""
    if template == "plain":
        return record["prompt"]
    return one_user_turn(f"Complete the following python code:\n{record['prompt']}", template)


def score(record: dict, response: str, unsafe: bool = False) -> float:
    """Returns 1.0 if the function of the response passes the record's tests, else 0.0.

    The response may be the whole function or the body that continues the prompt, in a code block or
    not, with text around it. Raises ValueError if nothing protects this machine and `unsafe` is
    False.
    """
    name = record["entry_point"]
    program = complete(record["prompt"], code_of(response, (name,)), name)
    tests = f"{record['test']}\ncheck({name})\n"
    result = sandbox.run(program, tests, timeout=TIMEOUT, cut=True, unsafe=unsafe)
    return float(result.passed)


TASK = Task(
    fields={"task_id": str, "prompt": str, "entry_point": str, "test": str},
    score=score,
    prompt=prompt,
    source="hf:openai/openai_humaneval?split=test",
    id_field="task_id",
    runs_code=True,
    settings={
        "llada15": Settings(
            {"gen_length": 512, "block_length": 32, "confidence_eos_eot_inf": True},
            published={"LLaDA 1.5": 52.4},
        ),
        "instruct": Settings(
            {"gen_length": 512, "block_length": 512, "logits_eos_inf": True},
            published={"LLaDA 8B Instruct": 49.4},
        ),
        "base": Settings(
            {"gen_length": 1024, "block_length": 1024},
            template="plain",
            stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
            published={"LLaDA 8B Base": 35.4},
        ),
    },
)
