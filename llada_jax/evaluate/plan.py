"""What a run of a task is: its questions, and every setting under which they are answered."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llada_jax import sampling, tasks
from llada_jax.evaluate import questions as questions_lib
from llada_jax.evaluate.questions import Question
from llada_jax.sampling.flags import DEFAULTS, FLAGS
from llada_jax.sampling.settings import make
from llada_jax.tasks import Settings, Task


@dataclasses.dataclass(frozen=True)
class Plan:
    """One task with its questions and settings."""

    name: str
    task: Task
    questions: list[Question]
    template: str
    stop: tuple[str, ...]
    sampler: dict[str, Any]  # keywords of `sampling.generate`
    samples: int  # responses to each question
    about: dict[str, Any]  # all that the responses depend on but the model, as JSON
    published: Mapping[str, float]

    @property
    def gen_length(self) -> int:
        """Positions of a response."""
        return self.sampler["gen_length"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `plans` reads."""
    parser.add_argument(
        "--tasks",
        required=True,
        help=f"NAME,NAME,...: of {', '.join(tasks.TASKS)}, modules with a TASK, or module:function",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="TASK=SOURCE",
        help="records of a task, as gsm8k=jsonl:test.jsonl; repeatable",
    )
    parser.add_argument(
        "--shots",
        action="append",
        default=[],
        metavar="TASK=SOURCE",
        help="worked examples, in the form of the records; repeatable",
    )
    parser.add_argument("--num_shots", type=int, help="worked examples; default: of the settings")
    parser.add_argument("--limit", type=int, default=0, help="questions of each task; 0: all")
    parser.add_argument(
        "--settings",
        help="published settings, as llada15, instruct or base; see docs/evaluation.md",
    )
    parser.add_argument("--template", choices=("chat", "plain"), help="default: of the settings")
    parser.add_argument("--samples", type=int, default=1, help="responses to each question")
    parser.add_argument(
        "--stop", action="append", default=[], help="end a response before this text; repeatable"
    )
    parser.add_argument("--seed", type=int, default=0)
    sampling.add_flags(parser)
    parser.set_defaults(**dict.fromkeys(FLAGS))  # a flag that is not given changes nothing


def plans(args: argparse.Namespace) -> list[Plan]:
    """Returns the tasks of the flags. Raises ValueError, in one line, for what is wrong."""
    names = args.tasks.split(",")
    found = {name: tasks.find(name) for name in names}
    data, shots = (_by_task(flag, getattr(args, flag), names) for flag in ("data", "shots"))
    if args.samples < 1 or args.limit < 0:
        raise ValueError(f"--samples={args.samples} --limit={args.limit}: at least 1, and 0")
    return [_plan(args, name, found[name], data.get(name), shots.get(name)) for name in names]


def _by_task(flag: str, values: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """{task: source} of a repeatable flag; with one task, its name may be left out."""
    found = {}
    for value in values:
        name, _, source = value.partition("=")
        if name not in names and len(names) == 1:
            name, source = names[0], value
        if name not in names or not source:
            raise ValueError(f"--{flag}={value} is not TASK=SOURCE with one of {', '.join(names)}")
        if name in found:
            raise ValueError(f"--{flag}={value}: there is one for {name} already")
        found[name] = source
    return found


def _plan(args, name: str, task: Task, source: str | None, shots_source: str | None) -> Plan:
    named, settings = _settings(name, task, args.settings)
    sampler, growth = _sampler(args, settings)
    template = args.template or settings.template
    source = source or task.source
    if not source:
        raise ValueError(f"{name} has no records of its own: give --data={name}=jsonl:FILE")
    count = settings.shots if args.num_shots is None else args.num_shots
    own = shots_source is None and task.is_shot is not None
    if own:
        shots_source = source
    if count and shots_source is None:
        raise ValueError(
            f"{name} with the settings {named} takes {count} worked examples: give "
            f"--shots={name}=jsonl:FILE or --num_shots=0"
        )
    shots = questions_lib.read_shots(task, shots_source, count, own) if count else []
    asked = questions_lib.read_questions(task, source, template, shots=shots, limit=args.limit)
    stop = (*settings.stop, *args.stop)
    about = {
        "task": name,
        "settings": named,
        "data": source,
        "questions": questions_lib.digest(asked),
        "limit": args.limit,
        "shots": shots_source if count else None,
        "num_shots": count,
        "template": template,
        "begins": task.begins,
        "stop": list(stop),
        "samples": args.samples,
        "seed": args.seed,
        "sampler": sampler | growth,
    }
    if args.samples > 1 and not _is_random(sampler):
        raise ValueError(
            f"--samples={args.samples} at temperature 0 are all the same: give --temperature"
        )
    if growth:
        sampler |= {"growth": sampling.Growth(**growth["growth"])}
    make(True, mask_id=0, eos_id=1, eot_id=2, **sampler)  # refuses what contradicts itself
    return Plan(name, task, asked, template, stop, sampler, args.samples, about, settings.published)


def _settings(name: str, task: Task, asked: str | None) -> tuple[str, Settings]:
    if asked and asked not in task.settings:
        have = f"it has {', '.join(task.settings)}" if task.settings else "it has none"
        raise ValueError(f"--settings={asked}: {name} has no settings of this name; {have}")
    if not task.settings:
        return "flags", Settings({k: DEFAULTS[k] for k in ("gen_length", "block_length")})
    chosen = asked or next(iter(task.settings))
    return chosen, task.settings[chosen]


def _sampler(args, settings: Settings) -> tuple[dict, dict]:
    """(keywords of `generate` without growth, growth as JSON): settings, then flags."""
    flags = {name: getattr(args, name) for name in FLAGS}
    sampler = {**settings.sampler, **{k: v for k, v in flags.items() if v is not None}}
    sampler.setdefault("steps", sampler["gen_length"])  # one token a pass
    growth = {}
    if args.initial_length is not None:
        growth = {"growth": dataclasses.asdict(sampling.Growth(args.initial_length))}
    return sampler, growth


def _is_random(sampler: dict) -> bool:
    remasking = sampler.get("remasking", "low_confidence")
    confidence = sampling.CONFIDENCES.get(remasking)
    return bool(sampler.get("temperature")) or bool(confidence and confidence.random)
