"""GSM8K: school arithmetic in words; the last number of the response counts."""

import re
from collections.abc import Sequence

from llada_jax.tasks.task import Settings, Task

# A sign counts where no digit stands before it: 5-3 ends with 3.
_NUMBER = re.compile(r"(?:(?<![\d.])[-+])?(?:\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d*\.\d+|\d+)")


def prompt(record: dict, shots: Sequence[dict], template: str) -> str | list[dict]:
    """The question after its worked examples, as turns of a chat or as one text."""
    asked = [f"Question: {r['question']}\nLet's think step by step\nAnswer:" for r in shots]
    last = f"Question: {record['question']}\nLet's think step by step\nAnswer:"
    if template == "plain":
        pairs = zip(asked, shots, strict=True)
        return "".join(f"{q} {shot['answer']}\n\n" for q, shot in pairs) + last
    turns = [
        {"role": role, "content": content}
        for question, shot in zip(asked, shots, strict=True)
        for role, content in (("user", question), ("assistant", shot["answer"]))
    ]
    return [*turns, {"role": "user", "content": last}]


def score(record: dict, response: str) -> float:
    """Returns 1.0 if the last number of the response is that of the reference answer, else 0.0.

    A text after a further "Question:" is not read. Commas within a number are dropped.
    """
    wanted = last_number(record["answer"].rpartition("####")[2])
    if wanted is None:
        raise ValueError(f"the reference answer {record['answer']!r} has no number after ####")
    return float(last_number(response.partition("Question:")[0]) == wanted)


def last_number(text: str) -> float | None:
    """The last number in a text, or None."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


_FINAL_LAST = {"confidence_eos_eot_inf": True}
TASK = Task(
    fields={"question": str, "answer": str},
    score=score,
    prompt=prompt,
    source="hf:openai/gsm8k?name=main&split=test",
    settings={
        "llada15": Settings(
            {"gen_length": 256, "block_length": 16, **_FINAL_LAST},
            shots=4,
            published={"LLaDA 1.5": 83.8},
        ),
        "llada15_paper": Settings(
            {"gen_length": 512, "block_length": 32, **_FINAL_LAST},
            shots=4,
            published={"LLaDA 1.5": 83.3},
        ),
        "instruct": Settings(
            {"gen_length": 512, "block_length": 512, **_FINAL_LAST},
            shots=4,
            published={"LLaDA 8B Instruct": 69.4},
        ),
        "instruct_block": Settings(
            {"gen_length": 256, "block_length": 8},
            shots=4,
            published={"LLaDA 8B Instruct": 78.6},
        ),
        "base": Settings(
            {"gen_length": 1024, "block_length": 1024},
            template="plain",
            shots=4,
            stop=("Question:",),
            published={"LLaDA 8B Base": 70.3},
        ),
    },
)
