"""MBPP: write a Python function from a sentence and three tests; it counts if they pass.

Problems 11 to 510 are the test set; 2, 3 and 4 are the worked examples, as in the MBPP paper.
Generated code is run, so it runs in `sandbox`.
"""

import re
import textwrap
from collections.abc import Sequence

from llada_jax.tasks import sandbox
from llada_jax.tasks.programs import code_of
from llada_jax.tasks.task import Settings, Task

# Seconds on the clock for a program and its tests. Problem 123's own solution took 15 on a busy
# machine.
TIMEOUT = 30.0
_BEGINS = "[BEGIN]\n"
_ENDS = "\n[DONE]"
_SHOTS = (2, 3, 4)
_CALL = re.compile(r"([A-Za-z_]\w*)\s*\(")


def prompt(record: dict, shots: Sequence[dict], template: str) -> str | list[dict]:
    """The problem and its tests after worked examples, as turns of a chat or as one text."""
    asked = [_question(r) for r in (*shots, record)]
    solved = [_BEGINS + shot["code"].replace("\r\n", "\n") + _ENDS for shot in shots]
    if template == "plain":
        pairs = zip(asked, solved, strict=False)
        return "".join(f"{q}{answer}\n\n" for q, answer in pairs) + asked[-1]
    turns = [
        {"role": role, "content": content}
        for question, answer in zip(asked, solved, strict=False)
        for role, content in (("user", question), ("assistant", answer))
    ]
    return [*turns, {"role": "user", "content": asked[-1]}]


def _question(record: dict) -> str:
    tests = "\n".join(record["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {record['text']} "
        f"Your code should pass these tests:\n\n{tests}\n"
    )


def score(record: dict, response: str, unsafe: bool = False) -> float:
    """Returns 1.0 if the program of the response passes the record's tests, else 0.0.

    It may stand in a code block or between [BEGIN] and [DONE], with text around it. Raises
    ValueError if nothing protects this machine and `unsafe` is False.
    """
    tests = "\n".join([record["test_setup_code"], *record["test_list"]])
    program = textwrap.dedent(code_of(response, dict.fromkeys(_CALL.findall(tests))))
    result = sandbox.run(program, tests, timeout=TIMEOUT, cut=True, unsafe=unsafe)
    return float(result.passed)


TASK = Task(
    fields={
        "task_id": int,
        "text": str,
        "code": str,
        "test_list": list,
        "test_setup_code": str,
    },
    score=score,
    prompt=prompt,
    begins=_BEGINS,
    # The worked examples are in the split "prompt".
    source="hf:google-research-datasets/mbpp?name=full&split=prompt%2Btest",
    id_field="task_id",
    keep=lambda record: 11 <= record["task_id"] <= 510,
    is_shot=lambda record: record["task_id"] in _SHOTS,
    runs_code=True,
    settings={
        "llada15": Settings(
            {"gen_length": 512, "block_length": 32, "confidence_eos_eot_inf": True},
            shots=3,
            stop=("[DONE]",),
            published={"LLaDA 1.5": 42.8},
        ),
        "instruct": Settings(
            {"gen_length": 256, "block_length": 256, "confidence_eos_eot_inf": True},
            shots=3,
            stop=("[DONE]",),
            published={"LLaDA 8B Instruct": 41.0},
        ),
        "base": Settings(
            {"gen_length": 1024, "block_length": 1024},
            template="plain",
            shots=3,
            stop=("[DONE]",),
            published={"LLaDA 8B Base": 40.0},
        ),
    },
)
