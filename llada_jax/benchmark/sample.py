"""The sampling benchmark: speed of the sampler by rule, cache, batch and length, measured in turns.

A case is one program: a prompt length, a response length, a batch, a commit rule and a cache. A
turn runs every case once, and beside it the PyTorch loop of the same rule and cache, if it is asked
for. So a machine that others use slows all of them alike, and the ratios hold.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from llada_jax import metrics, models, sampling
from llada_jax.benchmark.step import planned_bytes
from llada_jax.checkpoints import loading
from llada_jax.models.llada import ModelConfig
from llada_jax.sampling.flags import FLAGS

# Models with random weights, by their number of parameters. The head of "25M" costs about as large
# a part of a pass (9 %) as that of LLaDA 8B (7 %).
SIZES = {
    "tiny": ModelConfig(
        d_model=32, n_heads=2, n_layers=2, mlp_hidden_size=64, vocab_size=64, mask_token_id=63
    ),
    "25M": ModelConfig(
        d_model=512, n_heads=4, n_layers=6, mlp_hidden_size=1536, vocab_size=4096,
        mask_token_id=4095,
    ),
    "8B": ModelConfig(
        d_model=4096, n_heads=32, n_layers=32, mlp_hidden_size=12288, vocab_size=126464,
        mask_token_id=126336,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """What one program does."""

    prompt_length: int
    gen_length: int
    batch: int
    commit: str
    cache: str

    @property
    def length(self) -> int:
        """The positions of a row."""
        return self.prompt_length + self.gen_length


@dataclasses.dataclass
class Times:
    """What one sampler did in a case, turn by turn."""

    seconds: list[float] = dataclasses.field(default_factory=list)  # of a call
    processor: list[float] = dataclasses.field(default_factory=list)  # of its threads together
    first_block: list[float] = dataclasses.field(default_factory=list)  # until it is filled
    passes: int = 0  # forward passes of the batch in a call
    tokens: Any = None  # [b, l], prompts first

    def add(self, seconds: float, processor: float, first_block: float, passes: int, tokens):
        """Adds a turn. At temperature 0 all turns write the same tokens in the same passes."""
        self.seconds.append(seconds)
        self.processor.append(processor)
        self.first_block.append(first_block)
        self.passes, self.tokens = passes, np.asarray(tokens)


@dataclasses.dataclass
class Program:
    """A case and what was measured of it."""

    case: Case
    settings: dict[str, Any]  # of `sampling.generate`
    prompts: np.ndarray  # [b, lp]
    lowered: Any  # the loop of `sampling.generate`
    compiled: Any = None
    positions: int | None = None  # see `positions_of`
    ours: Times = dataclasses.field(default_factory=Times)
    theirs: Times = dataclasses.field(default_factory=Times)  # of PyTorch; empty without it


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `run` reads."""
    parser.add_argument(
        "--model",
        default="25M",
        help=f"{', '.join(SIZES)}: random weights; or a folder that llada_jax.load opens",
    )
    parser.add_argument("--dtype", default="float32", help="of the parameters")
    parser.add_argument("--prompt_length", type=_ints, default="512", help="N or N,N,...")
    parser.add_argument("--gen_length", type=_ints, default="256", help="N or N,N,...")
    parser.add_argument("--block_length", type=int, default=32)
    parser.add_argument(
        "--steps", type=int, help="of the schedule; default: gen_length, one token a pass"
    )
    parser.add_argument("--batch", type=_ints, default="1", help="rows: N or N,N,...")
    parser.add_argument("--cache", type=_words, default="none,prefix,dual")
    parser.add_argument("--commit", type=_words, default="schedule")
    for name in rule_settings():
        kind, text = FLAGS[name]
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument(
        "--torch", action="store_true", help="also time PyTorch's loops (float32, on a CPU)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights and prompts")


def rule_settings() -> list[str]:
    """The settings that a commit rule or a cache needs."""
    entries = [*sampling.COMMITS.values(), *sampling.CACHES.values()]
    return sorted({name for entry in entries for name in entry.needs})


def _words(text: str) -> list[str]:
    return text.split(",")


