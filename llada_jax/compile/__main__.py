"""compile.__main__."""

import json
import sys

from absl import flags

from llada_jax.compile.step import compile_step, plan_for
from llada_jax.compile.summary import lines, report
from llada_jax.compile.target import topology


def main(argv):
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; settings are --config.name=value")
    try:
        devices, chip = topology(_TOPOLOGY.value, _SLICES.value)
        config = flags.FLAGS.config
        plan = plan_for(config, devices)
        compiled, seconds = compile_step(plan)
        found = report(plan, _TOPOLOGY.value, chip, compiled, seconds)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(json.dumps(found, indent=1) if _JSON.value else lines(found))


_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "GENERATION:AxB[xC] of one slice, e.g. v5p:2x2x4, v6e:4x4, v5e:8x8."
)
_SLICES = flags.DEFINE_integer(
    "slices", 1, "Slices of that topology, with the data-center network between them."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")
