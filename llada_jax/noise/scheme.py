"""Scheme: one entry of each table, with a check that the entries fit together."""

import dataclasses

import numpy as np

from llada_jax.noise.masks import MASKS
from llada_jax.noise.times import TIMES
from llada_jax.noise.weights import WEIGHTS

SHARED = ("nothing", "times", "masks")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How to spend a Monte Carlo budget of n_t x n_yt draws (equation 6).

    `times`, `masks` and `weights` are names in TIMES, MASKS and WEIGHTS.

    `eps` is for Bernoulli masks only. Above 0 it makes the estimate biased.

    `pseudo_count` is for two entries of WEIGHTS. In "leave_one_out" a larger value shrinks the
    control variates more. In "balanced" a larger value keeps the weights closer to "plain".

    `share_in_pair` says what the draws of a winner (segment 2k + 1) and of its loser (2k + 2) have
    in common. "nothing" is the paper's choice. "times" shares the times. "masks" shares times and
    masks: the k-th response tokens of both have the same random score, so the masks are alike
    token by token from the start of the responses.

    Raises ValueError if a name is unknown or if two settings do not fit together.
    """

    n_t: int = 8  # number of times; each ELBO has n_t x n_yt draws
    n_yt: int = 1  # number of masks at each time
    times: str = "iid"  # how times are drawn: a name in noise.TIMES
    masks: str = "exact"  # how masks are drawn at a time: a name in noise.MASKS
    weights: str = "plain"  # how masked tokens are weighted: a name in noise.WEIGHTS
    eps: float = 0.0  # smallest mask probability of "bernoulli"; above 0: biased
    pseudo_count: float = 0.0  # shrinkage of "leave_one_out" and "balanced" weights
    share_in_pair: str = "nothing"  # what winner and loser share; or "times", "masks"

    def __post_init__(self):
        for name, known in (
            ("times", TIMES),
            ("masks", MASKS),
            ("weights", WEIGHTS),
            ("share_in_pair", SHARED),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.n_t < 1 or self.n_yt < 1:
            raise ValueError(f"n_t={self.n_t}, n_yt={self.n_yt}: both must be at least 1")
        times, masks, weights = TIMES[self.times], MASKS[self.masks], WEIGHTS[self.weights]
        if not 0 <= self.eps < 1 or (self.eps and masks.by_count):
            raise ValueError(
                f"eps={self.eps}, masks={self.masks!r}: eps is in [0, 1), and 0 for masks by count"
            )
        if times.by_count and not masks.by_count:
            raise ValueError(
                f"times={self.times!r} are counts of masked tokens: "
                f"use masks by count, not {self.masks}"
            )
        if self.pseudo_count < 0 or (self.pseudo_count and weights.pseudo_count == "unused"):
            takes = ", ".join(
                name for name, each in WEIGHTS.items() if each.pseudo_count != "unused"
            )
            raise ValueError(
                f"pseudo_count={self.pseudo_count}, weights={self.weights!r}: "
                f"pseudo_count is at least 0, and 0 but for weights {takes}"
            )
        if weights.pseudo_count == "required" and not self.pseudo_count:
            raise ValueError(f"weights={self.weights!r} needs pseudo_count above 0, for example 1")
        if weights.divides and times.signed:
            raise ValueError(
                f"weights={self.weights!r} divides by ratios, "
                f"which may be 0 for times={self.times!r}: use other times"
            )
        if weights.independent and not self.independent().any():
            raise ValueError(
                f"weights={self.weights!r} needs independent draws; "
                f"n_t={self.n_t} times with masks={self.masks!r} have none: "
                "use more times, or other masks"
            )

    @property
    def n(self) -> int:
        """The number of draws, n_t x n_yt."""
        return self.n_t * self.n_yt

    @property
    def biased(self) -> bool:
        """Whether the expectation of the estimate may differ from the ELBO."""
        return TIMES[self.times].biased or WEIGHTS[self.weights].biased or self.eps > 0

    def independent(self) -> np.ndarray:
        """[n, n]: 1 where two draws have different times, and masks independent given the times."""
        draw = np.arange(self.n)
        block, time = draw // (MASKS[self.masks].block or self.n), draw // self.n_yt
        return ((block[:, None] != block) & (time[:, None] != time)).astype(np.float32)
