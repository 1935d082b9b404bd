"""A task: records, prompts, the sampler's settings, and the score of a response."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# What a score function returns: a number, or numbers by name, the first of which is the main one.
# A list holds several verdicts on one response, which count alike in the mean.
Score = float | Mapping[str, float | list[float]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings under which a task is run.

    sampler: keywords of `sampling.generate`. Without `steps` there is one pass a token.
    template: "chat" (the tokenizer's chat template), or "plain" (BOS and the text).
    shots: worked examples before the question.
    stop: texts that end a response.
    published: the scores that were published with them, in per cent, by model.
    """

    sampler: Mapping[str, Any]
    template: str = "chat"
    shots: int = 0
    stop: tuple[str, ...] = ()
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model is tested on.

    fields: the fields that a record must have, and their types.
    score: (record, response) -> Score, higher is better. None if only a judge can compare.
    settings: the settings by name; the first is the default.
    prompt: (record, shots, template) -> a text, or messages {role, content}. None: the record's own
        prompt, as `data.records.normalise` reads it.
    begins: text with which every response begins. It is given to the model, not to `score`.
    source: where the records come from without --data; a source of `data.sources`.
    id_field: the field that names a record. None: its number in the source, from 0.
    keep: which records are tested; all by default.
    is_shot: which records of the source are the worked examples; by default none, and a file
        gives them.
    shade: (record, response) -> the response in pieces, each with how good it is, from -1 to 1, or
        None for no opinion: [("The plot is ", None), ("witty", 1.0), (".", None)]. Colours for the
        reader; no score depends on them.
    runs_code: whether `score` runs the response as a program, in `tasks.sandbox`. It then takes
        `unsafe`, whether it may do so without protection.
    """

    fields: Mapping[str, type | tuple[type, ...]]
    score: Callable[..., Score] | None
    settings: Mapping[str, Settings]
    prompt: Callable[[dict, Sequence[dict], str], str | list[dict]] | None = None
    begins: str = ""
    source: str | None = None
    id_field: str | None = None
    keep: Callable[[dict], bool] | None = None
    is_shot: Callable[[dict], bool] | None = None
    shade: Callable[[dict, str], Sequence[tuple[str, float | None]]] | None = None
    runs_code: bool = False

    def judge(self, where: str, record: dict, response: str, **options) -> dict[str, Any]:
        """The numbers of a response, by name; the main one is the first.

        Raises ValueError, which names the record, if the score function raises an error or returns
        anything but finite numbers.
        """
        shown = f"(response {response[:80]!r})"
        if self.score is None:
            raise ValueError(f"{where}: only a judge can compare these responses")
        try:
            value = self.score(record, response, **options)
        except Exception as error:  # whatever a user's function raises
            raise ValueError(
                f"{where}: the scorer raised {type(error).__name__}: {error} {shown}"
            ) from error
        named = value if isinstance(value, Mapping) else {"score": value}
        for name, found in named.items():
            for number in found if isinstance(found, list) else [found]:
                if not isinstance(number, numbers.Real | np.bool_) or not math.isfinite(number):
                    raise ValueError(
                        f"{where}: the scorer returned {name}={number!r}, not a finite number "
                        f"{shown}"
                    )
        return {
            name: [float(x) for x in found] if isinstance(found, list) else float(found)
            for name, found in named.items()
        }

    def shaded(self, record: dict, response: str) -> list[tuple[str, float | None]]:
        """The response in pieces with how good they are, see `shade`; one piece by default.

        Raises ValueError if the pieces are not those of the response.
        """
        pieces = [(response, None)] if self.shade is None else list(self.shade(record, response))
        if "".join(piece for piece, _ in pieces) != response:
            raise ValueError(f"shade does not return the response: {pieces!r} (of {response!r})")
        return pieces

    def number(self, where: str, record: dict, response: str) -> float:
        """The main number of a response, the mean of its verdicts if there are several.

        Raises ValueError as `judge` does.
        """
        return float(np.mean(next(iter(self.judge(where, record, response).values()))))


def one_user_turn(text: str, template: str) -> str | list[dict]:
    """A prompt of one text: the user's turn, or the text itself for the template "plain"."""
    return text if template == "plain" else [{"role": "user", "content": text}]
