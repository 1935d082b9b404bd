"""Peak rates of accelerators, as published by the vendors.

`llada_jax.benchmark` and `llada_jax.compile` both read this table.
"""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which is one JAX device.

    Rates are decimal, and FLOP/s are dense: they do not count sparsity.
    """

    name: str
    bf16_flops: float  # FLOP/s
    hbm_bytes: int  # nominal; XLA reserves a little of it
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s out of the chip, one way, sum of all links (ICI, NVLink)
    # The chip's share of the network between TPU slices, in bytes/s one way. None: not published.
    dcn_bandwidth: float | None = None


_V4 = Chip("TPU v4", 275e12, 32 * _GIB, 1228e9, 300e9)
_V5E = Chip("TPU v5e", 197e12, 16 * _GIB, 819e9, 200e9, 25e9 / 8)
_V5P = Chip("TPU v5p", 459e12, 95 * _GIB, 2765e9, 600e9, 50e9 / 8)
_V6E = Chip("TPU v6e", 918e12, 32 * _GIB, 1640e9, 400e9, 100e9 / 8)
_A100_40 = Chip("A100 SXM 40 GB", 312e12, 40 * _GIB, 1555e9, 300e9)
_A100_80 = Chip("A100 SXM 80 GB", 312e12, 80 * _GIB, 2039e9, 300e9)
_H100 = Chip("H100 SXM", 989e12, 80 * _GIB, 3350e9, 450e9)
_H200 = Chip("H200", 989e12, 141 * _GIB, 4800e9, 450e9)

# The keys are jax.Device.device_kind, and the first part of a topology's name ("v5p" in
# "v5p:2x2x4").
#
# Sources: NVIDIA's data sheets, and the page of each TPU version under
# docs.cloud.google.com/tpu/docs, which counts both directions of the interconnect. The data-center
# network gives each v5p chip 50 Gbit/s (docs/v5p). The 8 chips of a v5e host share 2 x 100 Gbit/s,
# and the 8 chips of a v6e host share 4 x 200 Gbit/s (docs/v6e, which gives 6.4 and 25.6 Tbit/s for
# the 256 chips of a pod). The page of v4 does not give this rate.
CHIPS = {
    "TPU v4": _V4,
    "v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "v6e": _V6E,
    "NVIDIA A100-SXM4-40GB": _A100_40,
    "NVIDIA A100-SXM4-80GB": _A100_80,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H200": _H200,
}
