"""Training checkpoints by Orbax, with what Orbax leaves open: verified contents, fallback, readable mismatches.

A flipped bit in a shard loads silently in Orbax, so a save records a content fingerprint of every leaf and a restore
compares them. A step that is damaged gives way to the one before it; a step that belongs to another model does not.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from llada_jax.checkpoints.hashing import describe, digest, leaf_name

_ITEM = "state"
# What is wrong with the machine, the rights or the network says nothing about the checkpoint.
_NOT_DAMAGE = (
    MemoryError,
    PermissionError,
    ConnectionError,
    TimeoutError,
    jax.errors.JaxRuntimeError,
)


class Checkpoints:
    """The steps kept in `directory`: asynchronous saves, verified restores, the newest `keep` steps kept.

    Opening it removes what an interrupted save left behind, so only the run that owns the directory may. A context
    manager; `close` waits for the last save.
    """

    def __init__(self, directory: epath.PathLike, keep: int = 3):
        if keep < 1:
            raise ValueError(
                f"keep={keep}: a run needs at least one checkpoint to continue from; give keep >= 1"
            )
        self._directory = _absolute(directory)
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._steps = ocp.training.Checkpointer(
            self._directory, preservation_policy=policy, cleanup_tmp_directories=True
        )
        self._saving = None
        self._current = None  # the step last saved or restored here
        self._damaged: list[int] = []

    def save(self, step: int, state, extra: Mapping[str, Any]):
        """Starts to save `state` (any pytree of arrays) and `extra` (JSON: what else a resume needs) as `step`.

        Returns when the state is copied to the host, so that the next step may donate it; what goes wrong in the
        background is raised by the next `save`, `wait` or `close`. Saving the current step again does nothing.
        """
        self.wait()
        if step == self._current:
            return
        for damaged in (
            self._damaged
        ):  # the run now passes them again; kept, they would count among the newest
            self._steps.delete(damaged)
        self._damaged = []
        if any(saved.step == step for saved in self._steps.checkpoints):
            raise ValueError(
                f"{self._directory}/{step} exists already; restore it first, or give another --workdir"
            )
        state = jax.tree.map(jnp.asarray, state)  # Orbax takes no NumPy scalars
        record = {"extra": dict(extra), "leaves": describe(state)}
        record = {**record, "digest": digest(record)}
        self._saving = self._steps.save_checkpointables_async(
            step, {_ITEM: state}, force=True, custom_metadata=record
        )
        self._current = step

    def restore(self, abstract_state) -> tuple[Any, dict] | None:
        """The newest undamaged step as (state, extra), or None where nothing was saved yet.

        `abstract_state` is a pytree of ShapeDtypeStruct with shardings, of any mesh (without a sharding: the first
        device). Raises one ValueError if the checkpoint is of another shape (another model or optimiser: never a reason
        to fall back), or if every step is damaged.
        """
        self.wait()
        found = _newest_good(_paths(self._steps), abstract_state, ())
        if found is None:
            return None
        path, state, extra, damaged = found
        self._damaged, self._current = damaged, int(path.name)
        return state, extra

    def latest_step(self) -> int | None:
        """The newest step saved, leaving out those that `restore` found damaged; None where there is none."""
        steps = [saved.step for saved in self._steps.checkpoints if saved.step not in self._damaged]
        return max(steps, default=None)

    def wait(self):
        """Waits until the last save is on disk, and raises what went wrong with it."""
        saving, self._saving = self._saving, None
        if saving is not None:
            step, self._current = self._current, None
            saving.result()
            self._current = step

    def close(self):
        try:
            self.wait()
        finally:
            self._steps.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def restore_params(path: epath.PathLike, dtype=None, abstract=None):
    """The parameters of a checkpoint of ours, verified, without reading the optimiser's state.

    `path` is a workdir (its newest undamaged step) or one step, workdir/checkpoints/<step>. `abstract` (pytree of
    ShapeDtypeStruct) is what names and shapes must be, and gives the shardings; without it everything goes to the first
    device. `dtype` casts; None keeps the types that were saved. Raises FileNotFoundError or ValueError, in one line.
    """
    path = _absolute(path)
    if (path / "checkpoints").is_dir():
        with ocp.training.Checkpointer(path / "checkpoints") as steps:
            paths = _paths(steps)
    else:
        paths = [path] if path.name.isdigit() and ocp.is_orbax_checkpoint(path) else []
    if not paths:
        raise FileNotFoundError(
            f"{path} holds no checkpoint; give a workdir or one of its workdir/checkpoints/<step>"
        )
    _, state, _, _ = _newest_good(
        paths, None if abstract is None else {"params": abstract}, ("params",)
    )
    leaves, structure = jax.tree.flatten(state["params"])
    del state
    for i, leaf in enumerate(leaves):  # one at a time: no second copy of the whole
        leaves[i] = leaf if dtype is None else leaf.astype(dtype)
    return jax.tree.unflatten(structure, leaves)


def _absolute(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path).expanduser()
    return path if "://" in str(path) else path.absolute()


def _paths(steps: ocp.training.Checkpointer) -> list[epath.Path]:
    return [epath.Path(saved.path) for saved in reversed(steps.checkpoints)]


class _Damaged(Exception):
    pass


def _newest_good(paths: list[epath.Path], abstract, only: tuple[str, ...]):
    """(path, state, extra, damaged steps) of the first path (newest first) that is undamaged; None without paths."""
    damaged = {}
    for path in paths:
        try:
            state, extra = _load(path, abstract, only)
        except _Damaged as error:
            damaged[int(path.name)] = str(
                error
            )  # the error itself would keep what was read in memory
            continue
        if damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            logging.warning(
                "Damaged checkpoints in %s (%s); going on from step %s.",
                path.parent,
                reasons,
                path.name,
            )
        return path, state, extra, list(damaged)
    _all_have(-1, True)
    if damaged:
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        raise ValueError(
            f"every checkpoint in {paths[0].parent} is damaged ({reasons}); "
            "bring back a copy of one of them, or start anew with another --workdir"
        )
    return None


def _load(path: epath.Path, abstract, only: tuple[str, ...]):
    """One step, verified: (tree, extra). `only`: the top-level parts to read; abstract=None takes them as saved."""
    failure = ""
    try:
        tree, saved, extra = _read(path, abstract, only)
    except _Damaged as error:
        failure = str(error)
    # A host reads only its own shards, so one may fail where others do not: all take this step, or all fall back.
    if not _all_have(int(path.name), not failure):
        raise _Damaged(failure or "another host cannot read it")
    found = describe(tree)
    changed = [name for name in saved if found[name] != saved[name]]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise _Damaged(f"contents of {', '.join(changed[:3])}{more} are not what was saved")
    return tree, extra


def _all_have(step: int, read: bool) -> bool:
    """Whether every host has read its part of a step (-1: no step is left); ValueError where hosts are at others."""
    found = multihost_utils.process_allgather(np.asarray([step, read], np.int32))
    if len(np.unique(found[:, 0])) > 1:
        raise ValueError(
            f"the hosts see different checkpoints (steps {found[:, 0].tolist()}, -1: none): start all again, with a "
            "--workdir on a shared file system or gs://"
        )
    return bool(found[:, 1].all())


def _read(path: epath.Path, abstract, only: tuple[str, ...]):
    """(tree, what was saved of each leaf, extra) of one step, this host's shards alone and not yet verified."""
    record = _record(path)
    saved = {
        name: leaf
        for name, leaf in record["leaves"].items()
        if not only or name.split("/")[0] in only
    }
    if abstract is None:
        abstract = _nested(
            {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape, _) in saved.items()}
        )
    _check_fits(path, saved, abstract, types_matter=not only)
    wanted = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: _placed(leaf, saved[leaf_name(keys)][0]), abstract
    )
    context, host = ocp.Context(), jax.process_index()
    context.pytree.loading.partial_load = bool(only)
    # Where one host fails, the others would wait for it in Orbax's barriers: each loads as if alone.
    context.multiprocessing.active_processes = {host}
    context.multiprocessing.primary_host = host
    context.multiprocessing.barrier_sync_key_prefix = f"host{host}"
    try:
        with context:
            tree = ocp.load_checkpointables(path, {_ITEM: wanted})[_ITEM]
    except (
        Exception
    ) as error:  # Orbax raises whatever the layer below did, often as a KeyError about its handlers
        raise _Damaged(f"files are missing or cut short ({_cause_of_damage(error)})") from error
    return tree, saved, record["extra"]