def _ints(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number and no list N,N,...") from None


def open_model(name: str, dtype: str, seed: int) -> tuple[Partial, Any]:
    """Returns (logits_fn, parameters) of a size or a folder."""
    if name not in SIZES:
        model, params = loading.load(name, dtype)
    else:
        config, kind = SIZES[name], jnp.dtype(dtype)
        model = models.family_of(config).Module(config, dtype=kind, param_dtype=kind)
        tokens = jnp.zeros((1, 2), jnp.int32)
        boxed = jax.jit(model.init)(jax.random.key(seed), tokens)["params"]
        params = nn.unbox(boxed)
    return Partial(model.apply, {"params": params}), params


def settings_of(case: Case, args: argparse.Namespace, config) -> dict[str, Any]:
    """The arguments of `sampling.generate` for a case.

    The confidence is that of the published loop: LLaDA's for its schedule without a cache,
    Fast-dLLM's for all else.
    """
    rule, cache = sampling.COMMITS[case.commit], sampling.CACHES[case.cache]
    as_llada = case.commit == "schedule" and case.cache == "none"
    settings = {
        "mask_id": config.mask_token_id,
        "gen_length": case.gen_length,
        "block_length": args.block_length,
        "cache": case.cache,
        "commit": case.commit,
        "remasking": "low_confidence" if as_llada else "probability",
        **{name: getattr(args, name) for name in (*rule.needs, *cache.needs)},
    }
    return settings | ({"steps": args.steps or case.gen_length} if rule.scheduled else {})


def prompts_of(case: Case, config, seed: int) -> np.ndarray:
    """Random prompts [b, lp] without masks, the same for every rule, cache and response length."""
    rng = np.random.default_rng((seed, case.batch, case.prompt_length))
    ids = rng.integers(0, config.vocab_size - 1, (case.batch, case.prompt_length))
    return (ids + (ids >= config.mask_token_id)).astype(np.int32)


def cases_of(args: argparse.Namespace, config) -> list[Case]:
    """All cases. Raises ValueError, in one line, for settings that the sampler does not take."""
    for name, table in (("cache", sampling.CACHES), ("commit", sampling.COMMITS)):
        for value in getattr(args, name):
            if value not in table:
                raise ValueError(f"--{name}={value} is not one of {', '.join(table)}")
    for name in ("prompt_length", "gen_length", "batch"):
        if min(getattr(args, name)) < 1:
            raise ValueError(f"--{name}={min(getattr(args, name))} must be at least 1")
    chosen = [sampling.COMMITS[commit] for commit in args.commit]
    chosen += [sampling.CACHES[cache] for cache in args.cache]
    needed = {name for entry in chosen for name in entry.needs}
    for name in rule_settings():
        if getattr(args, name) is not None and name not in needed:
            raise ValueError(
                f"--{name}={getattr(args, name)} has no effect with --commit="
                f"{','.join(args.commit)} --cache={','.join(args.cache)}: leave it or choose a rule"
                " that reads it"
            )
    if args.repeats < 1:
        raise ValueError(f"--repeats={args.repeats}: at least one turn is timed")
    values = (args.prompt_length, args.gen_length, args.batch, args.commit, args.cache)
    cases = [Case(*one) for one in itertools.product(*values)]
    longest = max(case.length for case in cases)
    if longest > config.max_sequence_length:
        raise ValueError(
            f"--prompt_length and --gen_length are {longest} tokens together, the model takes "
            f"{config.max_sequence_length}: lower one"
        )
    return cases


def first_block_of(logits_fn, prompts: np.ndarray, settings: dict) -> float:
    """The seconds until the host has the first block of every row."""
    began = time.perf_counter()
    block = slice(prompts.shape[1], prompts.shape[1] + settings["block_length"])
    for now in sampling.stream(logits_fn, prompts, **settings):
        if not (np.asarray(now.tokens[:, block]) == settings["mask_id"]).any():
            break
    return time.perf_counter() - began


def positions_of(case: Case, block_length: int, steps: np.ndarray, passes: int) -> int | None:
    """The positions of a row that the published loop computes in all passes of a call.

    steps: `[b, l]`, the pass that committed each position. None for a cache without a formula.
    """
    windows = {
        "prefix": lambda first: case.length - first,
        "dual": lambda first: block_length,
    }
    if case.cache == "none":
        return passes * case.length
    if case.cache not in windows:
        return None
    firsts = range(case.prompt_length, case.length, block_length)
    ends = [steps[:, first : first + block_length].max() for first in firsts]
    of_blocks = np.diff(ends, prepend=0)
    # The first pass of a block computes the whole row.
    return sum(
        case.length + int(count - 1) * windows[case.cache](first)
        for first, count in zip(firsts, of_blocks, strict=True)
    )


def compile_cases(cases: list[Case], args, logits_fn, config) -> list[Program]:
    """Compiles the programs of all cases, and those of `stream`.

    Raises ValueError, before anything is compiled, for settings that the sampler does not take.
    """
    programs = []
    for case in cases:
        settings, prompts = settings_of(case, args, config), prompts_of(case, config, args.seed)
        lowered = sampling.lower(logits_fn, prompts, **settings)
        programs.append(Program(case, settings, prompts, lowered))
    with metrics.Progress(len(programs), unit="program", show=(), every=2) as progress:
        progress.update(0)
        for done, program in enumerate(programs, 1):
            program.compiled = program.lowered.compile()  # `generate` finds it in JAX's cache
            # The first pass begins from a state that no pass has made.
            stream = sampling.stream(logits_fn, program.prompts, **program.settings)
            list(itertools.islice(stream, 2))
            progress.update(done)
    return programs


def timed(call: Callable) -> tuple[Any, float, float]:
    """Returns (the result of a call, its seconds, the processor seconds of this process)."""
    began, used = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - began, time.process_time() - used


def time_ours(program: Program, logits_fn) -> None:
    """Times one call, and one stream until the first block is filled."""
    call = functools.partial(sampling.generate, logits_fn, program.prompts, trace=True)
    trace, *seconds = timed(lambda: jax.block_until_ready(call(**program.settings)))
    first = first_block_of(logits_fn, program.prompts, program.settings)
    passes = int(trace.passes)
    program.ours.add(*seconds, first, passes, trace.tokens)
    block_length, steps = program.settings["block_length"], np.asarray(trace.steps)
    program.positions = positions_of(program.case, block_length, steps, passes)


def time_torch(program: Program, torch_sampling, model) -> None:
    """Times one call of the PyTorch loop."""
    names = ("mask_id", "gen_length", "block_length", "cache", "steps", "threshold")
    settings = {name: value for name, value in program.settings.items() if name in names}
    call = functools.partial(torch_sampling.generate, model, program.prompts, **settings)
    written, *seconds = timed(call)
    program.theirs.add(*seconds, written.block_seconds[0], written.passes, written.tokens)


def time_turns(programs: list[Program], repeats: int, logits_fn, torch_sampling, weights) -> None:
    """Times all programs in turns, and beside each its PyTorch loop, if there is one."""
    model = torch_sampling and torch_sampling.TorchLLaDA(weights[0], jax.device_get(weights[1]))

    def loops(program):
        yield functools.partial(time_ours, program, logits_fn)
        if torch_sampling and torch_sampling.has_loop(program.case.commit, program.case.cache):
            yield functools.partial(time_torch, program, torch_sampling, model)

    calls = [call for program in programs for call in loops(program)] * repeats
    with metrics.Progress(len(calls), unit="call", show=(), every=2) as progress:
        progress.update(0)
        for done, call in enumerate(calls, 1):
            call()
            progress.update(done)


def result_of(program: Program, plain: Program | None, config) -> dict[str, Any]:
    """The numbers of a case, for the table and the JSON file.

    plain: the same case without a cache, if it was timed.
    """
    case, ours, theirs = program.case, program.ours, program.theirs
    per_position = models.family_of(config).flops_per_token(config, case.length)

    def flops(of: Program):
        return None if of.positions is None else of.positions / case.gen_length * per_position

    out = dataclasses.asdict(case) | rates(ours, case) | {
        "passes_per_token": ours.passes / case.gen_length,
        "planned_bytes": planned_bytes(program.compiled),
        "flops_per_token": flops(program),
        "speedup": None,
        "flops_speedup": None,
        "torch": None,
    }  # fmt: skip
    if plain:
        out["speedup"] = ratio(plain.ours, ours)
        if program.positions:
            out["flops_speedup"] = plain.positions / program.positions
    if theirs.seconds:
        new = slice(case.prompt_length, None)
        same = float((theirs.tokens[:, new] == ours.tokens[:, new]).mean())
        out["torch"] = rates(theirs, case) | {"same_tokens": same, "ratio": ratio(theirs, ours)}
    return out


def rates(times: Times, case: Case) -> dict[str, Any]:
    """Medians of a sampler's turns, and all of them."""
    seconds = statistics.median(times.seconds)
    return {
        "tokens_per_second": case.batch * case.gen_length / seconds,
        "seconds": seconds,
        "seconds_all": times.seconds,
        "processor_seconds": statistics.median(times.processor),
        "first_block_seconds": statistics.median(times.first_block),
        "first_block_seconds_all": times.first_block,
        "passes": times.passes,
    }


def ratio(slow: Times, fast: Times) -> dict[str, float]:
    """How many times as fast `fast` is: by the medians, and the lowest and highest of a turn.

    "processor" is the ratio of the median processor seconds, which hardly depends on what else a
    machine does. It has a meaning on a CPU only.
    """
    turns = [a / b for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    medians, processor = (
        statistics.median(getattr(slow, name)) / statistics.median(getattr(fast, name))
        for name in ("seconds", "processor")
    )
    return {"median": medians, "low": min(turns), "high": max(turns), "processor": processor}


# "MiB" is what the compiler planned. A ratio is that of the medians, with the lowest and highest
# turn, and on a CPU that of the processor seconds. "by FLOPs" is the ratio to no cache that the
# FLOPs of the published loops give, and "reached" how much of it was measured.
_COLUMNS = (
    "prompt", "length", "batch", "rule", "cache", "tokens/s", "passes/token", "first block s",
    "MiB", "GFLOP/token", "x none", "by FLOPs", "reached", "PyTorch tokens/s", "x PyTorch",
    "same tokens",
)  # fmt: skip


def table(results: list[dict]) -> str:
    """The table that the command prints."""

    def spread(ratio: dict | None) -> str:
        shown = "{median:.2f} ({low:.2f}-{high:.2f})"
        if jax.default_backend() == "cpu":
            shown += " {processor:.2f}"
        return shown.format(**ratio) if ratio else ""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [_COLUMNS]
    for r in results:
        theirs = r["torch"] or {}
        flops, ideal = r["flops_per_token"], r["flops_speedup"]
        lines.append(
            (
                *(str(r[k]) for k in ("prompt_length", "gen_length", "batch", "commit", "cache")),
                number(r["tokens_per_second"], ".4g"),
                number(r["passes_per_token"], ".2f"),
                number(r["first_block_seconds"], ".3g"),
                number(r["planned_bytes"] / 2**20, ".3g"),
                number(flops and flops / 1e9, ".3g"),
                spread(r["speedup"]),
                number(ideal, ".2f"),
                number(ideal and r["speedup"]["median"] / ideal, ".0%"),
                number(theirs.get("tokens_per_second"), ".4g"),
                spread(theirs.get("ratio")),
                number(theirs.get("same_tokens"), ".0%"),
            )
        )
    lines = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in lines]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in zip(*lines, strict=True)
    )


