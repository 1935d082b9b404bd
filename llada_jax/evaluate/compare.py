"""Compares two models by their results on the same questions."""

import argparse
import json
import math
import pathlib
from typing import Any

import numpy as np

from llada_jax.evaluate import lines, table
from llada_jax.evaluate.comparison_picture import draw
from llada_jax.files import write_whole

# Standard normal quantiles: a two-sided test at 5 %, and 80 % power.
Z_TEST, Z_POWER = 1.959964, 0.841621
COLUMNS = ("task", "questions", "A (%)", "B (%)", "B - A", "B better, worse", "questions needed")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `run` reads."""
    parser.add_argument("a", metavar="A", help="folder of results, or one result file")
    parser.add_argument("b", metavar="B", help="the same of another model")
    parser.add_argument("--out", help="folder for compare.json and compare.png")


def paired(a: dict[str, float], b: dict[str, float]) -> dict[str, Any]:
    """The difference b - a of verdicts by id, over the ids of both.

    Returns `difference` and its paired `stderr` (None for one question), `n`, `share` (whether all
    verdicts are from 0 to 1), how many questions
    are `better` and `worse` in b, and `needed`: the number of questions at which a difference as
    large as this is seen in 80 % of the cases by a two-sided test at 5 % (None: no difference).
    Raises ValueError if no id is in both.
    """
    ids = [key for key in a if key in b]
    if not ids:
        raise ValueError("the two have no question in common")
    gaps = np.array([b[key] - a[key] for key in ids])
    mean = float(gaps.mean())
    spread = float(gaps.std(ddof=1)) if len(ids) > 1 else None
    needed = None
    if spread and mean:
        needed = math.ceil(((Z_TEST + Z_POWER) * spread / mean) ** 2)
    return {
        "difference": mean,
        "stderr": None if spread is None else spread / math.sqrt(len(ids)),
        "n": len(ids),
        "better": int((gaps > 0).sum()),
        "worse": int((gaps < 0).sum()),
        "mean_a": float(np.mean([a[key] for key in ids])),
        "mean_b": float(np.mean([b[key] for key in ids])),
        "needed": needed,
        "share": all(0 <= x <= 1 for of in (a, b) for x in of.values()),
    }


def run(args: argparse.Namespace) -> None:
    """Prints the paired differences of all tasks that both have, and writes --out."""
    a, b = _results(args.a), _results(args.b)
    both = [name for name in a if name in b]
    if not both:
        raise ValueError(f"{args.a} has {', '.join(a)}, {args.b} has {', '.join(b)}: none in both")
    found, remarks = {}, []
    for name in both:
        if "verdicts" not in a[name] or "verdicts" not in b[name]:
            remarks.append(f"{name}: only a judge can compare these: see evaluate judge")
            continue
        found[name] = paired(a[name]["verdicts"], b[name]["verdicts"])
        remarks += _differences(name, a[name], b[name])
        left = len(a[name]["verdicts"] | b[name]["verdicts"]) - found[name]["n"]
        if left:
            remarks.append(f"{name}: {left} questions are in one of the two only: left out")
    text = table.markdown(COLUMNS, [_row(name, pair) for name, pair in found.items()])
    print(text + "".join(f"{remark}\n" for remark in remarks), end="")
    if args.out and found:
        out = lines.folder(args.out)
        about = {"a": args.a, "b": args.b, "remarks": remarks}
        lines.write_json(out / "compare.json", {"tasks": found} | about)
        write_whole(out / "compare.png", draw(found, args.a, args.b))


def _row(name: str, pair: dict[str, Any]) -> tuple:
    needed = "-" if pair["needed"] is None else f"{pair['needed']:,}"
    return (
        name,
        pair["n"],
        table.percent(pair["mean_a"], share=pair["share"]),
        table.percent(pair["mean_b"], share=pair["share"]),
        table.percent(pair["difference"], pair["stderr"], pair["share"]),
        f"{pair['better']}, {pair['worse']}",
        needed,
    )


def _results(path: str) -> dict[str, dict[str, Any]]:
    """Results by task, of a folder or of one file."""
    where = pathlib.Path(path).expanduser()
    if where.is_dir():
        return table.results(where)
    if not where.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder of results or a result file")
    try:
        result = json.loads(where.read_text())
        return {result["task"]: result}
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{path} is no result of `python -m llada_jax.evaluate`") from None


def _differences(name: str, a: dict, b: dict) -> list[str]:
    """Remarks on settings that differ, besides the model's."""
    of_a, of_b = a.get("about", {}), b.get("about", {})
    models = ("model", "fingerprint", "tokenizer", "responses")
    differ = [
        key for key in {**of_a, **of_b} if key not in models and of_a.get(key) != of_b.get(key)
    ]
    return [f"{name}: {key} differs: {of_a.get(key)} and {of_b.get(key)}" for key in differ]
