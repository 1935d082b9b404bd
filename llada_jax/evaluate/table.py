"""The table of the results in a folder."""

import json
import pathlib
from typing import Any

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


def percent(mean: float | None, stderr: float | None) -> str:
    """A share with its standard error, in per cent."""
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}" + ("" if stderr is None else f" +- {100 * stderr:.1f}")


def markdown(columns, rows) -> str:
    """A Markdown table whose columns are aligned as text."""
    cells = [tuple(map(str, row)) for row in (columns, *rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns))]
    shown = ["| " + " | ".join(map(str.ljust, row, widths)) + " |\n" for row in cells]
    return "".join([shown[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|\n", *shown[1:]])


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
