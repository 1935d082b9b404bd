"""The questions of a task: checked records with their prompts."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llada_jax.data.records import normalise, parse
from llada_jax.data.sources import raw_records
from llada_jax.data.sources.source import BadRecord
from llada_jax.data.templates import encode_prompt
from llada_jax.tasks import Task


class Question(NamedTuple):
    """One record of a task."""

    id: str  # its name in results; no two questions have the same
    where: str  # "file:line"
    record: dict[str, Any]  # what `Task.score` gets
    prompt: str | list[dict]


def read_records(task: Task, source: str) -> Iterator[tuple[str, str, dict]]:
    """Yields (id, where, record) of all records of a source.

    Raises ValueError, which names the record, if a field is missing or of another type, or if two
    records have the same id.
    """
    seen: dict[str, str] = {}
    for number, (where, unparsed) in enumerate(raw_records(source)):
        try:
            record = parse(unparsed)
        except BadRecord as reason:
            raise ValueError(f"{where}: {reason}; repair it") from reason
        for name, kind in task.fields.items():
            if not isinstance(record.get(name), kind):
                kinds = kind if isinstance(kind, tuple) else (kind,)
                found = type(record[name]).__name__ if name in record else "missing"
                raise ValueError(
                    f"{where}: the field {name} is {found}, the task needs "
                    f"{' or '.join(k.__name__ for k in kinds)}"
                )
        key = str(record[task.id_field] if task.id_field else number)
        if key in seen:
            raise ValueError(f"{where}: the id {key} is that of {seen[key]}, too; remove one")
        seen[key] = where
        yield key, where, record


def read_questions(
    task: Task,
    source: str,
    template: str,
    *,
    shots: Sequence[dict] = (),
    limit: int = 0,
    keep_all: bool = False,
) -> list[Question]:
    """Returns the questions of a source, at most `limit` (0: all), after the worked examples.

    keep_all: also the records that `Task.keep` leaves out.
    Raises ValueError if there is none, or if a record is wrong (`read_records`).
    """
    records = read_records(task, source)
    keeps = None if keep_all else task.keep
    kept = (found for found in records if keeps is None or keeps(found[2]))
    questions = [
        _question(task, *found, shots, template) for found in itertools.islice(kept, limit or None)
    ]
    if not questions:
        raise ValueError(f"{source} holds no record that is tested; give a source that does")
    return questions


def _question(task: Task, key: str, where: str, record: dict, shots, template: str) -> Question:
    if task.prompt is not None:
        return Question(key, where, record, task.prompt(record, shots, template))
    try:
        prompt = normalise(record, "prompt")["prompt"]
    except BadRecord as reason:
        raise ValueError(f"{where}: {reason}; repair it") from reason
    return Question(key, where, {**record, "prompt": prompt}, prompt)


def read_shots(task: Task, source: str, count: int, own: bool) -> list[dict]:
    """Returns the first `count` worked examples of a source.

    own: the source is that of the questions, so only records that `Task.is_shot` picks count.
    Raises ValueError if there are fewer.
    """
    records = (record for _, _, record in read_records(task, source))
    if own:
        records = filter(task.is_shot, records)
    found = list(itertools.islice(records, count))
    if len(found) < count:
        raise ValueError(
            f"{source} holds {len(found)} worked examples, the settings take {count}: give --shots "
            f"or --num_shots={len(found)}"
        )
    return found


def encode(
    tokenizer,
    task: Task,
    questions: Sequence[Question],
    template: str,
    gen_length: int,
    longest: int | None,
) -> list[list[int]]:
    """The ids of all prompts, each up to where its response begins.

    Raises ValueError if a prompt and `gen_length` are more than `longest` tokens (None: no limit).
    """
    prompts = []
    for question in questions:
        if isinstance(question.prompt, str) and template == "plain":
            ids = encode_prompt(tokenizer, question.prompt + task.begins, template)
        else:
            begins = tokenizer.encode(task.begins) if task.begins else []
            ids = encode_prompt(tokenizer, question.prompt, template) + begins
        if longest is not None and len(ids) + gen_length > longest:
            raise ValueError(
                f"{question.where}: a prompt of {len(ids)} tokens and gen_length={gen_length} "
                f"exceed the {longest} that the model takes; lower gen_length or leave the record "
                "out"
            )
        prompts.append(ids)
    return prompts


def digest(questions: Sequence[Question]) -> str:
    """A hash (16 hex digits) of all that is asked."""
    content = [(q.id, q.record, q.prompt) for q in questions]
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
