"""Describes the devices of a TPU topology that this machine does not have."""

import os
import re

from jax.experimental import topologies

from llada_jax.chips import CHIPS, Chip


def topology(name: str, slices: int = 1) -> tuple[list, Chip]:
    """Returns the devices of a TPU topology, and the peak rates and memory of one chip.

    `name` is such as "v5p:2x2x4": the generation, and the chips along each axis of a slice;
    "v6e:1x1" is one chip. Raises
    ValueError if the topology is unknown, and ImportError if the TPU compiler is not installed.
    """
    generation, _, sides = name.partition(":")
    known = sorted(
        prefix for prefix, chip in CHIPS.items() if prefix[0] == "v" and chip.name.startswith("TPU")
    )
    if generation not in known or not re.fullmatch(r"\d+(x\d+)+", sides):
        raise ValueError(
            f"--topology={name!r} is not GENERATION:AxB or AxBxC, like v5p:2x2x4; "
            f"known: {', '.join(known)}"
        )
    if slices < 1:
        raise ValueError(f"--slices={slices}: at least one")
    # On a TPU machine: do not ask its metadata server, and do not claim its chips.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    kwargs: dict = {"num_slices": slices} if slices > 1 else {}
    shape = [int(side) for side in sides.split("x")]
    if 1 in shape[:2]:  # less than the 2x2 chips of a host
        kwargs["chips_per_host_bounds"] = (*(min(side, 2) for side in shape[:2]), 1)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **kwargs)
    except Exception as error:
        if ("libtpu" in str(error).lower() and "not found" in str(error).lower()) or isinstance(
            error, ImportError
        ):
            raise ImportError("the TPU compiler is missing: pip install libtpu") from error
        raise ValueError(f"--topology={name}: {error}") from error
    return found.devices, CHIPS[generation]
