"""The cost of the passes of a compiled sampler, and the tokens a second that they allow."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

from llada_jax import models, sampling
from llada_jax.chips import Chip
from llada_jax.compile.hlo import Program
from llada_jax.compile.sample import Sampler, abstract_params
from llada_jax.parallel import mesh as mesh_lib

GIB = 2**30

# Tokens that a row commits in a pass, of LLaDA 8B on GSM8K with a chain of thought, as d3LLM
# (arXiv:2601.07568) measured it. dParallel and d3LLM are trained for it.
PUBLISHED = {"one at a time": 1.0, "Fast-dLLM": 2.8, "dParallel": 5.1, "d3LLM": 9.1}


@dataclasses.dataclass(frozen=True)
class Pass:
    """One kind of pass: what it computes, and the seconds that the chip's peak rates allow."""

    positions: int  # of each row
    flops: int  # of all chips, by formula
    hbm_bytes: int  # read and written by a chip
    seconds: Mapping[str, float]  # compute, memory, interconnect

    @property
    def binds(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def least(self) -> float:
        """The seconds of the pass if all else is hidden behind what binds."""
        return self.seconds[self.binds]


def passes_of(sampler: Sampler, program: Program, chip: Chip) -> dict[int, Pass]:
    """Returns the passes of a compiled sampler by their positions, the full pass first.

    A pass is a computation that contains the loop over layers. Raises ValueError if one is missing.
    """
    config, windows = sampler.model.config, sampler.windows
    rows = sampler.rows // mesh_lib.row_shards(sampler.mesh)
    sizes = [sampler.length, *(windows.sizes if windows else ())]
    found = {}
    for name in program.times:
        for loop in program.computations[name].values():
            if loop.opcode != "while" or program.trip_count(loop) != config.n_layers:
                continue
            carried = {s.dims for s in loop.shapes}
            for size in sizes:
                if (rows, size + sampler.shadow, config.d_model) in carried:
                    found[size] = _cost(sampler, size, program.part(name), chip)
    missing = set(sizes) - found.keys()
    if missing:
        raise ValueError(f"no loop over layers of {sorted(missing)} positions is in the program")
    return {size: found[size] for size in dict.fromkeys(sizes)}


def _cost(sampler: Sampler, positions: int, part: Program, chip: Chip) -> Pass:
    chips = sampler.mesh.devices.size
    flops, traffic = pass_flops(sampler, positions), part.hbm_bytes()
    sent = sum(sent for _, sent in part.collective_bytes().values())
    seconds = {
        "compute": flops / chips / chip.bf16_flops,
        "memory": traffic / chip.hbm_bandwidth,
        "interconnect": sent / chip.ici_bandwidth,
    }
    return Pass(positions, flops, traffic, seconds)


def pass_flops(sampler: Sampler, positions: int) -> int:
    """FLOPs of a pass over so many positions of each row, by formula.

    Queries attend to all positions of the row. Logits are those of a block, unless masks outside
    of it compete.
    """
    s, config = sampler.settings, sampler.model.config
    block_only = s.infill == "all" and s.growth is None
    wanted = min(s.block_length if block_only else positions, positions) + sampler.shadow
    fed = positions + sampler.shadow
    head = 2 * config.d_model * config.embedding_size
    each = models.family_of(config).flops_per_token(config, sampler.length + sampler.shadow) - head
    return sampler.rows * (fed * each + wanted * head)


def weight_bytes(sampler: Sampler) -> int:
    """Bytes of the weights that a chip reads in each pass: all that it holds but the embedding."""
    params = dict(abstract_params(sampler))
    if not sampler.model.config.weight_tying:
        del params["wte"]
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(params)
    )


