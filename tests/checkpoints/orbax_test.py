"""Checkpoints: exact on any mesh, verified, falling back past damage but not past another model."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from llada_jax.checkpoints import hashing, orbax
from llada_jax.checkpoints.orbax import Checkpoints

# Some tests start processes that import this file.
IMPORTABLE = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any


def one_device():
    return lambda leaf: SingleDeviceSharding(jax.devices()[0])


def on_mesh(*shape):
    mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("data", "fsdp"))
    return lambda leaf: NamedSharding(mesh, P("fsdp") if leaf.ndim else P())


def make_state(seed=0, width=64):
    rng = np.random.default_rng(seed)
    return State(
        step=np.int32(seed),
        params={
            "wte": {"embedding": jnp.asarray(rng.normal(size=(128, width)), jnp.bfloat16)},
            "blocks": {"kernel": rng.normal(size=(8, 32, width)).astype(np.float32)},
        },
        # Uniform bits do not compress, so that a test finds them in the files.
        opt_state=({"nu": rng.integers(0, 2**32, (512, width), np.uint32)}, None),
    )


def place(state, shardings):
    return jax.tree.map(lambda leaf: jax.device_put(leaf, shardings(leaf)), state)


def abstract(state, shardings):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings(x)), state
    )


def assert_same_bits(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(one), np.asarray(other)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def save_steps(directory, *steps):
    with Checkpoints(directory) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"next_index": step})


def file_with(step_directory, array) -> tuple[pathlib.Path, int]:
    """The file of a checkpoint that holds the (incompressible) bytes of an array, and where."""
    needle = np.asarray(array).tobytes()[1024:1056]
    for path in sorted(pathlib.Path(step_directory).rglob("*")):
        if path.is_file() and (at := path.read_bytes().find(needle)) >= 0:
            return path, at
    raise AssertionError("not in any file")


def flip_bit(step_directory, step):
    path, at = file_with(step_directory, make_state(step).opt_state[0]["nu"])
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def truncate(step_directory, step):
    path, at = file_with(step_directory, make_state(step).opt_state[0]["nu"])
    path.write_bytes(path.read_bytes()[:at])


def lose_arrays(step_directory, step):
    for path in (step_directory / "state").rglob("*"):
        if path.is_file():
            path.unlink()


def spoil_record(step_directory, step):
    path = step_directory / "_CHECKPOINT_METADATA"
    text = path.read_text()
    assert f'"next_index": {step}' in text
    path.write_text(text.replace(f'"next_index": {step}', '"next_index": 99'))


def tear_record(step_directory, step):
    path = step_directory / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text()[:-40])


DAMAGES = [flip_bit, truncate, lose_arrays, spoil_record, tear_record]


def test_fingerprint_does_not_depend_on_placement():
    state = make_state()
    prints = {
        hashing.fingerprint(place(state, s)) for s in (one_device(), on_mesh(1, 8), on_mesh(4, 2))
    }
    assert prints == {hashing.fingerprint(state)}


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int32, jnp.int8, jnp.bool_]
)
def test_fingerprint_sees_every_change(dtype):
    values = jnp.asarray(np.random.default_rng(0).integers(0, 2, (4, 6)), dtype)
    values = values.at[:2, :2].set(jnp.asarray([[0, 1], [0, 1]], dtype))
    tree = {"a": values, "b": values.T.reshape(4, 6)}
    changed = [
        {"a": values.at[0, 0].set(jnp.asarray(1, dtype)), "b": tree["b"]},
        # Two elements swapped, in a row and across the diagonal.
        {"a": values.at[0, :2].set(values[0, 1::-1]), "b": tree["b"]},
        {"a": values.at[:2, :2].set(values[:2, :2].T), "b": tree["b"]},
        {"a": tree["b"], "b": tree["a"]},
        {"a": tree["a"].reshape(6, 4), "b": tree["b"]},
        {"a": tree["a"], "c": tree["b"]},
        {"a": tree["a"].astype(jnp.float16), "b": tree["b"]},
    ]
    assert len({hashing.fingerprint(t) for t in [tree, *changed]}) == 8
    if dtype == jnp.float32:  # minus zero and the quiet bit of a nan are bits like any other
        assert hashing.fingerprint({"a": jnp.zeros(3)}) != hashing.fingerprint({"a": -jnp.zeros(3)})


@pytest.mark.parametrize(
    "before, after", [((1, 8), None), (None, (1, 8)), ((2, 4), (4, 2)), ((1, 8), (1, 2))]
)
def test_restores_exactly_onto_another_mesh(tmp_path, before, after):
    before, after = (on_mesh(*shape) if shape else one_device() for shape in (before, after))
    state, extra = (
        make_state(3),
        {"next_index": 7, "seed": 0, "config": {"lr": 5e-7, "name": "x", "none": None}},
    )
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert (
            checkpoints.restore(abstract(state, after)) is None
            and checkpoints.latest_step() is None
        )
        checkpoints.save(3, place(state, before), extra)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        found, found_extra = checkpoints.restore(abstract(state, after))
        assert checkpoints.latest_step() == 3
    assert_same_bits(found, state)
    assert found_extra == extra
    assert all(leaf.sharding == after(leaf) for leaf in jax.tree.leaves(found))


def test_a_save_survives_donation(tmp_path):
    state = place(make_state(1, width=2048), on_mesh(1, 8))
    wanted = jax.tree.map(np.array, state)
    step = jax.jit(
        lambda state: jax.tree.map(lambda x: x + x.dtype.type(1), state), donate_argnums=0
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
        found, _ = checkpoints.restore(abstract(wanted, one_device()))
    assert_same_bits(found, wanted)


def test_keeps_the_newest_steps(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        # To save the current step again does nothing: the last step of a run may be due twice.
        for step in (1, 2, 3, 3):
            checkpoints.save(step, make_state(step), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="3 exists already"):
        checkpoints.save(3, make_state(4), {})
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_falls_back_to_the_step_before(tmp_path, damage, caplog):
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path / "3", 3)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        caplog.clear()
        state, extra = checkpoints.restore(abstract(make_state(), on_mesh(1, 8)))
        assert_same_bits(state, make_state(2))
        assert extra == {"next_index": 2} and checkpoints.latest_step() == 2
        warnings = [r.getMessage() for r in caplog.records if "Damaged" in r.getMessage()]
        assert (
            len(warnings) == 1
            and "step 3: " in warnings[0]
            and "going on from step 2" in warnings[0]
        )
        assert "\n" not in warnings[0]
        # The run reaches the damaged step again.
        checkpoints.save(3, make_state(33), {"next_index": 33})
    with Checkpoints(tmp_path) as checkpoints:
        state, extra = checkpoints.restore(abstract(make_state(), on_mesh(1, 8)))
    assert_same_bits(state, make_state(33))
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_all_damaged_is_one_error(tmp_path):
    save_steps(tmp_path, 1, 2)
    flip_bit(tmp_path / "1", 1)
    truncate(tmp_path / "2", 2)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError) as error:
        checkpoints.restore(abstract(make_state(), one_device()))
    message = str(error.value)
    assert "every checkpoint" in message and "step 1: contents of opt_state/0/nu are not" in message
    assert (
        "step 2: files are missing or cut short" in message
        and "--workdir" in message
        and "\n" not in message
    )


def test_another_model_is_an_error_and_no_reason_to_fall_back(tmp_path):
    save_steps(tmp_path, 1, 2)
    wanted = make_state(width=32)
    wanted.params["lora"] = np.zeros(3, np.float32)
    wanted = wanted.replace(step=np.float32(0))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError) as error:
        checkpoints.restore(abstract(wanted, one_device()))
    message = str(error.value)
    assert "\n" not in message and f"{tmp_path}/2 " in message and "--workdir" in message
    for part in (
        "step is int32[] there, float32[] here",
        "params/blocks/kernel is float32[8, 32, 64] there, float32[8, 32, 32] here",
        "; and 1 more",
    ):
        assert part in message
    with pytest.raises(ValueError, match="params/lora is absent there, .3. here"):
        orbax.restore_params(tmp_path / "2", abstract=abstract(wanted, one_device()).params)


def test_a_killed_save_leaves_the_last_step(tmp_path):
    code = """if True:
        import os, signal, sys
        from tests.checkpoints.orbax_test import Checkpoints, make_state
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, make_state(1), {"next_index": 1})
        checkpoints.wait()
        checkpoints.save(2, make_state(2, width=8192), {"next_index": 2})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, **IMPORTABLE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path for path in tmp_path.iterdir() if path.name.startswith("2.")], (
        "the kill came too late to test anything"
    )
    with Checkpoints(tmp_path) as checkpoints:
        state, extra = checkpoints.restore(abstract(make_state(), one_device()))
    assert_same_bits(state, make_state(1))
    assert extra == {"next_index": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_restore_params_of_a_workdir_or_a_step(tmp_path, monkeypatch):
    save_steps(tmp_path / "checkpoints", 1, 2, 3)
    flip_bit(tmp_path / "checkpoints" / "3", 3)  # in the optimiser's state, which is not read
    assert_same_bits(orbax.restore_params(tmp_path), make_state(3).params)
    sharded = abstract(make_state().params, on_mesh(2, 4))
    found = orbax.restore_params(
        tmp_path / "checkpoints" / "2", lambda name, leaf: leaf.astype(jnp.float32), sharded
    )
    assert_same_bits(
        found, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), make_state(2).params)
    )
    assert all(leaf.sharding == on_mesh(2, 4)(leaf) for leaf in jax.tree.leaves(found))
    lose_arrays(tmp_path / "checkpoints" / "3", 3)
    assert_same_bits(orbax.restore_params(tmp_path), make_state(2).params)
    monkeypatch.chdir(tmp_path)
    assert_same_bits(orbax.restore_params("checkpoints/1"), make_state(1).params)
    for path in ("nowhere", "checkpoints/9", "checkpoints"):
        with pytest.raises(FileNotFoundError, match=f"{path} holds no checkpoint; give a workdir"):
            orbax.restore_params(path)


