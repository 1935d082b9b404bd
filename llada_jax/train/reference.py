"""The reference policy of a run: its parameters, or its terms, computed before training."""

from typing import Any

import jax

from llada_jax import config, metrics, noise
from llada_jax.batch import Batch
from llada_jax.checkpoints import hashing, loading
from llada_jax.data.rows import Rows
from llada_jax.parallel import mesh as mesh_lib
from llada_jax.parallel.stop import Stop
from llada_jax.train.experiment import Experiment
from llada_jax.train.reference_cache import ReferenceCache


class Policy:
    """The reference policy that steps and evaluations use.

    They get its parameters (`frozen`), or its terms as a part of each batch (`place`). If the
    objective has no reference policy, both are empty.
    """

    def __init__(self, plan: Experiment, shardings, stop: Stop):
        self._plan, self._stop = plan, stop
        self.frozen: Any = None  # the parameters; None if steps do not need them
        self.fingerprint = ""  # the fingerprint of the parameters
        self._caches: dict[str, ReferenceCache] = {}
        if plan.reference is not None:
            path = plan.reference.reference_from or plan.init_from
            self.frozen = loading.load(path, plan.reference_dtype, shardings)[1]
            self.fingerprint = hashing.fingerprint(self.frozen)

    def compute_terms(self, end_index: int):
        """Computes the terms for all steps and evaluations if the config asks for cached terms.

        `end_index` is the loader's index after the last step. The parameters are then released.
        """
        plan = self._plan
        if plan.reference is None or not plan.reference.is_cached:
            return
        epochs = -(-end_index // len(plan.rows))
        self._caches["train"] = self._cache(self.frozen, plan.settings, plan.rows, epochs)
        if plan.heldout is not None:
            heldout = self._cache(self.frozen, plan.heldout_settings, plan.heldout, 1)
            self._caches["heldout"] = heldout
        self.frozen = None

    def place(self, batch: Batch, which: str = "train") -> Batch:
        """Puts a host's batch on the devices, with the reference terms if they are cached."""
        if which in self._caches:
            batch = batch.replace(reference=self._caches[which][batch])
        return self._plan.parallel.put(batch)

    def _cache(self, params: Any, settings: Any, rows: Rows, epochs: int) -> ReferenceCache:
        plan = self._plan

        def terms_and_rows(params, batch, numbers):
            given = config.with_arguments(settings, numbers)
            terms = plan.objective.reference_terms(params, batch, model=plan.model, settings=given)
            return batch.row_ids, terms

        gathered = plan.parallel.jit(
            terms_and_rows,
            (False, True, False),
            out_rows=True,
            out_shardings=mesh_lib.replicated(plan.mesh),
        )

        def terms_of(batch):
            self._stop.check()
            numbers = plan.arguments["settings"]
            return jax.device_get(gathered(params, plan.parallel.put(batch), numbers))

        model = plan.model
        cache = ReferenceCache(
            plan.workdir / "reference",
            # Everything that the terms depend on, their rounding included.
            {
                "reference": self.fingerprint,
                "rows": rows.fingerprint,
                "settings": config.identity(settings),
                "noise format": noise.FORMAT,
                "model": model.config.to_dict(),
                "dtype": str(model.dtype),
                "attention": model.attention,
                "segments": plan.num_segments,
            },
            num_rows=len(rows),
            epochs=epochs,
            n=settings.scheme.n,
            segments=plan.num_segments,
        )

        def batches_of(epoch, start):
            return plan.batches(
                rows,
                batch_rows=plan.rows_at_once,
                seed=0,
                shuffle=False,
                epochs=epoch + 1,
                start=epoch * len(rows) + start,
                pad=True,
            )

        with metrics.Progress(epochs * len(rows), unit="reference row", show=()) as progress:
            cache.fill(
                terms_of,
                batches_of,
                batch_rows=plan.rows_at_once,
                progress=lambda done, _: progress.update(done),
            )
        return cache
