"""Turns the raw records of a source into normalised records."""

import json
import re
from collections.abc import Iterator

from absl import logging

from llada_jax.data.sources import raw_records
from llada_jax.data.sources.source import BadRecord
from llada_jax.data.templates import as_messages

NAMED_BAD_RECORDS = 5  # this many skipped records are logged by name; the others are only counted

# The fields of a normalised record, besides the prompt, for each kind.
FIELDS = {
    "preference": ("chosen", "rejected"),
    "sft": ("response",),
    "text": ("text",),
    "prompt": (),
}


class BadRecords:
    """Handles bad records by the `bad_records` policy: "stop" raises, "skip" counts and warns."""

    def __init__(self, policy: str):
        if policy not in ("stop", "skip"):
            raise ValueError(f'bad_records={policy!r} is unknown; use "stop" or "skip"')
        self.policy, self.count = policy, 0

    def add(self, where: str, reason: BadRecord) -> None:
        """Handles one bad record. Raises ValueError if the policy is "stop"."""
        if self.policy == "stop":
            raise ValueError(
                f'{where}: {reason}; repair it or set data.bad_records="skip"'
            ) from reason
        self.count += 1
        if self.count <= NAMED_BAD_RECORDS:
            logging.warning("skipped %s: %s", where, reason)
        elif self.count == NAMED_BAD_RECORDS + 1:
            logging.warning("more bad records are skipped without being named")


def read_records(
    source: str, kind: str, bad_records: str = "stop"
) -> Iterator[tuple[str, dict, dict]]:
    """Yields ("file:line", raw record, normalised record) for each record of a source.

    The kind decides the fields of a normalised record: "preference" has prompt, chosen and
    rejected; "sft" prompt and response; "prompt" only prompt; "text" only text. A prompt is a
    string or a list of messages {role, content}; every other field is a string. `normalise` lists
    the accepted raw forms. Raises ValueError at a bad record; with bad_records="skip" it logs a
    warning and goes on.
    """
    bad = BadRecords(bad_records)
    for where, unparsed in raw_records(source):
        try:
            raw = parse(unparsed)
            yield where, raw, normalise(raw, kind)
        except BadRecord as reason:
            bad.add(where, reason)


def parse(raw: object) -> dict:
    """Parses JSON bytes; a dict is returned as it is. Raises BadRecord for anything else.

    A source may also yield a BadRecord in place of a record.
    """
    if isinstance(raw, BadRecord):
        raise raw
    if isinstance(raw, bytes):
        try:
            escapes = rb"\ud" in raw.lower()
            raw = json.loads(raw)
            if escapes:  # JSON can hold half of a surrogate pair, which no tokenizer accepts
                json.dumps(raw, ensure_ascii=False).encode()
        except json.JSONDecodeError as e:
            raise BadRecord(f"no JSON ({e.msg} at character {e.pos})") from e
        except UnicodeError as e:
            raise BadRecord(f"no UTF-8 ({e})") from e
    if not isinstance(raw, dict):
        raise BadRecord(f"a record is an object with fields, this is {type(raw).__name__}")
    return raw


def normalise(raw: dict, kind: str) -> dict:
    """Returns a raw record in normalised form (see `read_records`).

    prompt: the field `prompt`, `question` or `instruction` (with `input`), a string or messages;
        or the field `messages` without a last assistant turn.
    response: the field `response`, `answer`, `output` or `completion`, or `chosen` of a preference
        record; or the last turn of `messages`.
    chosen, rejected, response: a string, or messages that hold either the answer alone or the whole
        conversation. In a record without a prompt they must be whole conversations, as messages or
        as HH-RLHF transcripts, and chosen and rejected must have the same prompt.

    The content of messages and transcript turns is stripped; strings stay as they are.
    Raises BadRecord if the record has none of these forms, and ValueError for an unknown kind.
    """
    if kind not in FIELDS:
        raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(FIELDS)}")
    if kind == "text":
        return {"text": _string("text", _field(raw, "text"))}
    prompt = _prompt(raw)
    if kind == "preference":
        found = [_response(key, _field(raw, key), prompt) for key in ("chosen", "rejected")]
        if found[0][0] != found[1][0]:
            raise BadRecord("chosen and rejected answer different prompts")
        if found[0][1] == found[1][1]:
            raise BadRecord("chosen and rejected are the same")
        return {"prompt": found[0][0], "chosen": found[0][1], "rejected": found[1][1]}
    if kind == "prompt" and prompt is not None:
        return {"prompt": prompt}
    if kind == "prompt" and "messages" in raw:
        messages = _messages("messages", raw["messages"])
        return {"prompt": messages[:-1] if messages[-1]["role"] == "assistant" else messages}
    key = _first(raw, "messages", "response", "answer", "output", "completion", "chosen")
    prompt, response = _response(key, _field(raw, key), prompt)
    return {"prompt": prompt} if kind == "prompt" else {"prompt": prompt, "response": response}


def _first(raw: dict, *keys: str) -> str:
    key = next((key for key in keys if raw.get(key) is not None), None)
    if key is None:
        raise BadRecord(f"no field {' or '.join(keys)} (it has {', '.join(raw) or 'none'})")
    return key


def _field(raw: dict, key: str) -> object:
    return raw[_first(raw, key)]


def _string(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{key} is {type(value).__name__}, not a string")
    if not value.strip():
        raise BadRecord(f"{key} is empty")
    return value


def _messages(key: str, value: object) -> list[dict]:
    def ok(m: object) -> bool:
        return (
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
        )

    if not isinstance(value, list) or not value or not all(map(ok, value)):
        raise BadRecord(f"{key} is neither a string nor a list of messages with role and content")
    return [{"role": m["role"], "content": m["content"].strip()} for m in value]


def _prompt(raw: dict) -> str | list[dict] | None:
    key = next(
        (key for key in ("prompt", "question", "instruction") if raw.get(key) is not None), None
    )
    if key is None:
        return None
    value = raw[key]
    if not isinstance(value, str):
        return _messages(key, value)
    if key == "instruction" and raw.get("input"):
        value = f"{value}\n\n{_string('input', raw['input'])}"
    # A transcript that was split into prompt and answer ends with an empty assistant turn.
    turns = _transcript(value)
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else value


def _transcript(text: str) -> list[dict]:
    """Returns the messages of an HH-RLHF transcript, or [] if the text is not a transcript."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if before.strip() or not parts:
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _response(
    key: str, value: object, prompt: str | list[dict] | None
) -> tuple[str | list[dict], str]:
    """Returns (prompt, response).

    `value` is the response to the prompt, or a whole conversation that ends with the response.
    """
    if isinstance(value, str) and prompt is not None:
        return prompt, _string(key, value)
    turns = _transcript(value) if isinstance(value, str) else _messages(key, value)
    if not turns:
        raise BadRecord(
            f"no prompt, and {key} is no transcript (it does not begin with \\n\\nHuman:)"
        )
    *head, last = turns
    if last["role"] != "assistant":
        raise BadRecord(f"{key} does not end with a turn of the assistant")
    if not head and prompt is None:
        raise BadRecord(f"no prompt: {key} has one turn only")
    response = _string(f"the last turn of {key}", last["content"])
    if not head:
        return prompt, response
    if prompt is None or head == as_messages(prompt):
        return head if prompt is None else prompt, response
    # A conversation may hold more than the prompt field does: a system message or other turns.
    if not isinstance(prompt, str) or {"role": "user", "content": prompt.strip()} not in head:
        raise BadRecord(f"{key} repeats another prompt than the field prompt")
    return head, response
