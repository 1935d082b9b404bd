"""Many hosts as one: starting jax.distributed, one voice, one error for all."""

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


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
):
    """Joins this process to the others of the run, before anything asks JAX for its devices.

    What is None is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; where those are not set
    either, from the platform (TPU pod, GKE, Slurm, Open MPI), as `jax.distributed.initialize` finds it. One process
    with nothing of it stays alone. ValueError where one of the three is given and another is not, ConnectionError where
    the others are not reached.
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
            f"{', '.join(f'{k}={v}' for k, v in known.items())} without {missing}: give all three or none"
        )
    if known:
        if not 0 <= given["process_id"] < given["num_processes"]:
            raise ValueError(
                f"process_id={given['process_id']} is not one of num_processes={given['num_processes']}: count from 0"
            )
        if ":" not in given["coordinator_address"]:
            raise ValueError(
                f"coordinator_address={given['coordinator_address']} has no port: give HOST:PORT"
            )
        # Every device of the host belongs to this process; a Slurm job around it is not asked.
        known["cluster_detection_method"] = "deactivate"
    may_be_alone = not known and not _platform_has_many()
    if may_be_alone and not _may_be_in_pod():
        return
    try:
        _join(**known)
    except (ValueError, RuntimeError, OSError) as error:
        # Where no metadata server is found, and where it knows of no pod. JAX keeps its client even if that failed.
        no_pod = isinstance(error, OSError) or "coordinator_address should be defined" in str(error)
        if may_be_alone and no_pod and not jax.distributed.is_initialized():
            logging.warning("No TPU pod found (%s); going on as one host.", error)
            return
        raise ConnectionError(
            f"this process could not join the others of the run ({' '.join(str(error).split())}): see whether each "
            "runs and reaches the coordinator, and start all again"
        ) from error


def _enough_threads():
    """Gives XLA's CPU client eight threads a virtual device, unless PJRT_NPROC says how many.

    By default it has one a core, or one a device where these are more. A collective blocks the thread it waits in, and
    work that such a thread had queued is not always taken up by an idle one: with few threads, all wait for ever.
    """
    asked = re.findall(
        r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    devices = max(int(asked[-1]) if asked else 1, jax.config.jax_num_cpu_devices)
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(8 * devices))


def _join(**settings):
    # On CPU, collectives of several programs under way at once can wait for each other across processes.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(**settings)


def check_joined():
    """ValueError where JAX counts several processes that `initialize` did not join."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"{jax.process_count()} processes and no coordinator: pass --coordinator_address, --num_processes and "
            "--process_id"
        )


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name}={text} is no number: set it to one, or unset it")
    return int(text)


def _platform_has_many() -> bool:
    """Whether Slurm, Open MPI or GKE started several processes, by what jax.distributed looks at."""
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
    """Whether this is a TPU VM that only a metadata server can tell from the worker of a pod."""
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
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def say(text: str):
    """Prints a line, on the first process only."""
    if is_first():
        print(text, flush=True)


def fail(text: str, status: int = 1):
    """Ends this process with a line and status 1.

    One of several does not end in the ordinary way, where JAX would wait for the others, which may be waiting for it.
    """
    if not jax.distributed.is_initialized():
        print(text, file=sys.stderr, flush=True)
        sys.exit(status)
    print(text, file=sys.stderr, flush=True)
    sys.stdout.flush()
    time.sleep(
        5
    )  # those with the same error can say so, instead of complaining that this one is gone
    os._exit(status)
