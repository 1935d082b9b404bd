"""Stops all hosts together: a signal to one host stops all of them at the same step."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Stopped(Exception):
    """Raised on all hosts when the run was asked to stop."""


class Stop:
    """Handles SIGTERM and SIGINT: a signal to any host asks all hosts to stop at the same step.

    A second signal ends the process that receives it at once.
    """

    def __init__(self):
        self.asked = False
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        self._answer = None
        if jax.process_count() > 1:
            mesh = Mesh(np.asarray(jax.devices()), ("device",))
            self._split = NamedSharding(mesh, PartitionSpec("device"))
            self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def _ask(self, number, frame):
        self.asked = True
        self.restore()

    def restore(self):
        """Puts the earlier signal handlers back."""
        for number, handler in self._before.items():
            # None means a handler that was not set from Python, such as that of jax.distributed.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def agreed(self) -> bool:
        """Returns whether to stop now. All hosts get the same answer if they call equally often.

        With several hosts, a call starts a reduction over all devices, which runs after the work
        already dispatched, and returns the result of the reduction of the previous call. The
        devices therefore never wait for the answer.
        """
        if jax.process_count() == 1:
            return self.asked
        answer, mine = self._answer, np.full(jax.local_device_count(), self.asked)
        self._answer = self._any(jax.make_array_from_process_local_data(self._split, mine))
        return answer is not None and bool(answer)

    def check(self):
        """Raises Stopped if `agreed` returns True."""
        if self.agreed():
            raise Stopped