def _record(path: epath.Path) -> dict:
    """What `save` noted beside the arrays of a step: `extra`, and type, shape and hash of each leaf."""
    try:
        record = dict(ocp.checkpointables_metadata(path).custom_metadata)
        recorded = record.pop("digest")
    except Exception as error:
        raise _Damaged(
            f"no record of its contents can be read ({_cause_of_damage(error)})"
        ) from error
    if recorded != digest(record):
        raise _Damaged("the record of its contents was changed")
    return record


def _cause_of_damage(error: BaseException) -> str:
    """The first line of the innermost cause; raises an error that says nothing about the checkpoint itself."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, _NOT_DAMAGE):
            raise error
    return f"{type(causes[-1]).__name__}: {str(causes[-1])[:200]}".split("\n")[0]


def _check_fits(path: epath.Path, saved: Mapping[str, list], abstract, types_matter: bool):
    """Raises the one ValueError that lists where a checkpoint and what is asked of it differ."""

    def shown(dtype, shape):
        return f"{dtype if types_matter else ''}{list(shape)}"

    there = {name: shown(dtype, shape) for name, (dtype, shape, _) in saved.items()}
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    here = {leaf_name(keys): shown(leaf.dtype, leaf.shape) for keys, leaf in leaves}
    differ = [
        f"{name} is {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    if differ:
        more = f"; and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise ValueError(
            f"checkpoint {path} is of another model or optimiser: {'; '.join(differ[:4])}{more}; "
            "give another --workdir, or the config that wrote it"
        )


def _placed(leaf, dtype: str) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=sharding)


def _nested(leaves: Mapping[str, Any]) -> dict:
    tree: dict = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = leaf
    return tree
