"""How processes find each other: flags, environment, platform; what is incomplete is refused."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from llada_jax.parallel import hosts

CLEAN = [
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "OMPI_MCA_orte_hnp_uri",
    "OMPI_COMM_WORLD_SIZE",
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_NUM_SLICES",
]


@pytest.fixture
def called(monkeypatch):
    """What each call gives to jax.distributed.initialize; the environment is empty at first."""
    for name in CLEAN:
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(hosts, "_join", lambda **settings: calls.append(settings))
    return calls


@pytest.mark.parametrize(
    "flags, set_before, threads",
    [
        (
            "--xla_force_host_platform_device_count=2 --xla_force_host_platform_device_count=4",
            None,
            "32",
        ),
        ("--xla_force_host_platform_device_count=4", "5", "5"),
        ("--xla_force_host_platform_device_count=1", None, None),
        ("", None, None),
    ],
)
def test_virtual_devices_get_threads_enough(called, monkeypatch, flags, set_before, threads):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("PJRT_NPROC", set_before or "")
    if set_before is None:
        monkeypatch.delenv("PJRT_NPROC")
    hosts.initialize()
    assert os.environ.get("PJRT_NPROC") == threads


EXPLICIT = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}


def test_one_process_alone_joins_nothing(called):
    hosts.initialize()
    assert called == []


def test_flags_go_before_the_environment(called, monkeypatch):
    hosts.initialize(**EXPLICIT)
    for name, value in (
        ("COORDINATOR_ADDRESS", "b:2"),
        ("NUM_PROCESSES", "4"),
        ("PROCESS_ID", "0"),
    ):
        monkeypatch.setenv(f"JAX_{name}", value)
    hosts.initialize()
    hosts.initialize(process_id=3)
    from_environment = {"coordinator_address": "b:2", "num_processes": 4, "process_id": 0}
    expected = [EXPLICIT, from_environment, from_environment | {"process_id": 3}]
    assert called == [each | {"cluster_detection_method": "deactivate"} for each in expected]


@pytest.mark.parametrize(
    "environment, joins",
    [
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, True),
        # In the batch script itself, not under srun.
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1", "OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_what_the_platform_offers(called, monkeypatch, environment, joins):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.initialize()
    assert called == ([{}] if joins else [])


@pytest.fixture
def tpu_vm(called, monkeypatch):
    """As `called`, on a machine with TPU chips."""
    for name in ("TPU_SKIP_MDS_QUERY", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pathlib.Path, "glob", lambda *_: iter(["accel0"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return called


@pytest.mark.parametrize(
    "environment, joins",
    [
        ({}, True),
        # As Kaggle sets them.
        ({"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_SKIP_MDS_QUERY": "1"}, False),
        ({"JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_a_tpu_vm_may_be_in_a_pod(tpu_vm, monkeypatch, environment, joins):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.initialize()
    assert tpu_vm == ([{}] if joins else [])


NO_POD = ValueError("coordinator_address should be defined.")
# A subclass of OSError, as the errors of requests are.
NO_SERVER = ConnectionError("metadata.google.internal: name not known")


def joining_raises(monkeypatch, error, connected=False):
    def join(**settings):
        raise error

    monkeypatch.setattr(hosts, "_join", join)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: connected)


@pytest.mark.parametrize("error", [NO_POD, NO_SERVER])
def test_a_tpu_vm_without_a_pod_goes_on_as_one_host(tpu_vm, monkeypatch, caplog, error):
    joining_raises(monkeypatch, error)
    hosts.initialize()
    assert f"No TPU pod found ({error}); going on as one host." in caplog.text


@pytest.mark.parametrize(
    "error, connected, environment",
    [
        (RuntimeError("Failed to recognize coordinator address t1v-w-0"), False, {}),
        (
            jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: RegisterTask"),
            True,
            {},
        ),
        (ValueError("unsupported worker-network-endpoints format: a:b"), False, {}),
        (NO_POD, True, {}),
        (NO_SERVER, True, {}),
        (NO_POD, False, {"TPU_WORKER_HOSTNAMES": "a,b"}),
        (
            NO_SERVER,
            False,
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        ),
    ],
)
def test_a_join_that_failed_is_one_line(tpu_vm, monkeypatch, error, connected, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    joining_raises(monkeypatch, error, connected)
    with pytest.raises(
        ConnectionError, match="could not join the others of the run .*, and start all again"
    ) as e:
        hosts.initialize()
    assert " ".join(str(error).split()) in str(e.value) and "\n" not in str(e.value)


def test_jax_itself_finds_no_pod_here():
    code = (
        "from llada_jax.parallel import hosts\n"
        "hosts._may_be_in_pod = lambda: True\n"
        "hosts.initialize()\n"
        "print('alone')"
    )
    environment = {name: value for name, value in os.environ.items() if name not in CLEAN}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "alone\n" and "No TPU pod found" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "given, environment, message",
    [
        (
            {"num_processes": 2},
            {},
            r"num_processes=2 without --coordinator_address \(or JAX_COORDINATOR_ADDRESS\) and",
        ),
        ({}, {"JAX_PROCESS_ID": "0"}, "process_id=0 without --coordinator_address"),
        ({}, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two is no number"),
        (
            EXPLICIT | {"process_id": 2},
            {},
            "process_id=2 is not one of num_processes=2: count from 0",
        ),
        (
            EXPLICIT | {"coordinator_address": "host"},
            {},
            "coordinator_address=host has no port: give HOST:PORT",
        ),
    ],
)
def test_what_is_incomplete_is_one_line(called, monkeypatch, given, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as e:
        hosts.initialize(**given)
    assert called == [] and "\n" not in str(e.value)


def test_processes_that_nobody_joined_are_one_line(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(
        ValueError, match="4 processes and no coordinator: pass --coordinator_address"
    ):
        hosts.check_joined()
