"""The reference policy of a run: parameters, or cached terms."""

import functools

import jax

from llada_jax import metrics, noise
from llada_jax.checkpoints import hashing, loading
from llada_jax.data.rows import Rows
from llada_jax.objectives import preference
from llada_jax.parallel import mesh
from llada_jax.parallel.stop import Stop
from llada_jax.train.experiment import Plan
from llada_jax.train.loop import host_loader
from llada_jax.train.reference_cache import ReferenceCache


class Reference:
    """The reference policy as `vrpo_step` and the evaluation want it: parameters, or cached terms of a batch.

    `end_index`: of the loader after the last step.
    """

    def __init__(self, plan: Plan, shardings, stop: Stop, end_index: int):
        c = plan.config
        self._plan, self._stop = plan, stop
        self._settings = {"train": plan.settings, "heldout": plan.eval_settings}
        dtype = c.vrpo.reference_dtype or c.model.param_dtype
        self._params = loading.load(c.vrpo.reference_from or c.init_from, dtype, shardings)[1]
        self.fingerprint = hashing.fingerprint(self._params)
        self._caches = {}
        if c.vrpo.reference == "cached":
            epochs = -(-end_index // len(plan.rows))
            self._caches["train"] = self._fill("train", plan.rows, epochs)
            if plan.heldout is not None:
                self._caches["heldout"] = self._fill("heldout", plan.heldout, 1)
            self._params = None

    def _fill(self, which: str, rows: Rows, epochs: int) -> ReferenceCache:
        plan, settings = self._plan, self._settings[which]
        batch_rows = plan.rows_at_once
        noise_settings = (settings.scheme, settings.share_noise, settings.seed, settings.stream)
        terms_fn = self._terms_fn(which)
        gathered = plan.parallel.jit(
            lambda params, batch: (batch.row_ids, terms_fn(params, batch)),
            (False, True),
            out_rows=True,
            out_shardings=mesh.replicated(plan.mesh),
        )

        def terms_of(batch):
            self._stop.check()
            return jax.device_get(gathered(self._params, plan.parallel.put(batch)))

        cache = ReferenceCache(
            plan.workdir / "reference",
            {
                "reference": self.fingerprint,
                "rows": rows.fingerprint,
                "settings": repr((noise_settings, noise.FORMAT, plan.model, plan.num_segments)),
            },
            num_rows=len(rows),
            epochs=epochs,
            n=settings.scheme.n,
            segments=plan.num_segments,
        )

        def batches_of(epoch, start):
            index = epoch * len(rows) + start
            return host_loader(
                plan,
                rows,
                batch_rows=batch_rows,
                seed=0,
                shuffle=False,
                epochs=epoch + 1,
                start=index,
                pad=True,
            )

        with metrics.Progress(epochs * len(rows), unit="reference row", show=()) as progress:
            cache.fill(
                terms_of,
                batches_of,
                batch_rows=batch_rows,
                progress=lambda done, _: progress.update(done),
            )
        return cache

    def of(self, batch):
        """What `vrpo_step` takes beside a batch."""
        return self._cached("train", batch) if self._params is None else self._params

    def terms(self, batch) -> jax.Array:
        """Terms of the reference for a held-out batch, at the masks of the evaluation."""
        if self._params is None:
            return self._cached("heldout", batch)
        return self._heldout_terms(self._params, self._plan.parallel.put(batch))

    @functools.cached_property
    def _heldout_terms(self):
        sharding = mesh.rows(self._plan.mesh)
        return self._plan.parallel.jit(
            self._terms_fn("heldout"), (False, True), out_rows=True, out_shardings=sharding
        )

    def _terms_fn(self, which: str):
        return functools.partial(
            preference.reference_terms,
            model=self._plan.model,
            settings=self._settings[which],
            num_segments=self._plan.num_segments,
        )

    def _cached(self, which: str, batch) -> jax.Array:
        return self._plan.parallel.put(self._caches[which][batch])
