"""How devices and hosts share a step: `jit` over a mesh, or ("pmap") one program for each device.

Both run the same functions on the same global arrays, so that batches, checkpoints and evaluations do not differ.
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
    """`kind` "mesh": the compiler splits the work by shardings; "pmap": parameters on every device, rows split."""

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
                f'parallelism="pmap" splits rows only, not {asked}: set it to 1, or parallelism="mesh"'
            )

    @property
    def axis_name(self) -> str | None:
        """What a compiled function has to sum over itself; None where the compiler sees to it."""
        return "data" if self.kind == "pmap" else None

    def use(self):
        """A context under which functions are compiled: the model's logical constraints mean the mesh, if anything."""
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
        """`function` compiled. `rows`: which arguments have rows on axis 0, `out_rows`: whether the results have.

        `out_shardings` places the results, `donate` numbers the arguments that are given away. For "pmap" this is what
        jax.pmap has become, jit of shard_map, without its conversion of every array to a view of one host.
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
        """(which, of how many) shares of a batch's rows this host loads.

        Hosts whose devices hold the same rows (an axis fsdp or tensor may span hosts) load the same share. ValueError
        where the rows of two hosts overlap in part.
        """
        count = mesh_lib.row_shards(self.mesh)
        held: dict[int, set[int]] = {}
        for device, (index,) in mesh_lib.rows(self.mesh).devices_indices_map((count,)).items():
            held.setdefault(device.process_index, set()).add(index.start or 0)
        shares = sorted({tuple(sorted(parts)) for parts in held.values()})
        if sum(map(len, shares)) != count or len({len(share) for share in shares}) > 1:
            raise ValueError(
                f"the mesh {dict(self.mesh.shape)} gives {len(held)} hosts rows that overlap in part: let mesh.tensor "
                "divide the devices of a host, or be a multiple of them"
            )
        return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)

    def put(self, rows: Any) -> Any:
        """A host's share of rows (arrays on axis 0, as `data.loader` gives them for `shard`) as global arrays."""
        sharding, count = mesh_lib.rows(self.mesh), self.shard[1]
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(
                sharding, x, (len(x) * count, *x.shape[1:])
            ),
            rows,
        )
