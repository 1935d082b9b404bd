"""Peak rates of accelerators, as the vendors publish them: the one table that benchmark.py and compile.py read."""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which is one JAX device: dense FLOP/s and bytes, decimal rates, nothing for sparsity."""

    name: str
    bf16_flops: float  # FLOP/s
    hbm_bytes: int  # nominal; XLA keeps a little of it for itself
    hbm_bandwidth: float  # bytes/s
    ici_bandwidth: float  # bytes/s one way out of the chip, all links (ICI, NVLink) together
    dcn_bandwidth: float | None = (
        None  # bytes/s one way, its share of the network between TPU slices, where published
    )


_V4 = Chip("TPU v4", 275e12, 32 * _GIB, 1228e9, 300e9)
_V5E = Chip("TPU v5e", 197e12, 16 * _GIB, 819e9, 200e9, 25e9 / 8)
_V5P = Chip("TPU v5p", 459e12, 95 * _GIB, 2765e9, 600e9, 50e9 / 8)
_V6E = Chip("TPU v6e", 918e12, 32 * _GIB, 1640e9, 400e9, 100e9 / 8)
_A100_40 = Chip("A100 SXM 40 GB", 312e12, 40 * _GIB, 1555e9, 300e9)
_A100_80 = Chip("A100 SXM 80 GB", 312e12, 80 * _GIB, 2039e9, 300e9)
_H100 = Chip("H100 SXM", 989e12, 80 * _GIB, 3350e9, 450e9)
_H200 = Chip("H200", 989e12, 141 * _GIB, 4800e9, 450e9)

# By jax.Device.device_kind, and by the first part of a topology's name ("v5p" of v5p:2x2x4). From the page of each
# version under docs.cloud.google.com/tpu/docs (there the interconnect counts both ways) and NVIDIA's data sheets. The
# data-center network: 50 Gbit/s a chip (docs/v5p), 2 x 100 and 4 x 200 Gbit/s for the 8 chips of a v5e and a v6e host
# (docs/v6e, which gives 6.4 and 25.6 Tbit/s for the 256 chips of a pod); v4's page does not say.
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
