"""Measures estimators on two models and preference pairs: what `python -m llada_jax.variance` runs.

It saves one file for each batch and estimator, so the same command continues where it stopped.
"""

import argparse
import functools
import importlib.util
import io
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn

from llada_jax import metrics, models, noise, tokenizer
from llada_jax.checkpoints import hashing, loading
from llada_jax.data import batches as batches_lib
from llada_jax.data import rows as rows_lib
from llada_jax.data.packing import Packing
from llada_jax.data.rows import Rows
from llada_jax.files import write_whole
from llada_jax.objectives import terms as terms_lib
from llada_jax.parallel import agree, mesh
from llada_jax.parallel import hosts as hosts_lib
from llada_jax.parallel.split import Parallel
from llada_jax.variance import decomposition, tables
from llada_jax.variance import gradients as gradients_lib
from llada_jax.variance.columns import OURS, TABLE_2, parse_scheme
from llada_jax.variance.gradients import EVERYTHING, Moments
from llada_jax.variance.problem import NESTED_EPOCH, TRUTH_EPOCH, Estimator, Problem


class Run:
    """One measurement: models, rows and estimators. Its results are files under `out`.

    Raises ValueError or ImportError if the flags are invalid, before it reads any weights.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.out = epath.Path(args.out).expanduser()
        for module in args.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise ValueError(
                    f"--import={module}: {error}; it must be importable from here"
                ) from error
        own = args.schemes if args.schemes else OURS
        self.estimators = (*(() if args.only_schemes else TABLE_2), *map(parse_scheme, own))
        if args.repeats < 2 or args.truth < 2 or args.truth % 2:
            raise ValueError(
                f"--repeats={args.repeats}, --truth={args.truth}: at least 2 each, and --truth even"
            )
        if args.nested_t < 3 or args.nested_yt < 2:
            raise ValueError(
                f"--nested_t={args.nested_t}, --nested_yt={args.nested_yt}: at least 3 and 2"
            )
        if args.mc_chunk < 0:
            raise ValueError(
                f"--mc_chunk={args.mc_chunk}: at least 0, which takes all draws at a time"
            )
        if not args.no_plots and importlib.util.find_spec("matplotlib") is None:
            raise ImportError("plots need matplotlib: pip install 'llada_jax[plot]', or --no_plots")
        self.mesh = mesh.make_mesh(-1, args.fsdp, args.tensor)
        shards = mesh.row_shards(self.mesh)
        if args.batch_rows < 1 or args.batch_rows % shards:
            raise ValueError(
                f"--batch_rows={args.batch_rows} is no multiple of the {shards} shards of rows"
            )
        parts = (EVERYTHING, *args.part) if not args.no_gradient else ()
        self.model, self.rows = self._open(parts)
        self.count = -(-len(self.rows) // args.batch_rows)
        self.problem = Problem(
            functools.partial(_model_terms, model=self.model, chunk=args.mc_chunk),
            args.beta,
            args.seed,
            parts,
            gradient=not args.no_gradient,
            one_pair=self.rows.stats.samples == self.count,
        )

    def _open(self, parts: tuple[str, ...]) -> tuple[nn.Module, Rows]:
        args = self.args
        configs = [loading.read_config(path) for path in (args.policy, args.reference)]
        if configs[0] != configs[1]:
            raise ValueError(
                f"--policy={args.policy} and --reference={args.reference} "
                "are different architectures"
            )
        boxed = models.boxed_shapes(configs[0])
        if parts:  # raises an error for an unknown --part before any weights are read
            jax.eval_shape(
                lambda params: gradients_lib.squared_norms(params, parts), nn.unbox(boxed)
            )
        words = tokenizer.load(loading.model_folder(args.policy))
        packing = Packing(
            row_length=args.row_length or configs[0].max_sequence_length,
            template=args.template,
            append_eos=not args.no_eos,
            too_long="truncate",
            bad_records="skip",
            limit=args.pairs_limit,
        )
        cache_dir = self.out / "data"
        rows = agree.once_per_disk(
            cache_dir, lambda: rows_lib.prepare(args.pairs, words, packing, cache_dir=cache_dir)
        )
        shardings = mesh.shardings(self.mesh, boxed)
        model, self.params = loading.load(args.policy, args.dtype, shardings)
        self.reference = loading.load(args.reference, args.dtype, shardings)[1]
        # The path of a model does not identify it: a workdir means its newest checkpoint. All hosts
        # must compute the fingerprints together, so they are computed here, not in `identity`.
        self.weights = {
            f"weights of the {name}": hashing.fingerprint(params)
            for name, params in (("policy", self.params), ("reference", self.reference))
        }
        return model.clone(remat=args.remat), rows

    def identity(self) -> dict:
        """Returns all settings and inputs that a result depends on."""
        names = (
            "policy",
            "reference",
            "beta",
            "seed",
            "repeats",
            "truth",
            "nested_t",
            "nested_yt",
            "part",
            "dtype",
        )
        kept = {name: getattr(self.args, name) for name in (*names, "no_gradient", "batch_rows")}
        return kept | self.weights | {"rows": self.rows.fingerprint, "noise": noise.FORMAT}

    def batches(self) -> Iterator:
        """Yields each global batch once, with its rows in order, for any number of hosts."""
        hosts = Parallel("mesh", self.mesh)
        index, count = hosts.shard
        loader = batches_lib.loader(
            self.rows, batch_rows=self.args.batch_rows, seed=0, shuffle=False, epochs=1, pad=True,
            shard_index=index, shard_count=count,
        )  # fmt: skip
        # Padding has row id -1. As uint32 this is the largest number, so padding comes last.
        in_order = jax.jit(
            lambda batch: jax.tree.map(
                lambda x: x[jnp.argsort(batch.row_ids.astype(jnp.uint32))], batch
            ),
            out_shardings=mesh.rows(self.mesh),
        )
        return (in_order(hosts.put(batch)) for batch in loader)

    def measure(self) -> list[dict]:
        """Computes the results that are not yet on disk; returns a dict by estimator per batch."""
        args, problem = self.args, self.problem
        everywhere = mesh.replicated(self.mesh)
        like = jax.tree.map(lambda x: x.sharding, self.params) if problem.gradient else None
        moments = (
            (Moments(like, everywhere, everywhere),) * (1 + problem.one_pair)
            if problem.gradient
            else None
        )
        jit = functools.partial(jax.jit, static_argnames="estimator")
        gradients = (like,) * (1 + problem.one_pair) if problem.gradient else None
        self._estimate = jit(problem.estimate, out_shardings=(gradients, everywhere))
        self._repeat = jit(
            problem.repeat, out_shardings=(everywhere, moments, everywhere), donate_argnums=4
        )
        self._nested = jax.jit(
            problem.nested,
            static_argnames="n_yt",
            out_shardings=(everywhere, everywhere, moments, everywhere),
        )
        self._zero = jax.jit(problem.zero, out_shardings=moments)
        self._norms = jax.jit(lambda tree: gradients_lib.squared_norms(tree, problem.parts))
        found = [{} for _ in range(self.count)]
        done, each = 0, args.repeats
        with metrics.Progress(
            self.count * each * len(self.estimators), unit="repeat", show=()
        ) as progress:
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
                        compute = (
                            functools.partial(self._column, estimator)
                            if estimator
                            else self._nested_draws
                        )
                        results[key] = self._save(file, compute(batch, truth))
                    done += each if estimator else 0
                    progress.update(done)
        return found

    def _truth(self, batch) -> tuple[dict, Any]:
        """Computes the high-budget estimate and its gradient.

        Each is the mean of two halves. The difference of the halves gives its error.
        """
        half = Estimator(noise.Scheme(self.args.truth // 2, times="stratified"))
        halves = [
            self._estimate(
                self.params, self.reference, batch, jnp.int32(TRUTH_EPOCH + k), estimator=half
            )
            for k in range(2)
        ]
        values = {
            "elbos": np.stack([np.asarray(elbos) for _, elbos in halves]),
            "is_pair": self._pairs(batch),
        }
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
        """Computes all repeats of one estimator on one batch."""
        moments = self._zero(self.params)
        elbos, norms = [], []
        for repeat in range(self.args.repeats):
            found, moments, norm = self._repeat(
                self.params,
                self.reference,
                batch,
                jnp.int32(repeat),
                moments,
                truth[1],
                estimator=estimator,
            )
            elbos.append(np.asarray(found))
            norms.append(norm)
        values = {"elbos": np.stack(elbos)}
        if moments is None:
            return values
        mean_error = jax.tree.map(lambda a, t: a / moments[0].count - t, moments[0].total, truth[1])
        values |= {name: np.stack([np.asarray(norm[name]) for norm in norms]) for name in norms[0]}
        values["mean_error"] = np.asarray(self._norms(mean_error))
        # The score's gradient has moments only if batches have one pair.
        for name, of in zip(("trace", "score trace"), moments, strict=False):
            values[name] = np.asarray(of.trace(self.problem.parts))
        return values

    def _nested_draws(self, batch, truth) -> dict:
        """Computes the nested draws: nested_t times, and nested_yt samples at each.

        Their gradient is that of the loss linearised at the true scores.
        """
        elbos = truth[0]["elbos"].mean(0)
        ratio = elbos[0] - elbos[1]
        scores = jnp.asarray(self.args.beta * (ratio[:, 0::2] - ratio[:, 1::2]))
        n_t, n_yt = self.args.nested_t, self.args.nested_yt
        terms, shares, squares, of_times = [], [], [], []
        whole = self._zero(self.params)
        for time in range(n_t):
            found, share, moments, square = self._nested(
                self.params,
                self.reference,
                batch,
                jnp.int32(NESTED_EPOCH + time),
                scores,
                n_yt=n_yt,
            )
            terms.append(np.asarray(found))
            shares.append(np.asarray(share))
            if moments is not None:
                squares.append(np.asarray(square))
                of_times.append(self._totals(moments))
                whole = jax.tree.map(jnp.add, whole, moments)
        values = {
            "terms": np.moveaxis(np.stack(terms), 1, 2),
            "shares": np.stack(shares),
            "elbos": elbos,
        }
        if whole is None:
            return values
        squares = np.stack(squares)
        v_t, v_yt = decomposition.decompose_norms(squares, np.stack(of_times), self._totals(whole))
        values |= {"v_t": v_t, "v_yt": v_yt}
        return values | ({"squares": squares} if self.problem.one_pair else {})

    def _totals(self, moments: tuple[Moments, ...]) -> np.ndarray:
        return np.stack([np.asarray(self._norms(m.total)) for m in moments])

    def _pairs(self, batch) -> np.ndarray:
        everywhere = mesh.replicated(self.mesh)
        return np.asarray(jax.jit(self.problem.is_pair, out_shardings=everywhere)(batch))

    def _saved(self, path: epath.Path) -> dict | None:
        if not path.exists():
            return None
        with path.open("rb") as f:
            return dict(np.load(f))

    def _save(self, path: epath.Path, values: dict) -> dict:
        if hosts_lib.is_first():
            content = io.BytesIO()
            np.savez(content, **values)
            write_whole(path, content.getvalue())
        return values


def _model_terms(params, batch, drawn, *, model: nn.Module, chunk: int):
    n = drawn.masked.shape[0]
    chunk = max(size for size in range(1, min(chunk or n, n) + 1) if n % size == 0)
    return terms_lib.model_terms(model, params, batch, drawn, chunk=chunk)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "=._-" else "_" for c in name)


def _check_identity(run: Run):
    """Raises ValueError if the folder holds the results of another measurement."""
    path, mine = run.out / "settings.json", run.identity()
    if path.exists():
        there = json.loads(path.read_text())
        if changed := [k for k, v in mine.items() if there.get(k) != v]:
            raise ValueError(
                f"{run.out} holds results with other "
                f"{', '.join(f'{k}={there.get(k)!r}' for k in changed)}: give another --out"
            )
    elif hosts_lib.is_first():
        write_whole(path, json.dumps(mine, indent=1) + "\n")


def run(args: argparse.Namespace) -> str:
    """Measures as the flags say; returns the table as text, or "" on all hosts but the first."""
    this = Run(args)
    agree.check_shared(this.out)
    _check_identity(this)
    with mesh.use(this.mesh):
        found = this.measure()
    if not hosts_lib.is_first():
        return ""
    # The mean number of positions in one pair. It gives the cost of a model call.
    tokens = this.rows.stats.tokens / this.rows.stats.samples
    flops_per_token = models.family_of(this.model.config).flops_per_token
    flops = flops_per_token(this.model.config, this.rows.row_length) * tokens
    table = tables.tabulate(
        found, this.estimators, parts=this.problem.parts, beta=args.beta, flops=flops
    )
    table["settings"] = this.identity() | {
        "pairs": this.rows.stats.samples,
        "tokens a pair": tokens,
    }
    tables.write(table, this.out, plots=not args.no_plots)
    return tables.as_text(table)
