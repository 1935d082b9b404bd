"""Training checkpoints by Orbax, with verified contents, fallback and readable error messages.

Orbax loads a shard with a flipped bit without an error. We therefore save a hash of every leaf and
compare it after loading. If a step is damaged, we restore the step before it. If a step belongs to
another model, we raise an error instead.
"""

import contextlib
from collections.abc import Callable, Mapping
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
# Errors of the machine, of permissions or of the network. They do not mean that the checkpoint is
# damaged.
_NOT_DAMAGE = (
    MemoryError,
    PermissionError,
    ConnectionError,
    TimeoutError,
    jax.errors.JaxRuntimeError,
)


class Checkpoints:
    """The checkpoints of a run in `directory`: saves asynchronously and verifies what it restores.

    The newest `keep` steps are kept. Opening the directory removes what an interrupted save left
    there, so only the run that owns it may open it. This is a context manager; `close` waits for
    the last save. Raises ValueError if keep is less than 1.
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
        self._current = None  # the step that was saved or restored last
        self._damaged: list[int] = []

    def save(self, step: int, state, extra: Mapping[str, Any]):
        """Starts to save `state` (any pytree of arrays) and `extra` (JSON data) as `step`.

        `extra` is whatever else a resumed run needs. The call returns when the state is copied to
        the host, so the next step may donate it. An error in the background is raised by the next
        `save`, `wait` or `close`. To save the current step again does nothing. Raises ValueError
        if another save of this step exists.
        """
        self.wait()
        if step == self._current:
            return
        # Damaged steps would count among the newest `keep`; the run now reaches them again.
        for damaged in self._damaged:
            self._steps.delete(damaged)
        self._damaged = []
        if any(saved.step == step for saved in self._steps.checkpoints):
            raise ValueError(
                f"{self._directory}/{step} exists already; restore it first,"
                " or give another --workdir"
            )
        state = jax.tree.map(jnp.asarray, state)  # Orbax does not accept NumPy scalars
        record = {"extra": dict(extra), "leaves": describe(state)}
        record = {**record, "digest": digest(record)}
        self._saving = self._steps.save_checkpointables_async(
            step, {_ITEM: state}, force=True, custom_metadata=record
        )
        self._current = step

    def restore(self, abstract_state) -> tuple[Any, dict] | None:
        """Restores the newest undamaged step: (state, extra), or None if nothing was saved yet.

        `abstract_state` is a pytree of ShapeDtypeStruct with shardings, which may be of another
        mesh than the saved one; a leaf without a sharding goes to the first device. Raises one
        ValueError if names, shapes or types differ from the checkpoint (another model or optimiser
        is never a reason to fall back), or if every step is damaged.
        """
        self.wait()
        found = _newest_good(_paths(self._steps), abstract_state)
        if found is None:
            return None
        path, state, extra, damaged = found
        self._damaged, self._current = damaged, int(path.name)
        return state, extra

    def latest_step(self) -> int | None:
        """Returns the newest saved step that `restore` did not find damaged, or None."""
        steps = [saved.step for saved in self._steps.checkpoints if saved.step not in self._damaged]
        return max(steps, default=None)

    def wait(self):
        """Waits until the last save is on disk; raises the error if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            step, self._current = self._current, None
            saving.result()
            self._current = step

    def close(self):
        """Waits for the last save and closes the directory."""
        try:
            self.wait()
        finally:
            self._steps.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def restore_params(
    path: epath.PathLike,
    convert: Callable[[str, jax.Array], Any] = lambda name, leaf: leaf,
    abstract=None,
):
    """Restores and verifies the parameters of a checkpoint, without reading the optimiser state.

    path: a workdir (its newest undamaged step) or one step, workdir/checkpoints/<step>.
    convert: maps name and array of each parameter to what is kept of it. Parameters are read one at
        a time, so memory holds only one as it was saved. A name is such as "wte/embedding".
    abstract: a pytree of ShapeDtypeStruct, which gives the shardings; names and shapes must agree
        with it. None accepts any names and shapes and puts everything on the first device.

    Raises FileNotFoundError if `path` holds no checkpoint, and ValueError if the parameters do not
    fit `abstract` or are damaged. Both messages have one line.
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
        paths, None if abstract is None else {"params": abstract}, convert
    )
    return state["params"]


def _absolute(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path).expanduser()
    return path if "://" in str(path) else path.absolute()


def _paths(steps: ocp.training.Checkpointer) -> list[epath.Path]:
    return [epath.Path(saved.path) for saved in reversed(steps.checkpoints)]


class _Damaged(Exception):
    pass


def _newest_good(paths: list[epath.Path], abstract, convert: Callable | None = None):
    """Loads the newest undamaged step: (path, state, extra, damaged steps), or None without paths.

    `paths` are sorted, newest first. With `convert`, the state is that of `restore_params`. Raises
    ValueError if all are damaged.
    """
    damaged = {}
    for path in paths:
        try:
            state, extra = _load(path, abstract, convert)
        except _Damaged as error:
            # Keep only the text: the error object would keep the loaded arrays in memory.
            damaged[int(path.name)] = str(error)
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


def _load(path: epath.Path, abstract, convert: Callable | None):
    """Loads and verifies one step: (tree, extra). Raises _Damaged, or ValueError for another model.

    With `convert`, the tree is {"params": ...}, read and converted leaf by leaf.
    """
    with _agreeing(path):
        record = _record(path)
        wanted = _wanted(path, record["leaves"], abstract, only_params=convert is not None)
    if convert is None:
        tree = _verified(path, wanted, record["leaves"], partial=False)
        return tree, record["extra"]
    leaves, structure = jax.tree_util.tree_flatten_with_path(wanted)
    kept = []
    for keys, leaf in leaves:
        name = leaf_name(keys)
        part = _verified(path, _nested({name: leaf}), record["leaves"], partial=True)
        kept.append(jax.block_until_ready(convert(name.partition("/")[2], *jax.tree.leaves(part))))
        del part
    return jax.tree.unflatten(structure, kept), record["extra"]


@contextlib.contextmanager
def _agreeing(path: epath.Path):
    """Raises _Damaged on all hosts if the block raises it on one.

    A host reads only its own shards, so a read may fail on one host alone. The hosts must agree:
    either all use this step, or all fall back.
    """
    failure = ""
    try:
        yield
    except _Damaged as error:
        failure = str(error)
    if not _all_have(int(path.name), not failure):
        raise _Damaged(failure or "another host cannot read it")


def _verified(path: epath.Path, wanted, saved: Mapping[str, list], partial: bool):
    """Reads arrays of one step and compares their hashes. Raises _Damaged."""
    with _agreeing(path):
        tree = _read(path, wanted, partial)
    found = describe(tree)
    changed = [name for name in found if found[name] != saved[name]]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise _Damaged(f"contents of {', '.join(changed[:3])}{more} are not what was saved")
    return tree


def _all_have(step: int, read: bool) -> bool:
    """Returns whether every host has read its part of a step.

    Step -1 means that no step is left. Raises ValueError if the hosts are at different steps.
    """
    found = multihost_utils.process_allgather(np.asarray([step, read], np.int32))
    if len(np.unique(found[:, 0])) > 1:
        raise ValueError(
            f"the hosts see different checkpoints (steps {found[:, 0].tolist()}, -1: none): "
            "start all again, with a --workdir on a shared file system or gs://"
        )
    return bool(found[:, 1].all())


def _wanted(path: epath.Path, saved: Mapping[str, list], abstract, only_params: bool):
    """Returns what is to be read: a tree of ShapeDtypeStruct with shardings and the saved types.

    abstract=None wants the saved names and shapes. Raises ValueError for another model.
    """
    if only_params:
        saved = {name: leaf for name, leaf in saved.items() if name.startswith("params/")}
    if abstract is None:
        abstract = _nested(
            {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape, _) in saved.items()}
        )
    _check_fits(path, saved, abstract, types_matter=not only_params)
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: _placed(leaf, saved[leaf_name(keys)][0]), abstract
    )


def _read(path: epath.Path, wanted, partial: bool):
    """Reads this host's shards of a step, or of the part of it that `wanted` has. Raises _Damaged.

    The hashes are not compared here.
    """
    context, host = ocp.Context(), jax.process_index()
    context.pytree.loading.partial_load = partial
    # If one host failed, the others would wait for it in Orbax's barriers. We therefore let each
    # host load as if it were alone.
    context.multiprocessing.active_processes = {host}
    context.multiprocessing.primary_host = host
    context.multiprocessing.barrier_sync_key_prefix = f"host{host}"
    try:
        with context:
            return ocp.load_checkpointables(path, {_ITEM: wanted})[_ITEM]
    # Orbax passes on any error of the layers below, often as a KeyError about its handlers.
    except Exception as error:
        raise _Damaged(f"files are missing or cut short ({_cause_of_damage(error)})") from error


def _record(path: epath.Path) -> dict:
    """Reads the record that `save` wrote: `extra`, and type, shape and hash of each leaf."""
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
    """Returns the first line of the innermost cause. Raises `error` if it is one of _NOT_DAMAGE."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, _NOT_DAMAGE):
            raise error
    return f"{type(causes[-1]).__name__}: {str(causes[-1])[:200]}".split("\n")[0]


def _check_fits(path: epath.Path, saved: Mapping[str, list], abstract, types_matter: bool):
    """Raises one ValueError that lists all differences between a checkpoint and `abstract`.

    Names and shapes are compared, and types if `types_matter`.
    """

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
