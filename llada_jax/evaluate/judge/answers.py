"""The questions and the two answers to each, from files."""

import dataclasses
import hashlib
import itertools
import json
from typing import Any

from llada_jax.data.records import read_records
from llada_jax.files import expand, read_lines


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its two answers."""

    id: str
    record: dict[str, Any]
    text: str
    response: str  # the model's
    baseline: str

    @property
    def digest(self) -> str:
        """Of all that a judge sees."""
        texts = json.dumps([self.text, self.response, self.baseline])
        return hashlib.sha256(texts.encode()).hexdigest()[:16]


def read_answers(path: str) -> dict[str, str]:
    """The answers of jsonl files by the id of their question.

    A line is {"id": ..., "response": ...}, or one of Arena-Hard's own answer files: `question_id`
    and `choices` of v0.1, or `uid` and `messages`. Raises ValueError, with file and line, for any
    other, or for a second answer to a question.
    """
    found: dict[str, str] = {}
    for file in expand(path):
        for number, line in read_lines(file):
            if not line.strip():
                continue
            try:
                name, text = _answer(json.loads(line))
            except (ValueError, LookupError, TypeError, RecursionError):
                raise ValueError(
                    f'{file}:{number}: no answer; a line is {{"id": ..., "response": "..."}}'
                ) from None
            if name in found:
                raise ValueError(
                    f"{file}:{number}: a second answer to {name!r}; a judge compares one answer "
                    "to each question"
                )
            found[name] = text
    return found


def _answer(line: dict) -> tuple[str, str]:
    if "response" in line:
        name, text = line["id"], line["response"]
    elif "choices" in line:
        name, text = line["question_id"], line["choices"][0]["turns"][-1]["content"]
    else:
        name, text = line["uid"], line["messages"][-1]["content"]
        text = text["answer"] if isinstance(text, dict) else text
    if not isinstance(text, str) or not isinstance(name, str | int):
        raise TypeError
    return str(name), text


def read_questions(
    data: str, responses: str, baseline: str, id_field: str = "uid", limit: int = 0
) -> tuple[list[Question], int]:
    """Returns (the questions that the model has answered, the number of those that it has not).

    data: a source of records, as `data.sources` reads it.
    id_field: the field that names a record; records without it are named by their number, from 0.
    limit: so many records are read; 0: all.

    Raises ValueError if an answer belongs to no record, if the baseline lacks one of the model's
    answers, or if there are none.
    """
    model, other = read_answers(responses), read_answers(baseline)
    found, named = [], set()
    records = itertools.islice(read_records(data, "prompt"), limit or None)
    for number, (where, raw, normal) in enumerate(records):
        name = str(raw.get(id_field, number))
        if name in named:
            raise ValueError(f"{where}: a second record {name!r}; --id_field names another field")
        named.add(name)
        if name not in model:
            continue
        if name not in other:
            raise ValueError(f"{baseline} has no answer to {name!r} ({where}), {responses} has one")
        text = _text(normal["prompt"])
        found.append(Question(name, {**raw, **normal}, text, model[name], other[name]))
    if not limit and (strange := sorted(model.keys() - named)):
        raise ValueError(
            f"{responses}: {len(strange)} of its ids are in no record of {data}, the first is "
            f"{strange[0]!r}; --id_field names the field of the ids"
        )
    if not found:
        raise ValueError(f"{responses} answers none of the {len(named)} questions of {data}")
    return found, len(named) - len(found)


def _text(prompt: str | list[dict]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
