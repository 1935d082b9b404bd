"""Meshes, shardings, and the table of logical axis rules."""

import contextlib

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter or an activation -> mesh axes. No other place relates the two.
RULES = (
    ("act_rows", ("data", "fsdp")),
    ("act_length", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("layers", None),
    ("norm", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Makes a mesh of all devices (or of `devices`). One size may be -1: it takes what is left.

    With several TPU slices, only the axis `data` crosses the network between them. The same holds
    for several GPU nodes if `data` is a multiple of their number; otherwise any axis may cross.

    Raises ValueError if the product of the sizes is not the number of devices, or if `data` is not
    a multiple of the number of TPU slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(
            f"mesh sizes {asked}: each is at least 1, and at most one is -1 (what is left)"
        )
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh sizes {asked} do not fit {len(devices)} devices: change config.mesh"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices and devices[0].platform != "tpu":
        slices = 1  # JAX counts GPU nodes as slices too, but any axis may cross their network
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.data={sizes[0]} is no multiple of the {slices} slices that it has to cross:"
            " change it"
        )
    # Use Auto axes: linen's logical partitioning fails under Explicit axes, make_mesh's default.
    types = (AxisType.Auto,) * 3
    if slices > 1:
        within, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
        return Mesh(
            mesh_utils.create_hybrid_device_mesh(within, across, devices), AXES, axis_types=types
        )
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)


def of_rows(
    batch_size: int, data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None
) -> Mesh | None:
    """Makes the mesh on which a model answers rows; None is the first device alone.

    batch_size: rows in one model call.
    data: parts of the rows; -1 takes what is left of `devices` (by default all, of all hosts).

    Raises ValueError if the sizes do not fit the devices, if they leave some idle that are asked
    for (all of several hosts are), or if the rows cannot be split.
    """
    devices = jax.devices() if devices is None else devices
    rest = fsdp * tensor
    asked = f"data_parallel={data} fsdp={fsdp} tensor={tensor}"
    whole = data == -1 or len({device.process_index for device in devices}) > 1
    if data == -1 and rest > 0:
        data = len(devices) // rest
    used = data * rest
    if min(data, fsdp, tensor) < 1 or used > len(devices):
        raise ValueError(f"{asked} do not fit the {len(devices)} devices: change them")
    if whole and used < len(devices):
        raise ValueError(f"{asked} use {used} of the {len(devices)} devices: change them")
    if used == 1:
        return None
    if batch_size % (data * fsdp):
        raise ValueError(
            f"batch_size={batch_size} is no multiple of the {data * fsdp} parts of the rows "
            f"({asked}): change it"
        )
    return make_mesh(data, fsdp, tensor, devices[:used])


def row_shards(mesh: Mesh) -> int:
    """Returns the number of parts into which the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows are split over the axes data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(mesh: Mesh, boxed):
    """Returns the NamedShardings that RULES give to a tree of boxed abstract parameters.

    The tree may hold other things too, such as the optimiser state.
    """
    specs = nn.get_partition_spec(boxed)
    return nn.logical_to_mesh_sharding(specs, mesh, RULES)


@contextlib.contextmanager
def use(mesh: Mesh):
    """Context in which the model's logical sharding constraints refer to this mesh."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(RULES):
        yield
