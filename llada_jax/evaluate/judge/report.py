"""The result of a comparison: its figures, what speaks against them, and a table."""

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from llada_jax.evaluate.judge import rating, style
from llada_jax.evaluate.judge.answers import Question
from llada_jax.evaluate.judge.bias import judge_bias
from llada_jax.evaluate.judge.games import Verdicts
from llada_jax.evaluate.judge.judges import ORDERS

# Where a warning begins.
_PLACE_P = 0.01  # p-value
_AGREE_Z, _DISAGREE = 1.64, 25  # standard errors above chance, per cent
_ONE_VERDICT, _MISSING = 95, 5  # per cent of games


def report(questions: Sequence[Question], verdicts: Verdicts, seed: int) -> dict[str, Any]:
    """The figures of all questions that have both verdicts; win rates in per cent.

    Without any such question `n` is 0 and there are no figures.
    """
    by_id: dict[str, dict[str, str | None]] = {
        question.id: {order: verdicts.get((question.id, order)) for order in ORDERS}
        for question in questions
    }
    judged = [question for question in questions if all(by_id[question.id].values())]
    found = {
        "n": len(judged),
        "missing_games": sum(v is None for both in by_id.values() for v in both.values()),
        "missing_questions": len(questions) - len(judged),
        "no_answer_games": 2 * len(questions) - len(verdicts),
        "verdict_counts": dict(collections.Counter(filter(None, verdicts.values())).most_common()),
    }
    if judged:
        pairs = [(str(a), str(b)) for a, b in (by_id[q.id].values() for q in judged)]
        wins, counts = rating.tally(pairs), rating.resamples(len(judged), seed)
        x = np.array([style.differences(q.response, q.baseline) for q in judged])
        controlled, coefficients = rating.controlled(wins, x, counts)
        found = rating.win_rate(wins, counts)._asdict() | found
        found["style_controlled"] = controlled._asdict() | {
            "coefficients": dict(zip(style.NAMES, coefficients, strict=True)),
            "mean_differences": dict(zip(style.NAMES, x.mean(0).tolist(), strict=True)),
        }
        found["bias"] = judge_bias(pairs)._asdict()
    return found | {"warnings": list(_warnings(found)), "verdicts": by_id}


def _warnings(found: dict[str, Any]) -> Iterator[str]:
    games = sum(found["verdict_counts"].values())
    if found["missing_games"] > _MISSING / 100 * (games + found["missing_games"]):
        yield (
            f"{found['missing_games']} games have no verdict; the questions that are left out may "
            "not be like the others"
        )
    if not found["n"]:
        return
    bias = found["bias"]
    if bias["p_value"] < _PLACE_P:
        place = "first" if bias["first_place"] > 50 else "second"
        yield (
            f"the judge prefers the {place} place: the first one wins {bias['first_place']:.1f} % "
            f"(p = {bias['p_value']:.1g})"
        )
    if bias["agree_z"] < _AGREE_Z and bias["disagree"] > _DISAGREE:
        yield (
            f"the two orders disagree on {bias['disagree']:.1f} % of the questions, and verdicts "
            f"by chance would on {bias['disagree_by_chance']:.1f} %: nothing shows that the judge "
            "compares the answers"
        )
    verdict, most = next(iter(found["verdict_counts"].items()))
    if most >= _ONE_VERDICT / 100 * games:
        yield f"the verdict is {verdict} in {100 * most / games:.1f} % of the games"


def table(found: dict[str, Any]) -> Iterable[str]:
    """The lines that the command prints."""
    if found["n"]:
        yield f"win rate           {_rate(found)}  ({found['n']} questions, both orders)"
        yield f"at equal style     {_rate(found['style_controlled'])}"
        bias = found["bias"]
        first, p = bias["first_place"], bias["p_value"]
        yield f"first place wins   {first:5.1f} %  (without bias 50; p = {p:.2g})"
        differ, chance = bias["disagree"], bias["disagree_by_chance"]
        yield f"orders disagree    {differ:5.1f} %  (by chance {chance:.1f})"
    counts = found["verdict_counts"]
    yield "verdicts           " + (", ".join(f"{v} {n}" for v, n in counts.items()) or "none")
    yield (
        f"without verdict    {found['missing_games']} games ({found['no_answer_games']} without "
        f"an answer); {found['missing_questions']} questions are left out"
    )
    yield from (f"warning: {line}" for line in found["warnings"])


def _rate(rate: dict[str, Any]) -> str:
    text = f"{rate['win_rate']:5.1f} %"
    if rate["stderr"] is None:
        return text
    low, high = rate["interval"]
    return f"{text} +- {rate['stderr']:.1f}  [{low:.1f}, {high:.1f}]"
