"""The command of the lm-evaluation-harness: its tasks, scored on a model of this library."""

import argparse
import dataclasses
import difflib
import importlib
import json
import pathlib

from llada_jax.checkpoints import hashing, loading
from llada_jax.files import is_remote, write_jsonl, write_whole
from llada_jax.parallel import agree, hosts
from llada_jax.sampling.flags import add_flags as add_sampler_flags
from llada_jax.sampling.flags import settings_of
from llada_jax.sampling.settings import Settings

OWN = ("batch_size", "max_length", "estimator", "mc_num", "add_bos_token", "published")
OWN += ("data_parallel", "fsdp", "tensor", "seed")
ANSWERS_DEPEND_ON = ("llada_jax", "model_fingerprint", "tokenizer_fingerprint", "settings")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    loading.add_flags(parser, data_parallel=-1)
    parser.add_argument("--tasks", required=True, help="NAME,NAME,... of tasks, groups or tags")
    parser.add_argument("--include_path", help="a folder with task files of your own")
    parser.add_argument("--out", help="folder for results and responses; it may be continued")
    parser.add_argument("--num_fewshot", type=int, help="worked examples; default: the task's")
    parser.add_argument("--limit", type=int, help="documents of each task; default: all")
    parser.add_argument("--apply_chat_template", action="store_true", help="prompts are chats")
    parser.add_argument("--system_instruction", help="the system's turn of a chat, or first text")
    parser.add_argument(
        "--fewshot_in_one_turn", action="store_true", help="of a chat; default: a turn each"
    )
    parser.add_argument("--gen_kwargs", help="NAME=VALUE,... in place of those of the tasks")
    parser.add_argument("--batch_size", type=int, default=16, help="rows in one model call")
    parser.add_argument("--max_length", type=int, help="tokens of a request; default: the model's")
    parser.add_argument(
        "--estimator",
        choices=("published", "unbiased", "few"),
        default="unbiased",
        help="of the likelihood (docs/likelihood.md)",
    )
    parser.add_argument("--mc_num", type=int, help="draws; default: 128, 64 of few")
    parser.add_argument(
        "--no_greedy", action="store_true", help="do not find out if answers are greedy"
    )
    parser.add_argument("--add_bos_token", action="store_true", help="put BOS before each prompt")
    parser.add_argument(
        "--published", action="store_true", help="ids and texts as LLaDA's own adapter makes them"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--unsafe",
        action="store_true",
        help="tasks that run responses as programs: the harness runs them without protection",
    )
    add_sampler_flags(parser)
    # The tasks have lengths of their own, where these are not given.
    parser.set_defaults(steps=None, gen_length=None, block_length=None)


def run(args: argparse.Namespace) -> None:
    """Scores the tasks and prints a table; with --out also writes results and responses.

    Start it on every host; process 0 prints and writes. Raises ImportError without lm_eval, and
    ValueError for wrong flags or tasks.
    """
    hosts.initialize()
    hosts.check_joined()
    if args.out and is_remote(args.out):
        raise ValueError(f"--out={args.out}: answers are kept in SQLite: give a local folder")
    adapter = importlib.import_module("llada_jax.evaluate.lm_eval")
    manager = _open_tasks(args) if hosts.is_first() else None
    agree.meet()
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    sampler = settings_of(args)
    sampler = {k: v for k, v in sampler.items() if v is not None and v != defaults[k]}
    model = adapter.LladaJax(
        args.model,
        dtype=args.dtype,
        quantize=args.quantize,
        check_greedy=not args.no_greedy,
        **{name: getattr(args, name) for name in OWN},
        **sampler,
    )
    if manager is None:
        model.serve()
        return
    results = _evaluate(model, manager, args)
    model.close()
    utils = importlib.import_module("lm_eval.utils")
    if args.out:
        _write(pathlib.Path(args.out).expanduser(), results, utils.handle_non_serializable)
    print(utils.make_table(results))
    if results.get("groups"):
        print(utils.make_table(results, "groups"))


def _open_tasks(args: argparse.Namespace):
    """The harness's manager of tasks; raises ValueError if it does not have all of --tasks."""
    if args.include_path and not pathlib.Path(args.include_path).is_dir():
        raise ValueError(f"--include_path={args.include_path} is no folder")
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=args.include_path)
    for name in args.tasks.split(","):
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ValueError(f"--tasks={name} is no task of the harness or --include_path{hint}")
    return manager


def _evaluate(model, manager, args: argparse.Namespace) -> dict:
    """The harness's results; with --out it continues from the answers of an earlier run."""
    cache = None
    if args.out:
        about = {k: str(v) for k, v in model.get_model_info().items() if k in ANSWERS_DEPEND_ON}
        name = f"answers-{hashing.digest(about)[:16]}"
        cache = str(pathlib.Path(args.out).expanduser() / name)
    return importlib.import_module("lm_eval").simple_evaluate(
        model,
        tasks=manager.match_tasks(args.tasks.split(",")),
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        use_cache=cache,
        batch_size=args.batch_size,
        apply_chat_template=args.apply_chat_template,
        system_instruction=args.system_instruction,
        fewshot_as_multiturn=args.apply_chat_template and not args.fewshot_in_one_turn,
        gen_kwargs=args.gen_kwargs,
        random_seed=args.seed,
        numpy_random_seed=args.seed,
        torch_random_seed=args.seed,
        fewshot_random_seed=args.seed,
        confirm_run_unsafe_code=args.unsafe,
    )


def _write(out: pathlib.Path, results: dict, as_json):
    """Writes the responses of each task, then results.json."""
    for task, samples in results.pop("samples").items():
        lines = [json.loads(json.dumps(sample, default=as_json)) for sample in samples]
        write_jsonl(out / f"samples_{task}.jsonl", lines)
    write_whole(out / "results.json", json.dumps(results, indent=2, default=as_json) + "\n")
