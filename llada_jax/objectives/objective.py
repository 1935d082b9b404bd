"""Objective: what the trainer, the evaluation, the dry run and the compiler ask of an objective."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from llada_jax import config

# {name: values [r, k]} of the k places of a row that may hold an example.
Examples = dict[str, Array]
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Objective:
    """One objective: what it reads, what it computes for each example, what it needs beside a batch.

    `Settings` is a settings dataclass (config.py) with the fields `scheme`, `mc_chunk`, `seed` and
    `stream`, and with `for_heldout(n_t)`, its settings for the evaluation.
    `examples(params, batch, frozen, *, model, settings)` gives the metrics of every example, and
    `loss(means, settings)` the loss that is minimised, from their means over a batch. `frozen` holds
    the parameters of the reference policy; it is None if the objective has no reference, or if the
    batch holds its terms (`batch.reference`).
    """

    name: str
    section: str  # of the config that holds its settings
    records: str  # the kind of records it trains on: "text", "sft" or "preference"
    unit: str  # what logs call its examples: "samples", "pairs"
    Settings: type
    is_example: Callable[..., Array]  # batch -> [r, k]: which places of a row hold an example
    examples: Callable[..., Examples]
    loss: Callable[[dict[str, Array], Any], Array] = lambda means, settings: means["loss"]
    prepare: Callable[..., Any] = lambda batch, settings: batch  # of a training batch
    summary: Callable[..., dict] = lambda means: {}  # more metrics, from the means over a batch
    # (params, batch, *, model, settings) -> terms [r, n, s] of the reference policy at the masks that
    # `examples` draws; None: the objective has no reference policy.
    reference_terms: Callable[..., Array] | None = None
    segments_per_example: int = 1
    shown: tuple[str, ...] = ("loss",)  # in the progress line
    heldout: tuple[str, ...] = ("loss",)  # after an evaluation

    @property
    def needs_reference(self) -> bool:
        """Whether the objective compares the policy with a reference policy."""
        return self.reference_terms is not None


@dataclasses.dataclass(frozen=True)
class Reference:
    """Where the reference policy comes from, and how a run keeps it."""

    # "model": its parameters beside the policy's; "cached": its terms, computed before training
    reference: str = "model"
    reference_from: str = ""  # a model; "": init_from
    reference_dtype: str = ""  # of its parameters; "": model.param_dtype

    def __post_init__(self):
        config.one_of(self, reference=("model", "cached"), reference_dtype=("", *DTYPES))

    @property
    def is_cached(self) -> bool:
        """Whether training reads terms instead of computing them."""
        return self.reference == "cached"


def check_chunk(settings: Any) -> None:
    """Raises ValueError if `mc_chunk` draws at a time do not make up the n draws of the scheme."""
    n = settings.scheme.n
    if settings.mc_chunk < 0 or (settings.mc_chunk and n % settings.mc_chunk):
        raise ValueError(
            f"mc_chunk={settings.mc_chunk} does not divide n_t x n_yt = {n}: choose a divisor"
        )
