"""Means with standard errors, which can be merged across batches, hosts and steps."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Mean:
    """A mean and its standard error, mergeable across batches, hosts and steps; works under jit.

    It stores the squared deviations from the mean and merges them by Chan's formula. A plain sum of
    squares in float32 would lose a small variance beside a large mean. The mean of no values is
    nan; the standard error of fewer than two values is nan.
    """

    total: Any  # sum of the values, float32 scalar
    count: Any  # number of values
    squares: Any  # sum of squared deviations from this Mean's own mean

    @classmethod
    def of(cls, values, mask=None) -> "Mean":
        """Returns the Mean of the `values` (any shape) at which `mask` is not 0.

        `mask` is broadcast to the shape of the values; None takes all. Values that are left out may
        be nan.
        """
        values = jnp.asarray(values, jnp.float32)
        kept = (
            jnp.ones(values.shape, bool)
            if mask is None
            else jnp.broadcast_to(jnp.asarray(mask) != 0, values.shape)
        )
        count = kept.sum(dtype=jnp.float32)
        total = jnp.where(kept, values, 0).sum()
        mean = total / jnp.maximum(count, 1)
        return cls(total, count, jnp.square(jnp.where(kept, values - mean, 0)).sum())

    def merge(self, other: "Mean") -> "Mean":
        """Returns the Mean of both sets of values together."""
        shift = other.total / jnp.maximum(other.count, 1) - self.total / jnp.maximum(self.count, 1)
        count = self.count + other.count
        between = shift**2 * self.count * other.count / jnp.maximum(count, 1)
        return Mean(self.total + other.total, count, self.squares + other.squares + between)

    def over_devices(self, axis_name: str | None) -> "Mean":
        """Returns the Mean over all devices along a mapped axis; with None, this Mean itself."""
        if axis_name is None:
            return self
        total, count = jax.lax.psum((self.total, self.count), axis_name)
        shift = self.total / jnp.maximum(self.count, 1) - total / jnp.maximum(count, 1)
        return Mean(total, count, jax.lax.psum(self.squares + self.count * shift**2, axis_name))

    @property
    def value(self):
        """The mean; nan if there are no values."""
        return self.total / self.count

    @property
    def stderr(self):
        """Standard error of the mean of independent values, by the unbiased sample variance."""
        enough = self.count > 1
        variance = self.squares / jnp.where(enough, self.count - 1, 1)
        return jnp.where(enough, jnp.sqrt(variance / jnp.maximum(self.count, 1)), jnp.nan)


def floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Converts scalars, scalar arrays and Means (their value) to floats; waits for the device."""
    values = {
        name: metric.value if isinstance(metric, Mean) else metric
        for name, metric in metrics.items()
    }
    return {name: float(value) for name, value in jax.device_get(values).items()}
