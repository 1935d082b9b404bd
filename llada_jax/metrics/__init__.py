"""Metrics: means that merge, files, progress, curves."""

from llada_jax.metrics.mean import Mean, floats
from llada_jax.metrics.progress import Progress, duration
from llada_jax.metrics.writer import Writer

__all__ = ["Mean", "Progress", "Writer", "duration", "floats"]
