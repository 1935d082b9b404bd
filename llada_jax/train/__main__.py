"""python -m llada_jax.train --config=FILE [--config.x=y] --workdir=DIR [--dry_run]"""

import sys
import traceback

from absl import flags

from llada_jax.cli import fail
from llada_jax.parallel import hosts as hosts_lib
from llada_jax.train.experiment import make_plan
from llada_jax.train.loop import train
from llada_jax.train.summary import describe


def main(argv):
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}; settings are --config.name=value")
    try:
        given = flags.FLAGS
        hosts_lib.initialize(given.coordinator_address, given.num_processes, given.process_id)
        given.config.lock()
        plan = make_plan(given.config, given.workdir, dry_run=given.dry_run)
        hosts_lib.say(describe(plan))
        if given.dry_run:
            return
        status = train(plan)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        fail(error)
    except Exception:
        hosts_lib.fail(traceback.format_exc())
    sys.exit(status)
