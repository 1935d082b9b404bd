"""Scores responses that were made elsewhere."""

import argparse
import pathlib

from llada_jax import metrics, tasks
from llada_jax.data.records import parse
from llada_jax.data.sources import raw_records
from llada_jax.data.sources.source import BadRecord
from llada_jax.evaluate import lines
from llada_jax.evaluate.questions import Question, read_questions
from llada_jax.evaluate.summary import scored
from llada_jax.evaluate.table import percent


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `run` reads."""
    parser.add_argument(
        "--task",
        required=True,
        help=f"one of {', '.join(tasks.TASKS)}, a module with a TASK, or module:function",
    )
    parser.add_argument("--data", help="the task's records, as jsonl:FILE; default: its own")
    parser.add_argument(
        "--responses",
        required=True,
        help='FILE.jsonl of {"id": ..., "response": ...}; lines of one id are samples for pass@k',
    )
    parser.add_argument("--out", required=True, help="FILE.json for mean, stderr, n and verdicts")


def run(args: argparse.Namespace) -> None:
    """Scores the responses and writes the result. Raises ValueError for an id that is unknown."""
    task = tasks.find(args.task)
    if task.score is None:
        raise ValueError(f"--task={args.task}: only a judge can score it: see evaluate judge")
    source = args.data or task.source
    if not source:
        raise ValueError(f"{args.task} has no records of its own: give --data=jsonl:FILE")
    questions = {q.id: q for q in read_questions(task, source, "chat", keep_all=True)}
    found = _responses(args.responses, questions)
    responses = [(questions[key], text) for key, text in found]
    with metrics.Progress(len(responses), unit="verdict", show=(), every=5) as progress:
        result = scored(task, responses, unsafe=args.unsafe, progress=progress.update)
    tested = [key for key, q in questions.items() if task.keep is None or task.keep(q.record)]
    result = {"task": args.task} | result
    result |= {
        "missing": len(set(tested) - result["verdicts"].keys()),
        "about": {"data": source, "responses": args.responses},
    }
    lines.write_json(pathlib.Path(args.out).expanduser(), result)
    if "protection" in result:
        print(f"the programs ran under: {result['protection']}")
    for name, value in result["metrics"].items():
        unit = " %" if value["share"] else ""
        print(f"{name} {percent(**value)}{unit} of {result['n']} questions")
    if result["missing"]:
        print(f"{result['missing']} of {len(tested)} questions have no response: left out")


def _responses(path: str, questions: dict[str, Question]) -> list[tuple[str, str]]:
    """(id, response) of all lines."""
    found = []
    for where, unparsed in raw_records(path if path.startswith("jsonl:") else f"jsonl:{path}"):
        try:
            line = parse(unparsed)
        except BadRecord as reason:
            raise ValueError(f"{where}: {reason}; repair it") from reason
        if "id" not in line or not isinstance(line.get("response"), str):
            raise ValueError(f'{where}: a line is {{"id": ..., "response": "text"}}; repair it')
        if str(line["id"]) not in questions:
            raise ValueError(f"{where}: the id {line['id']!r} is that of no record; see --data")
        found.append((str(line["id"]), line["response"]))
    if not found:
        raise ValueError(f"--responses={path} holds no line")
    return found