@pytest.mark.slow
def test_hosts_fall_back_together(tmp_path):
    code = """if True:
        import sys
        import jax, numpy as np
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from tests.checkpoints.orbax_test import abstract, hashing, make_state, orbax
        sharding = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P("fsdp"))
        def state(step):
            return {"params": make_state(step).opt_state}
        def part(x):
            return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
        record, lost = orbax._record, sys.argv[4:] == [sys.argv[2]]
        def reading(path):
            if lost and path.name == "2":
                raise orbax._Damaged("no record of its contents can be read")
            return record(path)
        orbax._record = reading
        with orbax.Checkpoints(sys.argv[3]) as checkpoints:
            found = checkpoints.restore(abstract(state(0), lambda leaf: sharding))
            for step in (1, 2) if found is None else ():
                parts = jax.tree.map(part, state(step))
                checkpoints.save(step, parts, {"next_index": step})
        if found:
            same = hashing.fingerprint(found[0]) == hashing.fingerprint(state(1))
            print("restored", found[1], same)
    """

    def run_two(*more):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        commands = [
            [sys.executable, "-c", code, address, str(host), str(tmp_path), *more]
            for host in (0, 1)
        ]
        environment = {**os.environ, **IMPORTABLE, "XLA_FLAGS": ""}  # one device a host
        hosts = [
            subprocess.Popen(
                c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for c in commands
        ]
        try:
            outputs = [host.communicate(timeout=100) for host in hosts]
        finally:
            for host in hosts:
                host.kill()  # a host that waits for the other in a barrier ignores SIGTERM
        assert [host.returncode for host in hosts] == [0, 0], outputs
        return [out for out, _ in outputs]

    run_two()
    one = "restored {'next_index': 1} True"
    assert all(one in out for out in run_two("1"))  # the second host alone cannot read the record
    # The shard of the second host.
    path, _ = file_with(tmp_path / "2", make_state(2).opt_state[0]["nu"][256:])
    path.write_bytes(path.read_bytes()[:5000])
    assert all(one in out for out in run_two())


@pytest.mark.parametrize(
    "saved, others, shown", [((1,), 2, "1, 2"), ((), 1, "-1, 1"), ((1,), -1, "1, -1")]
)
def test_hosts_that_see_different_steps_are_one_error(tmp_path, monkeypatch, saved, others, shown):
    save_steps(tmp_path, *saved)
    monkeypatch.setattr(
        orbax.multihost_utils, "process_allgather", lambda mine: np.stack([mine, [others, 1]])
    )
    message = rf"the hosts see different checkpoints \(steps \[{shown}\].*--workdir"
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=message) as error:
        checkpoints.restore(abstract(make_state(), one_device()))
    assert "\n" not in str(error.value)
