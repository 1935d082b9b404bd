"""What all commands share: flags, errors in one line, exit statuses."""

import os
import traceback

from absl import app

from llada_jax.parallel import hosts as hosts_lib


def parse_flags(argv):
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError, OSError, ImportError, ValueError) as error:
        # What ml_collections lets through of a wrong key or a wrong file.
        fail(error)


def fail(error: BaseException):
    """Ends with the error in one line, or, under LLADA_JAX_TRACEBACK=1, with all of it."""
    if os.environ.get("LLADA_JAX_TRACEBACK"):
        hosts_lib.fail("".join(traceback.format_exception(error)))
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = f"the config has no key {error.args[0]}" if isinstance(error, KeyError) else error
    hosts_lib.fail(f"error: {' '.join(str(text).split())}")