def tokens_per_second(
    sampler: Sampler, seconds: Mapping[int, float], per_pass: float | int
) -> float:
    """Tokens a second of all rows, if each pass commits `per_pass` tokens of every row.

    seconds: of a pass, by its positions. Rows of a batch wait for each other, so their mean number
    of tokens a pass is lower than that of a row alone.
    """
    s, windows = sampler.settings, sampler.windows
    passes = s.block_length / per_pass  # of a block
    if windows is None:
        sizes, full = [sampler.length] * (s.gen_length // s.block_length), passes
    else:
        sizes = np.asarray(windows.sizes)[windows.size_of].tolist()
        full = sampling.CACHES[s.cache].full_passes
        full = min(passes, max(full, passes / s.refresh) if s.refresh else full)
    whole = seconds[sampler.length]
    total = sum(full * whole + (passes - full) * seconds[size] for size in sizes)
    return sampler.batch_size * s.gen_length / total


def report(
    sampler: Sampler, name: str, chip: Chip, compiled, seconds: float, per_pass: list[float] | None
) -> dict:
    """Returns what the compiled sampler needs, and what its passes cost at peak rates.

    Sizes are in bytes and times in seconds, for one chip; FLOPs and tokens are those of all chips.
    per_pass: tokens that a row commits in a pass; None for those of PUBLISHED.
    """
    s, memory, shape = sampler.settings, compiled.memory_analysis(), sampler.cache_shape()
    program = Program(compiled.as_text())
    passes = passes_of(sampler, program, chip)
    least = {size: one.least for size, one in passes.items()}
    rates = {f"{k:g}": float(k) for k in per_pass} if per_pass else dict(PUBLISHED)
    if sampling.COMMITS[s.commit].scheduled:
        rates = {"the schedule": s.gen_length / s.steps}
    weights = weight_bytes(sampler)
    cache = 2 * math.prod(shape) * sampler.model.dtype.itemsize if shape else 0
    total = memory.peak_memory_in_bytes
    return {
        "topology": name,
        "chip": chip.name,
        "chips": sampler.mesh.devices.size,
        "mesh": dict(sampler.mesh.shape),
        "batch_size": sampler.batch_size,
        "prompt_length": sampler.prompt_length,
        "gen_length": s.gen_length,
        "block_length": s.block_length,
        "commit": s.commit,
        "cache": s.cache,
        "weights": sampler.quantize or str(sampler.model.dtype),
        "compile_seconds": seconds,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "cache": cache,
            "temporaries": total - memory.argument_size_in_bytes - cache,
            "total": total,
            "share": total / chip.hbm_bytes,
        },
        "cache_copies": len(program.writers(shape)) if shape else 0,
        "weight_bytes": weights,
        "weight_seconds": weights / chip.hbm_bandwidth,
        "passes": [
            {
                "positions": one.positions,
                "flops": one.flops,
                "hbm_bytes": one.hbm_bytes,
                "implied_seconds": dict(one.seconds),
                "binds": one.binds,
            }
            for one in passes.values()
        ],
        "tokens_per_second": {
            word: {"per_pass": k, "rate": tokens_per_second(sampler, least, k)}
            for word, k in rates.items()
        },
    }


def as_text(found: dict) -> str:
    """Formats a report for a terminal."""
    memory = found["memory"]
    mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    passes = []
    for k, one in enumerate(found["passes"]):
        times = ", ".join(f"{k} {1e3 * x:.1f} ms" for k, x in one["implied_seconds"].items())
        passes.append(
            f"{'window pass' if k else 'full pass':<15} {one['positions']} positions a row: "
            f"{one['flops']:.3g} FLOPs, {one['hbm_bytes'] / GIB:.2f} GiB read and written; "
            f"at peak rates {times}; {one['binds']} binds"
        )
    rates = ", ".join(
        f"{one['rate']:,.0f} at {one['per_pass']:g} a pass"
        + ("" if word == f"{one['per_pass']:g}" else f" ({word})")
        for word, one in found["tokens_per_second"].items()
    )
    copies = f"{found['cache_copies']} whole copies in the loops"
    return "\n".join(
        [
            f"chips           {found['chips']} x {found['chip']} ({found['topology']}), {mesh}",
            f"work            {found['batch_size']} rows: prompts of {found['prompt_length']}, "
            f"responses of {found['gen_length']} in blocks of {found['block_length']}; "
            f"commit {found['commit']}, cache {found['cache']}, {found['weights']} weights",
            f"compile         {found['compile_seconds']:.0f} s",
            f"memory a chip   {memory['total'] / GIB:.2f} GiB, {memory['share']:.0%} of its HBM: "
            f"arguments {memory['arguments'] / GIB:.2f}, cache {memory['cache'] / GIB:.2f}, "
            f"temporaries {memory['temporaries'] / GIB:.2f}",
            *([f"cache           {copies}"] if memory["cache"] else []),
            f"weights         {found['weight_bytes'] / GIB:.2f} GiB a pass, "
            f"{1e3 * found['weight_seconds']:.1f} ms alone",
            *passes,
            f"tokens/s        at most, all rows: {rates}",
        ]
    )
