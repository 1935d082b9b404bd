"""The table of the results in a folder."""

import json
import pathlib
from typing import Any

from llada_jax.tasks import TASKS

SETTINGS_COLUMNS = (
    "task", "settings", "length / block", "EOS", "template", "shots", "published (%)"
)  # fmt: skip
COLUMNS = ("task", "settings", "questions", "score (%)", "published (%)", "tokens a pass", "passes")


def results(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The results of a folder by task. Raises ValueError if it holds none."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".settings.json"):
            continue
        try:
            value = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}") from None
        if isinstance(value, dict) and "task" in value:
            found[value["task"]] = value
    if not found:
        raise ValueError(f"{folder} holds no result of `python -m llada_jax.evaluate`")
    return found


def percent(mean: float | None, stderr: float | None = None, share: bool = True) -> str:
    """A share with its standard error, in per cent; any other number as it is, in points."""
    if mean is None:
        return "-"
    scale, digits, unit = (100, 1, "") if share else (1, 2, " points")
    error = "" if stderr is None else f" +- {scale * stderr:.{digits}f}"
    return f"{scale * mean:.{digits}f}{error}{unit}"


def markdown(columns, rows) -> str:
    """A Markdown table whose columns are aligned as text."""
    cells = [tuple(map(str, row)) for row in (columns, *rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns))]
    shown = ["| " + " | ".join(map(str.ljust, row, widths)) + " |\n" for row in cells]
    return "".join([shown[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|\n", *shown[1:]])


def of_settings() -> str:
    """All tasks and their settings as a Markdown table."""
    rows = []
    for name, task in TASKS.items():
        for settings_name, settings in task.settings.items():
            sampler = settings.sampler
            last, never = (sampler.get(f"{x}_inf") for x in ("confidence_eos_eot", "logits_eos"))
            published = ", ".join(f"{who} {score}" for who, score in settings.published.items())
            shape = f"{sampler['gen_length']} / {sampler['block_length']}"
            eos = "last" if last else "never" if never else "-"
            columns = (shape, eos, settings.template, settings.shots, published or "-")
            rows.append((name, settings_name, *columns))
    return markdown(SETTINGS_COLUMNS, rows)


def of_folder(folder: pathlib.Path) -> str:
    """The results of a folder as a Markdown table, further numbers of a task in rows of their own.

    A task that only a judge can score has no score.
    """
    rows = []
    for name, result in results(folder).items():
        scores = result.get("metrics", {"score": {"mean": None, "stderr": None}})
        published = ", ".join(f"{who} {score}" for who, score in result["published"].items())
        first, *others = scores.items()
        shared = (result["about"]["settings"], result["n"])
        speed = (f"{result['tokens_per_pass']:.2f}", result["passes"])
        rows.append((name, *shared, percent(**first[1]), published or "-", *speed))
        rows += [(f"  {key}", "", "", percent(**value), "", "", "") for key, value in others]
    return markdown(COLUMNS, rows)
