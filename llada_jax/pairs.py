r"""Makes on-policy preference pairs: samples responses, scores them, writes winners and losers.

    python -m llada_jax.pairs --model=WORKDIR --prompts=jsonl:prompts.jsonl \
        --scorer=module:function --out=pairs.jsonl

A scorer is a function (record: dict, response: str) -> float; a higher score is better. An example
is `llada_jax.tasks.sudoku:score`. The scorer gets the record of the source with all its fields; the
field `prompt` is the prompt. Or it is a task, as gsm8k, which also makes prompts of its records.
The output can be used as a source of preference records.
"""

import argparse
import collections
import itertools
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np

from llada_jax import cli, metrics, sampling, tasks
from llada_jax.checkpoints import loading
from llada_jax.evaluate.questions import Question, encode, read_questions
from llada_jax.files import write_jsonl
from llada_jax.tasks import Task


def choose_pairs(
    scores: dict[str, float], count: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Returns up to `count` distinct (winner, loser), chosen at random.

    `scores` maps each response to its score. The two scores of a pair differ.
    """
    pairs = [(w, l) for w, l in itertools.permutations(scores, 2) if scores[w] > scores[l]]
    return [pairs[i] for i in rng.permutation(len(pairs))[:count]]


def make_pairs(
    logits_fn: Callable,
    tokenizer,
    task: Task,
    questions: Sequence[Question],
    *,
    template: str,
    samples: int,
    pairs_per_prompt: int = 1,
    batch_size: int,
    seed: int,
    gen_length: int,
    max_length: int | None = None,
    eos_id: int | None = None,
    eot_id: int | None = None,
    progress: Callable[[int, int], object] | None = None,
    **settings,
) -> tuple[list[dict], dict[str, float | int]]:
    """Returns (pairs, counts) from `samples` responses to each question.

    A pair is {prompt, chosen, rejected, chosen_score,
    rejected_score}, where `chosen` has the higher score. A response is the text up to EOS or EoT.
    Equal responses are scored once. Empty responses are not allowed in preference data: they count
    in the mean score, but are in no pair. `settings` go to `sampling.sample_responses`.

    Raises ValueError if `samples` or `pairs_per_prompt` is too small, if there are no questions,
    or if a prompt and its response do not fit in `max_length` tokens or the task cannot score it.
    The message names the record.
    """
    for name, value, least in (("samples", samples, 2), ("pairs_per_prompt", pairs_per_prompt, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if not questions:
        raise ValueError("there are no prompts; give a source that has some")
    prompts = encode(tokenizer, task, questions, template, gen_length, max_length)
    tokens = sampling.sample_responses(
        logits_fn,
        [prompt for prompt in prompts for _ in range(samples)],
        batch_size=batch_size,
        gen_length=gen_length,
        eos_id=eos_id,
        eot_id=eot_id,
        key=jax.random.key(seed),
        progress=progress,
        **settings,
    ).reshape(len(questions), samples, gen_length)

    pairs, totals, empty, without = [], [], 0, 0
    for i, question in enumerate(questions):
        texts = collections.Counter(
            tokenizer.decode(sampling.trim(row, eos_id, eot_id)) for row in tokens[i]
        )
        scores = {text: _score(task, question, text) for text in texts}
        totals += [scores[text] for text in texts.elements()]
        usable = {text: score for text, score in scores.items() if text.strip()}
        empty += sum(n for text, n in texts.items() if text not in usable)
        chosen = choose_pairs(usable, pairs_per_prompt, np.random.default_rng((seed, i)))
        without += not chosen
        pairs += [
            {"prompt": question.prompt} | _pair(scores, winner, loser) for winner, loser in chosen
        ]
    return pairs, {
        "prompts": len(questions),
        "samples": len(totals),
        "pairs": len(pairs),
        "mean_score": float(np.mean(totals)),
        "without_contrast": without / len(questions),
        "empty": empty,
    }


def _score(task: Task, question: Question, text: str) -> float:
    """The main number of a response."""
    value = next(iter(task.judge(question.where, question.record, text).values()))
    return float(np.mean(value))


def _pair(scores: dict[str, float], winner: str, loser: str) -> dict:
    return {
        "chosen": winner,
        "rejected": loser,
        "chosen_score": scores[winner],
        "rejected_score": scores[loser],
    }


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("pairs", __doc__)
    loading.add_flags(parser)
    parser.add_argument(
        "--prompts", required=True, help="jsonl:FILES, tfds:NAME or python:module:function"
    )
    parser.add_argument(
        "--scorer", required=True, help="a task, or module:function, (record, response) -> float"
    )
    parser.add_argument("--out", required=True, help="FILE.jsonl or FILE.jsonl.gz")
    parser.add_argument("--samples", type=int, default=8, help="responses to each prompt")
    parser.add_argument(
        "--pairs_per_prompt", type=int, default=1, help="distinct winner and loser combinations"
    )
    parser.add_argument("--template", choices=("chat", "plain"), default="chat")
    parser.add_argument("--batch_size", type=int, default=32, help="responses sampled at once")
    parser.add_argument("--limit", type=int, default=0, help="use so many prompts; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    sampling.add_flags(parser)
    parser.set_defaults(temperature=1.0)
    return parser


def main(args: argparse.Namespace):
    """Runs the command and prints a summary."""
    if args.temperature == 0 and not sampling.CONFIDENCES[args.remasking].random:
        raise ValueError(
            "--temperature=0 gives every sample of a prompt the same response; raise it"
        )
    task = tasks.find(args.scorer)
    questions = read_questions(task, args.prompts, args.template, limit=args.limit)
    logits_fn, config, tokenizer = loading.open_model(args.model, args.dtype, args.quantize)
    with metrics.Progress(len(questions) * args.samples, unit="sample", show=()) as progress:
        pairs, counts = make_pairs(
            logits_fn,
            tokenizer,
            task,
            questions,
            template=args.template,
            samples=args.samples,
            pairs_per_prompt=args.pairs_per_prompt,
            batch_size=args.batch_size,
            seed=args.seed,
            max_length=config.max_sequence_length,
            progress=lambda done, _: progress.update(done),
            **loading.special_ids(config, tokenizer),
            **sampling.settings_of(args),
        )
    summary = (
        "{prompts} prompts, {samples} responses ({empty} empty), mean score {mean_score:.4f}, "
        "{without_contrast:.1%} of prompts without contrast, {pairs} pairs".format(**counts)
    )
    if not pairs:
        raise ValueError(
            f"{summary}: nothing to prefer; raise --samples or --temperature, or try other prompts"
        )
    write_jsonl(args.out, pairs)
    print(f"{summary} in {args.out}")


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
