"""Time and memory of what can be measured here, as lines and as JSON (`--out=FILE`).

python -m llada_jax.benchmark step --config=FILE [--config.x=y]     the step that train.py runs, on the devices here
python -m llada_jax.benchmark torch --config=FILE [--config.x=y]    and its ratio to a plain PyTorch loop (CPU)
python -m llada_jax.benchmark load                                  reading a checkpoint with 8B's layout (--help)

Without data.train the rows are synthetic, of the config's shape; without init_from the parameters are random.
"""

import json
import pathlib
import sys
import tempfile

from absl import app, flags, logging

from llada_jax import cli
from llada_jax.benchmark import load, step, torch_loop
from llada_jax.parallel import hosts


def main(argv):
    try:
        if len(argv) != 2 or argv[1] not in ("step", "torch"):
            raise ValueError(
                f"{' '.join(argv[1:]) or 'no benchmark'}: say one of step, torch, load; --help says more"
            )
        if flags.FLAGS.config is None:
            raise ValueError("--config is missing: give a file of configs/")
        hosts.initialize()
        config, count = flags.FLAGS.config, _STEPS.value
        if count < 1:
            raise ValueError(f"--steps={count}: at least one step is timed")
        with tempfile.TemporaryDirectory() as folder:
            workdir = _WORKDIR.value or folder
            if argv[1] == "step":
                result = step.run(config, workdir, count, _PROFILE.value)
            else:
                try:
                    from llada_jax.benchmark import torch_loop  # the one that needs PyTorch
                except ModuleNotFoundError as error:
                    raise ImportError(
                        "PyTorch is missing: pip install -e '.[benchmark]'"
                    ) from error
                result = torch_loop.run(config, workdir, count)
        if _OUT.value and hosts.is_first():
            pathlib.Path(_OUT.value).write_text(json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Where packed rows of data.train go; empty: nowhere that stays."
)
_STEPS = flags.DEFINE_integer("steps", 10, "Steps to time, after two that are not.")
_PROFILE = flags.DEFINE_string("profile", "", "Folder for a JAX profiler trace of three steps.")
_OUT = flags.DEFINE_string("out", "", "JSON file to write.")

if __name__ == "__main__":
    if sys.argv[1:2] == ["load"]:
        sys.exit(load.run(sys.argv[2:]))
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=cli.parse_flags)
