"""What a run says at its end: a table of before and after, responses, and the path of a picture."""

import math
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from llada_jax.evaluate.responses import COUNT, KL
from llada_jax.train.experiment import Experiment

PICTURES = ("unmasking.html", "unmasking.png")  # of the first prompt that is shown, in WORKDIR
EXAMPLES = "examples"  # the responses that are shown, in an evaluation of the history
_RATE = "solve/rate"
_COLUMN = 24


def one_line(plan: Experiment, found: dict) -> str:
    """Returns the main metrics of an evaluation in one line."""
    names = [*_solved(found), *_heldout(plan, found)]
    return ", ".join(f"{name} {_cells(name, found)[0]}" for name in names)


def print_result(plan: Experiment, history: Sequence[dict]):
    """Prints what the evaluations before and after training found.

    A table of every metric with its standard error; the examples (`Solve.show`), which are coloured
    in a terminal; and the path of the picture.
    """
    print(f"done: {plan.num_steps} steps, {plan.workdir}")
    before, after = history[0], history[-1]
    lines = list(_table(plan, before, after))
    if lines:
        columns = (f"before (step {before['step']})", f"after (step {after['step']})")
        _print_line("", columns)
    for name, cells in lines:
        _print_line(name, cells)
    # A score that is no share has no share of errors.
    if _RATE in before and 0 <= before[_RATE] < 1 and 0 <= after.get(_RATE, -1) <= 1:
        removed = (after[_RATE] - before[_RATE]) / (1 - before[_RATE])
        print(f"share of the errors removed: {removed:.1%}")
    _print_examples(before.get(EXAMPLES, []), after.get(EXAMPLES, []))
    pictures = [plan.workdir / name for name in PICTURES if (plan.workdir / name).exists()]
    if plan.solve.show and pictures:
        print(f"\nhow the first of them was written: {', '.join(map(str, pictures))}")


def _table(plan: Experiment, *evaluations: dict) -> Iterator[tuple[str, Sequence[str]]]:
    """Yields (name, cells) of each line below the head, the headings of its two parts included."""

    def common(names: Sequence[list[str]]) -> list[str]:
        return [name for name in names[0] if all(name in other for other in names)]

    if solved := common([_solved(found) for found in evaluations]):
        yield f"answers to {evaluations[-1][COUNT]} prompts", ()
        for name in solved:
            shown = "KL from reference (nats)" if name == KL else name.removeprefix("solve/")
            yield f"  {shown}", _cells(name, *evaluations)
    if measured := common([_heldout(plan, found) for found in evaluations]):
        yield f"held-out {plan.objective.unit}", ()
        for name in measured:
            yield f"  {name}", _cells(name, *evaluations)


def _print_line(name: str, cells: Sequence[str]):
    print(f"{name:<26}{''.join(f'{cell:>{_COLUMN}}' for cell in cells)}".rstrip())


def _solved(found: dict) -> list[str]:
    names = (name for name in found if name.startswith("solve/") and name != COUNT)
    return [name for name in names if not name.endswith("_stderr")]


def _heldout(plan: Experiment, found: dict) -> list[str]:
    return [name for name in plan.objective.heldout if name in found]


def _cells(name: str, *evaluations: dict) -> list[str]:
    """One value for each evaluation, in two digits of the largest error."""
    errors = [found.get(f"{name}_stderr", math.nan) for found in evaluations]
    known = [error for error in errors if 0 < error < math.inf]
    digits = min(max(1 - math.floor(math.log10(max(known))), 0), 4) if known else 4
    return [
        f"{found[name]:.{digits}f}" + ("" if math.isnan(error) else f" +- {error:.{digits}f}")
        for found, error in zip(evaluations, errors, strict=True)
    ]


def _print_examples(before: Sequence[dict], after: Sequence[dict]):
    console = Console(highlight=False, soft_wrap=True)
    width = console.width - 4 if console.is_terminal else 1_000_000
    for old, new in zip(before, after, strict=False):
        console.print(f"\n{old['prompt']}", style="bold", markup=False)
        for when, example in (("before", old), ("after", new)):
            console.print(f"  {when}: {example['score']}", markup=False)
            for line in _coloured(example["pieces"]).wrap(console, width):
                console.print(Text("    ") + line)


def _coloured(pieces: Sequence[Sequence]) -> Text:
    text = Text()
    for piece, value in pieces:
        style = "" if not value else "green" if value > 0 else "red"
        text.append(piece, style=style)
    return text
