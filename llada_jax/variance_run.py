"""The command of the laboratory: measures estimators on two models and preference pairs, batch by batch.

Every batch and estimator leaves a file, so that the same command goes on where it was stopped.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn

from llada_jax import checkpoint, convert, data, distributed, metrics, noise, steps, tokenizer, variance
from llada_jax import mesh as mesh_lib
from llada_jax import variance_report as report
from llada_jax.model import REMAT, LLaDA, flops_per_token
from llada_jax.parallel import Parallel
from llada_jax.variance import EVERYTHING, NESTED_EPOCH, TRUTH_EPOCH, Estimator, Moments, Problem

UP_PROJ = "blocks/up_proj/kernel[0]"  # what the paper measured
# The six columns of Table 2, base first.
TABLE_2 = tuple(
    Estimator(noise.Scheme(n_t, n_yt), shared, f"{n_t} x {n_yt}{'' if shared else ', not shared'}")
    for n_t, n_yt, shared in (
        (4, 1, True), (1, 1, True), (8, 1, True), (1, 4, True), (2, 2, True), (4, 1, False),
    )  # fmt: skip
)
OURS = (
    "n_t=4,times=stratified",
    "n_t=4,times=stratified,masks=cyclic",
    "n_t=4,times=antithetic,masks=coupled",
    "n_t=4,times=importance",
    "n_t=4,times=importance,masks=cyclic",
    "n_t=4,times=importance,masks=cyclic,share_in_pair=masks",
    "n_t=4,times=stratified,weights=leave_one_out,pseudo_count=1",
    "n_t=4,times=importance,weights=leave_one_out,pseudo_count=1",
    "n_t=4,times=stratified,masks=cyclic,weights=balanced,pseudo_count=0.2",
    "n_t=4,times=importance,masks=cyclic,weights=balanced,pseudo_count=1",
    "n_t=4,times=stratified,weights=self_normalised",
    "n_t=8,times=importance,masks=cyclic",
)


def parse_scheme(text: str) -> Estimator:
    """ "n_t=4,times=stratified,share_noise=no" to an Estimator of that name; ValueError for what no Scheme has."""
    types = {field.name: type(field.default) for field in dataclasses.fields(noise.Scheme)}
    values, shared = {}, True
    for item in filter(None, text.split(",")):
        name, equals, value = (part.strip() for part in item.partition("="))
        if name == "share_noise" and value in ("yes", "no"):
            shared = value == "yes"
            continue
        try:
            values[name] = types[name](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"--schemes: {item!r} in {text!r} sets nothing: NAME=VALUE of share_noise=yes|no, {', '.join(types)}"
            ) from None
    return Estimator(noise.Scheme(**values), shared, text)


class Run:
    """What is measured, compiled once an estimator; results are files under `out`."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.out = epath.Path(args.out).expanduser()
        for module in args.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ValueError(f"--import={module}: {error}; it must be importable from here") from error
        own = args.schemes if args.schemes else OURS
        self.estimators = (*(() if args.only_schemes else TABLE_2), *map(parse_scheme, own))
        if args.repeats < 2 or args.truth < 2 or args.truth % 2:
            raise ValueError(f"--repeats={args.repeats}, --truth={args.truth}: at least 2 each, and --truth even")
        if args.nested_t < 3 or args.nested_yt < 2:
            raise ValueError(f"--nested_t={args.nested_t}, --nested_yt={args.nested_yt}: at least 3 and 2")
        if args.mc_chunk < 0:
            raise ValueError(f"--mc_chunk={args.mc_chunk}: at least 0, which takes all draws at a time")
        if not args.no_plots and importlib.util.find_spec("matplotlib") is None:
            raise ImportError("plots need matplotlib: pip install 'llada_jax[plot]', or --no_plots")
        self.mesh = mesh_lib.make_mesh(-1, args.fsdp, args.tensor)
        shards = mesh_lib.row_shards(self.mesh)
        if args.batch_rows < 1 or args.batch_rows % shards:
            raise ValueError(f"--batch_rows={args.batch_rows} is no multiple of the {shards} shards of rows")
        parts = (EVERYTHING, *args.part) if not args.no_gradient else ()
        self.model, self.rows = self._open(parts)
        segments = self.rows.num_segments
        self.count = -(-len(self.rows) // args.batch_rows)
        self.problem = Problem(
            functools.partial(_model_terms, model=self.model, num_segments=segments, chunk=args.mc_chunk),
            segments, args.beta, args.seed, parts, not args.no_gradient, self.rows.stats.samples == self.count,
        )  # fmt: skip

    def _open(self, parts: tuple[str, ...]) -> tuple[LLaDA, data.Rows]:
        args = self.args
        configs = [convert.read_config(path) for path in (args.policy, args.reference)]
        if configs[0] != configs[1]:
            raise ValueError(f"--policy={args.policy} and --reference={args.reference} are different architectures")
        boxed = jax.eval_shape(LLaDA(configs[0]).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
        if parts:  # a --part that is not there shows before a weight is read
            jax.eval_shape(lambda params: variance.squared_norms(params, parts), nn.unbox(boxed))
        words = tokenizer.load(convert.model_folder(args.policy))
        rows = distributed.once_per_disk(
            self.out / "data",
            lambda: data.prepare(
                args.pairs, "preference", words, row_length=args.row_length or configs[0].max_sequence_length,
                cache_dir=self.out / "data", template=args.template, append_eos=not args.no_eos, too_long="truncate",
                bad_records="skip", limit=args.pairs_limit,
            ),
        )  # fmt: skip
        shardings = mesh_lib.shardings(self.mesh, boxed)
        model, self.params = convert.load(args.policy, args.dtype, shardings)
        self.reference = convert.load(args.reference, args.dtype, shardings)[1]
        # A path says little: a workdir is its newest checkpoint. All hosts take part, so here and not in `identity`.
        self.weights = {
            f"weights of the {name}": checkpoint.fingerprint(params)
            for name, params in (("policy", self.params), ("reference", self.reference))
        }
        return model.clone(remat=args.remat), rows

    def identity(self) -> dict:
        """All that a result depends on."""
        names = ("policy", "reference", "beta", "seed", "repeats", "truth", "nested_t", "nested_yt", "part", "dtype")
        kept = {name: getattr(self.args, name) for name in (*names, "no_gradient", "batch_rows")}
        return kept | self.weights | {"rows": self.rows.fingerprint, "noise": noise.FORMAT}

    def batches(self) -> Iterator:
        """Global batches of the rows, each once, in order, whatever share of them each host loads."""
        hosts = Parallel("mesh", self.mesh)
        index, count = hosts.shard
        loader = data.loader(
            self.rows, batch_rows=self.args.batch_rows, seed=0, shuffle=False, epochs=1, pad=True,
            shard_index=index, shard_count=count,
        )  # fmt: skip
        # Padding has row ids below 0; it goes last.
        in_order = jax.jit(
            lambda batch: jax.tree.map(lambda x: x[jnp.argsort(batch.row_ids.astype(jnp.uint32))], batch),
            out_shardings=mesh_lib.rows(self.mesh),
        )
        return (in_order(hosts.put(batch)) for batch in loader)

    def measure(self) -> list[dict]:
        """Computes what is not on disk yet; returns the results of every batch, by estimator name."""
        args, problem = self.args, self.problem
        everywhere = mesh_lib.replicated(self.mesh)
        like = jax.tree.map(lambda x: x.sharding, self.params) if problem.gradient else None
        moments = (Moments(like, everywhere, everywhere),) * (1 + problem.one_pair) if problem.gradient else None
        jit = functools.partial(jax.jit, static_argnames="estimator")
        gradients = (like,) * (1 + problem.one_pair) if problem.gradient else None
        self._estimate = jit(problem.estimate, out_shardings=(gradients, everywhere))
        self._repeat = jit(problem.repeat, out_shardings=(everywhere, moments, everywhere), donate_argnums=4)
        self._nested = jax.jit(
            problem.nested, static_argnames="n_yt", out_shardings=(everywhere, everywhere, moments, everywhere)
        )
        self._zero = jax.jit(problem.zero, out_shardings=moments)
        self._norms = jax.jit(lambda tree: variance.squared_norms(tree, problem.parts))
        found = [{} for _ in range(self.count)]
        done, each = 0, args.repeats
        with metrics.Progress(self.count * each * len(self.estimators), unit="repeat", show=()) as progress:
            for number, (results, batch) in enumerate(zip(found, self.batches(), strict=True)):
                path = self.out / f"batch{number:05d}"
                truth = None
                results["truth"] = self._saved(path / "truth.npz")
                for estimator in (None, *self.estimators):  # None: the nested draws
                    file = path / f"{_slug(estimator.name if estimator else 'nested')}.npz"
                    key = estimator.name if estimator else "nested"
                    results[key] = self._saved(file)
                    if results[key] is None:
                        if truth is None:
                            truth = self._truth(batch)
                            results["truth"] = self._save(path / "truth.npz", truth[0])
                        compute = functools.partial(self._column, estimator) if estimator else self._nested_draws
                        results[key] = self._save(file, compute(batch, truth))
                    done += each if estimator else 0
                    progress.update(done)
        return found

    def _truth(self, batch) -> tuple[dict, Any]:
        """The high-budget estimate and its gradient: the mean of two halves, whose difference says how good it is."""
        half = Estimator(noise.Scheme(self.args.truth // 2, times="stratified"))
        halves = [
            self._estimate(self.params, self.reference, batch, jnp.int32(TRUTH_EPOCH + k), estimator=half)
            for k in range(2)
        ]
        values = {"elbos": np.stack([np.asarray(elbos) for _, elbos in halves]), "is_pair": self._pairs(batch)}
        if not self.problem.gradient:
            return values, None
        (first, _), (second, _) = halves
        means = jax.tree.map(lambda a, b: (a.astype(jnp.float32) + b) / 2, first, second)
        error = jax.tree.map(lambda a, m: a.astype(jnp.float32) - m, first[0], means[0])
        # |(A - B) / 2|^2 estimates the variance of (A + B) / 2.
        values["variance"] = np.asarray(self._norms(error))
        if self.problem.one_pair:
            values["score norm"] = np.asarray(self._norms(means[1]))
        return values, means[0]

    def _column(self, estimator: Estimator, batch, truth) -> dict:
        """All repeats of one estimator on one batch."""
        moments = self._zero(self.params)
        elbos, norms = [], []
        for repeat in range(self.args.repeats):
            found, moments, norm = self._repeat(
                self.params, self.reference, batch, jnp.int32(repeat), moments, truth[1], estimator=estimator
            )
            elbos.append(np.asarray(found))
            norms.append(norm)
        values = {"elbos": np.stack(elbos)}
        if moments is None:
            return values
        mean_error = jax.tree.map(lambda a, t: a / moments[0].count - t, moments[0].total, truth[1])
        values |= {name: np.stack([np.asarray(norm[name]) for norm in norms]) for name in norms[0]}
        values["mean_error"] = np.asarray(self._norms(mean_error))
        for name, of in zip(("trace", "score trace"), moments, strict=False):  # the second for one pair alone
            values[name] = np.asarray(of.trace(self.problem.parts))
        return values

    def _nested_draws(self, batch, truth) -> dict:
        """nested_t times, nested_yt samples at each, of the terms and of the gradient made linear at the truth."""
        elbos = truth[0]["elbos"].mean(0)
        ratio = elbos[0] - elbos[1]
        scores = jnp.asarray(self.args.beta * (ratio[:, 0::2] - ratio[:, 1::2]))
        n_t, n_yt = self.args.nested_t, self.args.nested_yt
        terms, shares, squares, of_times = [], [], [], []
        whole = self._zero(self.params)
        for time in range(n_t):
            found, share, moments, square = self._nested(
                self.params, self.reference, batch, jnp.int32(NESTED_EPOCH + time), scores, n_yt=n_yt
            )
            terms.append(np.asarray(found))
            shares.append(np.asarray(share))
            if moments is not None:
                squares.append(np.asarray(square))
                of_times.append(self._totals(moments))
                whole = jax.tree.map(jnp.add, whole, moments)
        values = {"terms": np.moveaxis(np.stack(terms), 1, 2), "shares": np.stack(shares), "elbos": elbos}
        if whole is None:
            return values
        squares = np.stack(squares)
        v_t, v_yt = variance.decompose_norms(squares, np.stack(of_times), self._totals(whole))
        values |= {"v_t": v_t, "v_yt": v_yt}
        return values | ({"squares": squares} if self.problem.one_pair else {})

    def _totals(self, moments: tuple[Moments, ...]) -> np.ndarray:
        return np.stack([np.asarray(self._norms(m.total)) for m in moments])

    def _pairs(self, batch) -> np.ndarray:
        everywhere = mesh_lib.replicated(self.mesh)
        return np.asarray(jax.jit(self.problem.is_pair, out_shardings=everywhere)(batch))

    def _saved(self, path: epath.Path) -> dict | None:
        if not path.exists():
            return None
        with path.open("rb") as f:
            return dict(np.load(f))

    def _save(self, path: epath.Path, values: dict) -> dict:
        if distributed.is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            with partial.open("wb") as f:
                np.savez(f, **values)
            partial.replace(path)
        return values


def _model_terms(params, batch, drawn, *, model: LLaDA, num_segments: int, chunk: int):
    n = drawn.masked.shape[0]
    chunk = max(size for size in range(1, min(chunk or n, n) + 1) if n % size == 0)
    return steps.model_terms(model, params, batch, drawn, num_segments=num_segments, chunk=chunk)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "=._-" else "_" for c in name)


def _check_identity(run: Run):
    """A folder holds results of one measurement only."""
    path, mine = run.out / "settings.json", run.identity()
    if path.exists():
        there = json.loads(path.read_text())
        if changed := [k for k, v in mine.items() if there.get(k) != v]:
            raise ValueError(
                f"{run.out} holds results with other {', '.join(f'{k}={there.get(k)!r}' for k in changed)}: "
                "give another --out"
            )
    elif distributed.is_first():
        run.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine, indent=1) + "\n")


def run(args: argparse.Namespace) -> str:
    """Does what the flags say; returns the table."""
    this = Run(args)
    distributed.check_shared(this.out)
    _check_identity(this)
    with mesh_lib.use(this.mesh):
        found = this.measure()
    if not distributed.is_first():
        return ""
    # Positions of a row that one pair takes, for the cost of a model call.
    tokens = this.rows.stats.tokens / this.rows.stats.samples
    flops = flops_per_token(this.model.config, this.rows.row_length) * tokens
    table = report.tabulate(found, this.estimators, parts=this.problem.parts, beta=args.beta, flops=flops)
    table["settings"] = this.identity() | {"pairs": this.rows.stats.samples, "tokens a pair": tokens}
    report.write(table, this.out, plots=not args.no_plots)
    return report.as_text(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llada_jax.variance",
        description="Variance, bias and cost of ELBO estimators: Table 2 of LLaDA 1.5, then ours or yours.",
    )
    parser.add_argument("--policy", required=True, help="Hugging Face style folder, workdir, or workdir/checkpoints/N")
    parser.add_argument("--reference", required=True, help="the same for the reference policy")
    parser.add_argument("--pairs", required=True, help="preference records: jsonl:FILES, tfds:NAME or python:...")
    parser.add_argument("--out", default="runs/variance", help="folder of results; the same one continues")
    parser.add_argument("--pairs_limit", type=int, default=128, help="records to read; 0 for all")
    parser.add_argument("--repeats", type=int, default=8, help="independent estimates of each pair")
    parser.add_argument("--truth", type=int, default=64, help="draws of the high-budget estimate")
    parser.add_argument("--nested_t", type=int, default=16, help="times of the nested draws for V_t and V_yt")
    parser.add_argument("--nested_yt", type=int, default=4, help="samples at each of them")
    parser.add_argument(
        "--schemes", action="append", metavar="NAME=VALUE,...", help="an estimator beside Table 2, instead of ours"
    )
    parser.add_argument(
        "--import", action="append", default=[], dest="modules", metavar="MODULE", help="it adds schemes to `noise`"
    )
    parser.add_argument("--only_schemes", action="store_true", help="leave the columns of Table 2 out")
    parser.add_argument("--part", action="append", help=f"a parameter to report by itself; default: {UP_PROJ}")
    parser.add_argument("--no_gradient", action="store_true", help="scores and losses alone")
    parser.add_argument("--no_plots", action="store_true", help="do without matplotlib")
    parser.add_argument("--beta", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--template", choices=("chat", "plain"), default="chat")
    parser.add_argument("--no_eos", action="store_true", help="responses do not end with EOS")
    parser.add_argument("--row_length", type=int, default=0, help="0: the model's longest")
    parser.add_argument("--batch_rows", type=int, default=16, help="rows of all devices at once")
    parser.add_argument("--mc_chunk", type=int, default=8, help="at most so many draws at a time; 0: all")
    parser.add_argument("--remat", choices=tuple(REMAT), default="none", help="what a layer keeps for its gradient")
    parser.add_argument("--dtype", help="cast the parameters to it, as bfloat16; default: as stored")
    parser.add_argument("--fsdp", type=int, default=1, help="mesh axis; the devices left share the rows")
    parser.add_argument("--tensor", type=int, default=1, help="mesh axis")
    args = parser.parse_args(argv)
    args.part = args.part or [UP_PROJ]
    try:
        distributed.initialize()
        distributed.say(run(args))
    except (ValueError, OSError, ImportError) as error:
        distributed.fail(f"error: {' '.join(str(error).split())}")
