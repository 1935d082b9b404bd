"""Objective: what an objective provides to training, evaluation, dry run and compile."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from llada_jax import config

# {name: values [r, k]}: one value for each of the k places of a row that may contain an example.
Examples = dict[str, Array]
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Objective:
    """One objective: the records it reads, the metrics of each example, and the loss.

    `Settings` is a settings dataclass (config.py). It has the fields `scheme`, `mc_chunk`, `seed`
    and `stream`, and a method `for_heldout(n_t)` that returns the settings for held-out examples.

    `examples(params, batch, frozen, *, model, settings)` returns the metrics of every example.
    `loss(means, settings)` returns the loss to minimise, from the means of these metrics over a
    batch. `frozen` contains the parameters of the reference policy. It is None if the objective has
    no reference policy, or if the batch contains its terms (`batch.reference`).
    """

    name: str
    section: str  # name of the config section with its settings
    records: str  # the kind of records it trains on: "text", "sft" or "preference"
    unit: str  # the name of its examples in logs: "samples", "pairs"
    Settings: type
    is_example: Callable[..., Array]  # batch -> [r, k]: which places of a row contain an example
    examples: Callable[..., Examples]
    loss: Callable[[dict[str, Array], Any], Array] = lambda means, settings: means["loss"]
    prepare: Callable[..., Any] = lambda batch, settings: batch  # changes a batch before training
    summary: Callable[..., dict] = lambda means: {}  # extra metrics, from the means over a batch
    # (params, batch, *, model, settings) -> terms [r, n, s] of the reference policy at the masks
    # that `examples` draws. None: the objective has no reference policy.
    reference_terms: Callable[..., Array] | None = None
    segments_per_example: int = 1
    shown: tuple[str, ...] = ("loss",)  # metrics in the progress line
    heldout: tuple[str, ...] = ("loss",)  # metrics that are printed after an evaluation

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares the policy with a reference policy."""
        return self.reference_terms is not None


@dataclasses.dataclass(frozen=True)
class Reference:
    """Where the reference policy comes from, and what a run keeps of it."""

    # the reference policy: "model": on the devices; "cached": its terms, computed before training
    reference: str = "model"
    reference_from: str = ""  # folder of the reference policy; "": init_from
    reference_dtype: str = ""  # type of the reference parameters; "": model.param_dtype

    def __post_init__(self):
        config.one_of(self, reference=("model", "cached"), reference_dtype=("", *DTYPES))

    @property
    def is_cached(self) -> bool:
        """Whether training reads the reference terms from the cache instead of computing them."""
        return self.reference == "cached"


def check_chunk(settings: Any) -> None:
    """Raises ValueError if `mc_chunk` does not divide the n draws of the scheme."""
    n = settings.scheme.n
    if settings.mc_chunk < 0 or (settings.mc_chunk and n % settings.mc_chunk):
        raise ValueError(
            f"mc_chunk={settings.mc_chunk} does not divide n_t x n_yt = {n}: choose a divisor"
        )
