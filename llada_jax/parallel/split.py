"""How devices and hosts share the work of a step: "mesh" (jit over a mesh) or "pmap" (shard_map).

Both run the same functions on the same global arrays, so they share batches, checkpoints and
evaluations.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llada_jax.parallel import mesh as mesh_lib

KINDS = ("mesh", "pmap")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a function is compiled for the devices of a mesh.

    kind "mesh": the compiler splits the work according to shardings.
    kind "pmap": every device has all parameters and runs the function on its share of the rows.

    Raises ValueError for another kind, and for "pmap" with mesh axes fsdp or tensor above 1.
    """

    kind: str
    mesh: Mesh

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"config.parallelism={self.kind!r} is not one of {', '.join(KINDS)}")
        others = {
            axis: self.mesh.shape[axis] for axis in ("fsdp", "tensor") if self.mesh.shape[axis] > 1
        }
        if self.kind == "pmap" and others:
            asked = ", ".join(f"mesh.{axis}={size}" for axis, size in others.items())
            raise ValueError(
                f'parallelism="pmap" splits rows only, not {asked}:'
                ' set it to 1, or parallelism="mesh"'
            )

    @property
    def axis_name(self) -> str | None:
        """The axis over which a "pmap" function must sum itself; None for "mesh"."""
        return "data" if self.kind == "pmap" else None

    def use(self):
        """Returns the context in which functions must be compiled.

        For "mesh" the model's logical sharding constraints refer to the mesh; for "pmap" they have
        no effect.
        """
        return mesh_lib.use(self.mesh) if self.kind == "mesh" else contextlib.nullcontext()

    def jit(
        self,
        function: Callable,
        rows: tuple[bool, ...],
        *,
        out_rows: bool,
        out_shardings: Any,
        donate=(),
    ):
        """Returns `function` under jax.jit, for "pmap" with shard_map inside.

        rows: for each argument, whether axis 0 is rows of a batch.
        out_rows: whether axis 0 of the results is rows.
        out_shardings: the shardings of the results.
        donate: the indices of the arguments whose buffers are donated.

        jax.pmap itself is by now a jit of shard_map. We leave out its conversion of every array
        to a view of one host.
        """
        if self.kind == "pmap":
            function = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=tuple(P("data") if split else P() for split in rows),
                out_specs=P("data") if out_rows else P(),
                check_vma=False,
            )
        return jax.jit(function, donate_argnums=donate, out_shardings=out_shardings)

    @functools.cached_property
    def shard(self) -> tuple[int, int]:
        """(index, count): which of `count` equal shares of a batch's rows this host loads.

        If the devices of several hosts hold the same rows (the axis tensor may span hosts), these
        hosts load the same share. Raises ValueError if the rows of two hosts overlap in part.
        """
        count = mesh_lib.row_shards(self.mesh)
        held: dict[int, set[int]] = {}
        for device, (index,) in mesh_lib.rows(self.mesh).devices_indices_map((count,)).items():
            held.setdefault(device.process_index, set()).add(index.start or 0)
        shares = sorted({tuple(sorted(parts)) for parts in held.values()})
        if sum(map(len, shares)) != count or len({len(share) for share in shares}) > 1:
            raise ValueError(
                f"the mesh {dict(self.mesh.shape)} gives {len(held)} hosts rows that overlap in"
                " part: let mesh.tensor divide the devices of a host, or be a multiple of them"
            )
        return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)

    def put(self, rows: Any) -> Any:
        """Makes global arrays of each host's share of rows (axis 0), as the loader yields them."""
        sharding, count = mesh_lib.rows(self.mesh), self.shard[1]
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(
                sharding, x, (len(x) * count, *x.shape[1:])
            ),
            rows,
        )
