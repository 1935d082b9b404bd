"""Stopping together: a signal to one host stops all of them at the same step."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Stopped(Exception):
    """The run was asked to stop, on all hosts."""


class Stop:
    """SIGTERM and SIGINT, to any host, ask all to stop at the same point; a second one ends that process at once."""

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
        for number, handler in self._before.items():
            # None: it was not set from Python, as the one that jax.distributed installs.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def agreed(self) -> bool:
        """Whether to stop here: the same answer on all hosts, if all ask equally often.

        Among several, the question goes out behind the work under way and is read when this is called the next time:
        the devices never wait for it.
        """
        if jax.process_count() == 1:
            return self.asked
        answer, mine = self._answer, np.full(jax.local_device_count(), self.asked)
        self._answer = self._any(jax.make_array_from_process_local_data(self._split, mine))
        return answer is not None and bool(answer)

    def check(self):
        """Raises Stopped where `agreed` says so."""
        if self.agreed():
            raise Stopped