def run(args: argparse.Namespace, torch_sampling) -> dict:
    """Times all cases, prints the table and returns the results for the JSON file.

    torch_sampling: the module of PyTorch's loops, or None. Raises ValueError for settings or
    devices that do not allow what is asked for.
    """
    device = jax.devices()[0]
    if torch_sampling and (device.platform != "cpu" or args.dtype != "float32"):
        raise ValueError(
            f"--torch compares in float32 on a CPU, not in {args.dtype} on {device.device_kind}: "
            "set --dtype=float32 and JAX_PLATFORMS=cpu"
        )
    config = SIZES.get(args.model) or loading.read_config(args.model)
    cases = cases_of(args, config)
    logits_fn, params = open_model(args.model, args.dtype, args.seed)
    count = sum(models.family_of(config).num_params(config).values())
    print(
        f"{args.model}: {count / 1e6:.4g} M parameters, {args.dtype}, {device.device_kind};"
        f" cases: {len(cases)}, turns: {args.repeats}",
        flush=True,
    )
    programs = compile_cases(cases, args, logits_fn, config)
    time_turns(programs, args.repeats, logits_fn, torch_sampling, (config, params))
    plain = {dataclasses.replace(p.case, cache=""): p for p in programs if p.case.cache == "none"}
    results = [
        result_of(p, plain.get(dataclasses.replace(p.case, cache="")), config) for p in programs
    ]
    print(table(results))
    return {
        "model": args.model,
        "parameters": count,
        "dtype": args.dtype,
        "device": device.device_kind,
        "jax": jax.__version__,
        **({} if torch_sampling is None else torch_sampling.describe()),
        "block_length": args.block_length,
        "repeats": args.repeats,
        "cases": results,
    }
