"""What a study leaves: a table, its rows and curves as JSON, a picture and a page."""

import json
import math
import statistics

import jax

from llada_jax.evaluate import table
from llada_jax.files import write_whole
from llada_jax.metrics import duration
from llada_jax.parallel import hosts
from llada_jax.study import picture, summary
from llada_jax.study.session import Session
from llada_jax.study.summary import Estimate

PASSES = (
    "passes: steps x rows x draws x model passes a draw, which are forward passes over one row: "
    "3 for the policy (a backward pass counts as two) and 1 for a reference policy."
)


def write(session: Session, out, command: str) -> None:
    """Writes study.json, curves.json, study.md and the pictures to a folder, on the first host.

    They have what is finished so far. Without matplotlib there are no pictures.
    """
    rows, curves = summary.rows(session), summary.curves(session)
    grids = {arm: [v for v, _ in grid] for arm in session.study.arms if (grid := session.grid(arm))}
    text = _page(session, rows, command)
    if not hosts.is_first():
        return
    write_whole(out / "study.json", _lines(rows))
    write_whole(out / "curves.json", _lines(curves))
    try:
        drawn = {
            "study.png": picture.draw(session.study, curves),
            "grid.png": picture.draw_grid(session.study, grids),
        }
    except ImportError as error:
        drawn, text = {}, f"{text}\nThere is no picture: {error}\n"
    for name, content in drawn.items():
        if content:
            write_whole(out / name, content)
            text += f"\n![{session.study.title}]({name})\n"
    write_whole(out / "study.md", text)


def tables(session: Session, rows: list[summary.Row]) -> str:
    """The means over seeds of all arms, and their paired differences from the baseline."""
    study = session.study
    there = [arm for arm in (study.before, *study.arms) if any(r["arm"] == arm for r in rows)]
    if not there:
        return "No final run is finished yet.\n"
    means, differences = [], []
    for arm in there:
        values = {m: summary.by_seed(rows, arm, m) for m in study.metrics}
        passes = next(row["passes"] for row in rows if row["arm"] == arm)
        seeds = max(map(len, values.values()))
        cells = [shown(summary.estimate(of_seeds)) for of_seeds in values.values()]
        means.append((study.label(arm), *cells, f"{passes:,}", seeds))
        if arm == study.baseline or study.baseline not in there:
            continue
        apart = [
            summary.paired(of_seeds, summary.by_seed(rows, study.baseline, m))
            for m, of_seeds in values.items()
        ]
        differences.append((study.label(arm), *(_in_errors(e) for e in apart)))
    text = table.markdown(("arm", *study.metrics, "passes", "seeds"), means)
    if differences:
        heading = f"less {study.label(study.baseline)}, paired by seed"
        text += "\n" + table.markdown((heading, *study.metrics), differences)
    failed = [str(run) for run, result in session.finished() if result.get("failed")]
    if failed:
        text += f"\nFailed, and in no mean: {'; '.join(failed)}.\n"
    return text


def shown(e: Estimate) -> str:
    """A mean with its standard error, in as many digits as the error allows."""
    if math.isnan(e.mean):
        return "-"
    if not e.stderr > 0:
        return f"{e.mean:.4g}"
    digits = max(0, 1 - math.floor(math.log10(e.stderr)))
    return f"{e.mean:.{digits}f} +- {e.stderr:.{digits}f}"


def _in_errors(e: Estimate) -> str:
    return shown(e) + ("" if math.isnan(e.errors) else f" ({e.errors:+.1f})")


def _lines(records: list[summary.Row]) -> str:
    """A JSON array with one record a line."""
    return "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n" if records else "[]\n"


def _page(session: Session, rows: list[summary.Row], command: str) -> str:
    study, finished = session.study, session.finished()
    device = jax.devices()[0].device_kind
    parts = [
        f"# {study.title}\n",
        f"{study.about.strip()}\n" if study.about else "",
        f"{len(finished)} of {session.total} runs are finished. All of them take {study.takes}.\n",
        f"```\n{command}\n```\n",
        "## Results\n",
        "Means over seeds at the last step, with standard errors over seeds. In parentheses: how "
        "many standard errors a difference is from 0.\n",
        tables(session, rows),
        f"The base is `{study.base}`. {PASSES}\n",
        "## Arms\n",
        table.markdown(("arm", "changes", "seconds a run"), _arms(session)),
    ]
    if study.tune:
        parts += ["## Grid points\n", _grids(session)]
    parts.append(f"By jax {jax.__version__} on {jax.device_count()} x {device}.\n")
    return "\n".join(part for part in parts if part)


def _arms(session: Session) -> list[tuple[str, ...]]:
    found = []
    for arm, own in session.study.arms.items():
        seconds = [
            result["seconds"]
            for run, result in session.finished()
            if run.arm == arm and run.point is None and result.get("seconds")
        ]
        took = duration(statistics.fmean(seconds)) if seconds else "-"
        found.append((session.study.label(arm), _changes(own.overrides) or "none", took))
    return found


def _grids(session: Session) -> str:
    """Every grid point of every arm with its metrics, the chosen one marked."""
    study, tune, found, remarks = session.study, session.study.tune, [], []
    columns = [tune.metric, *([tune.budget[0]] if tune.budget else [])]
    for arm, own in study.arms.items():
        if own.inherit:
            remarks.append(f"{study.label(arm)} takes the point of {study.label(own.inherit)}.")
        if (grid := session.grid(arm)) is None:
            continue
        chosen, remark = session.choice(arm)
        if remark:
            remarks.append(f"{study.label(arm)}: {remark}.")
        for k, (values, costs) in enumerate(grid):
            cells = [shown(summary.estimate(dict(enumerate(of)))) for of in (values, costs)]
            mark = "chosen" if k == chosen else ""
            point = _changes(study.grid(arm)[k])
            found.append((study.label(arm), point, *cells[: len(columns)], mark))
    best = "largest" if tune.largest else "smallest"
    within = f" with {tune.budget[0]} of at most {tune.budget[1]:g}" if tune.budget else ""
    about = (
        f"Each arm takes the point of the {best} {tune.metric}{within}, as means over the seeds "
        f"{', '.join(map(str, tune.seeds))}. These runs change "
        f"{_changes(tune.overrides) or 'nothing else'}."
    )
    text = f"{about}\n\n{table.markdown(('arm', 'point', *columns, ''), found)}"
    return text + "".join(f"\n{remark}\n" for remark in remarks)


def _changes(changes) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in changes.items())
