"""Processes of one run on many hosts: join them, print on the first one, end with an error."""

import argparse
import importlib.util
import os
import pathlib
import re
import sys
import time

import jax
from absl import logging

_EXPLICIT = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `initialize`."""
    parser.add_argument("--coordinator_address", help="several processes: HOST:PORT of process 0")
    parser.add_argument("--num_processes", type=int, help="several processes: how many")
    parser.add_argument("--process_id", type=int, help="several processes: which one this is")


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
):
    """Joins this process to the others of the run. Call it before anything asks JAX for devices.

    An argument that is None is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or
    JAX_PROCESS_ID. If none of them is set, `jax.distributed.initialize` detects the processes from
    the platform (TPU pod, GKE, Slurm, Open MPI). A process without any of these runs alone.

    Raises ValueError if only some of the three values are given, or if they are invalid, and
    ConnectionError if the other processes cannot be reached.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    for name, variable in _EXPLICIT.items():
        if given[name] is None and (text := os.environ.get(variable)):
            given[name] = text if name == "coordinator_address" else _number(variable, text)
    _enough_threads()
    known = {name: value for name, value in given.items() if value is not None}
    if known and len(known) < len(given):
        missing = " and ".join(
            f"--{name} (or {_EXPLICIT[name]})" for name in given if name not in known
        )
        raise ValueError(
            f"{', '.join(f'{k}={v}' for k, v in known.items())} without {missing}:"
            " give all three or none"
        )
    if known:
        if not 0 <= given["process_id"] < given["num_processes"]:
            raise ValueError(
                f"process_id={given['process_id']} is not one of"
                f" num_processes={given['num_processes']}: count from 0"
            )
        if ":" not in given["coordinator_address"]:
            raise ValueError(
                f"coordinator_address={given['coordinator_address']} has no port: give HOST:PORT"
            )
        # Turn off detection: even inside a Slurm job, this process uses all devices of its host.
        known["cluster_detection_method"] = "deactivate"
    may_be_alone = not known and not _platform_has_many()
    if may_be_alone and not _may_be_in_pod():
        return
    try:
        _join(**known)
    except (ValueError, RuntimeError, OSError) as error:
        # OSError: there is no metadata server. The message: the server knows of no pod. If JAX has
        # a client (it keeps one even after a failure), a pod was found, but joining it failed.
        no_pod = isinstance(error, OSError) or "coordinator_address should be defined" in str(error)
        if may_be_alone and no_pod and not jax.distributed.is_initialized():
            logging.warning("No TPU pod found (%s); going on as one host.", error)
            return
        raise ConnectionError(
            f"this process could not join the others of the run ({' '.join(str(error).split())}):"
            " see whether each runs and reaches the coordinator, and start all again"
        ) from error


def _enough_threads():
    """Gives XLA's CPU client eight threads per virtual device, unless PJRT_NPROC is set.

    The default is max(cores, devices) threads. A thread that waits in a collective is blocked, and
    the tasks queued on it are not always stolen by idle threads, so with few threads the program
    can deadlock.
    """
    asked = re.findall(
        r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    devices = max(int(asked[-1]) if asked else 1, jax.config.jax_num_cpu_devices)
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(8 * devices))


def _join(**settings):
    # On CPU, collectives of several programs that run at once can deadlock across processes.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(**settings)


def check_joined():
    """Raises ValueError if JAX counts several processes that `initialize` did not join."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"{jax.process_count()} processes and no coordinator:"
            " pass --coordinator_address, --num_processes and --process_id"
        )


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name}={text} is no number: set it to one, or unset it")
    return int(text)


def _platform_has_many() -> bool:
    """Returns whether Slurm, Open MPI or GKE started several processes.

    It reads the environment variables that jax.distributed reads.
    """
    env = os.environ
    slurm = (
        "SLURM_STEP_NODELIST" in env
        and "SLURM_PROCID" in env
        and env.get("SLURM_NTASKS", "1") != "1"
    )
    mpi = "OMPI_MCA_orte_hnp_uri" in env and env.get("OMPI_COMM_WORLD_SIZE", "1") != "1"
    return (
        slurm or mpi or "," in _tpu_hosts() or env.get("MEGASCALE_NUM_SLICES", "1") not in ("", "1")
    )


def _tpu_hosts() -> str:
    return os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES", ""))


def _may_be_in_pod() -> bool:
    """Returns whether this is a TPU VM that may be a worker of a pod.

    Only a metadata server could tell.
    """
    if (
        "TPU_SKIP_MDS_QUERY" in os.environ
        or os.environ.get("JAX_PLATFORMS", "tpu").find("tpu") < 0
        or _tpu_hosts()
    ):
        return False
    devices = any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(
        pathlib.Path("/dev/vfio").glob("[0-9]*")
    )
    return devices and importlib.util.find_spec("libtpu") is not None


def is_first() -> bool:
    """Returns whether this is process 0, the one that prints and writes."""
    return jax.process_index() == 0


def say(text: str):
    """Prints text on the first process only."""
    if is_first():
        print(text, flush=True)


def fail(text: str, status: int = 1):
    """Prints an error message and ends this process.

    In a run of several processes it uses os._exit: at a normal exit JAX waits for the other
    processes, and these may be waiting for this one.
    """
    if not jax.distributed.is_initialized():
        print(text, file=sys.stderr, flush=True)
        sys.exit(status)
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Other processes with the same error now have time to report it. Otherwise they would report
    # that this process is gone.
    time.sleep(5)
    os._exit(status)
