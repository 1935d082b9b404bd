#!/usr/bin/env python3
r"""Runs a command as several processes on this machine, each with virtual CPU devices.

This imitates the hosts of a pod:

    python launch/local_cluster.py --processes=2 --devices=4 -- \
        python -m llada_jax.train --config=configs/vrpo_sudoku.py --workdir=runs/two_hosts

Every process gets its place in the run from the environment variables JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID. Its output is shown with its number in front. SIGTERM and
SIGINT are passed on to all processes. If a process fails, its last lines are shown, the other
processes are ended after --grace seconds, and the exit status is that of the failed process
(128 + signal, if a signal ended it).
"""

import argparse
import collections
import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

LAST_LINES = 20


class Process:
    """One process of the cluster, in its own process group, and a thread that shows its output."""

    def __init__(
        self, index: int, command: list[str], env: dict[str, str], log: pathlib.Path | None, lock
    ):
        self.index, self._log, self._lock = index, log, lock
        self.last: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self._process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with self._log.open("w") if self._log else contextlib.nullcontext() as log:
            for line in self._process.stdout:
                if "Gloo] Rank" in line:  # Gloo announces every connection
                    continue
                self.last.append(line)
                if log:
                    log.write(line)
                    log.flush()
                with self._lock:
                    print(
                        f"[{self.index}] {line}",
                        end="" if line.endswith("\n") else "\n",
                        flush=True,
                    )

    def poll(self) -> int | None:
        """Returns the exit status, or None while the process runs."""
        return self._process.poll()

    def send(self, number: int):
        """Sends a signal to the process; SIGKILL goes to its whole process group."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            elif self.poll() is None:
                os.kill(self._process.pid, number)

    def drain(self):
        """Waits until the output of an ended process is shown.

        It waits at most 2 seconds: a child of the process may keep the pipe open.
        """
        self._reader.join(timeout=2)


def free_port() -> int:
    """Returns a free TCP port of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(index: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """Returns the environment variables of process `index`."""
    flags = re.sub(
        r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")
    )
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }


def run(
    command: list[str], processes: int, devices: int, logs: pathlib.Path | None, grace: float
) -> int:
    """Runs all processes to the end. Returns the exit status of the first that failed, or 0."""
    port, lock = free_port(), threading.Lock()
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    started: list[Process] = []

    def pass_on(number, frame):
        for process in started:
            process.send(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    first, since = None, 0.0  # the process that failed first, and when
    try:
        for i in range(processes):
            log = logs / f"process{i}.log" if logs else None
            started.append(Process(i, command, environment(i, processes, devices, port), log, lock))
        while any(process.poll() is None for process in started):
            if first is None and (failed := [process for process in started if process.poll()]):
                # If several failed, prefer one that a signal ended (status below 0). The others may
                # only report that it is gone.
                first, since = min(failed, key=lambda process: process.poll()), time.monotonic()
            if first is not None and time.monotonic() - since > grace:
                break
            time.sleep(0.05)
    finally:
        left = [process.index for process in started if process.poll() is None]
        for process in started:
            process.send(signal.SIGKILL)
    for process in started:
        process.drain()
    if first is None:
        first = next((process for process in started if process.poll()), None)
    if first is None:
        return 0
    status = first.poll()
    status = 128 - status if status < 0 else status
    with lock:
        print(f"process {first.index} ended with status {status}; its last lines:", file=sys.stderr)
        sys.stderr.writelines(f"    {line.rstrip()}\n" for line in first.last)
        if left:
            print(f"ended after {grace:g} seconds: processes {left}", file=sys.stderr)
    return status


def main() -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="how many (default: 2)")
    parser.add_argument(
        "--devices", type=int, default=4, help="virtual CPU devices of each (default: 4)"
    )
    parser.add_argument(
        "--logs", type=pathlib.Path, help="also write the lines to LOGS/process<i>.log"
    )
    parser.add_argument(
        "--grace", type=float, default=15, help="seconds that the others have when one fails"
    )
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="what each process runs")
    args = parser.parse_args()
    for name in ("processes", "devices"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)} must be at least 1")
    try:
        return run(args.command, args.processes, args.devices, args.logs, args.grace)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
