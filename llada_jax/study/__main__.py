r"""Runs a study: python -m llada_jax.study FILE.py --out=DIR.

FILE.py has get_study(), which returns a Study: arms, seeds and metrics. The command trains what is
missing, one run after another. It leaves a table, study.json, curves.json, study.png and study.md
in DIR, anew after each run. The same command continues a study that was stopped. On several hosts,
run the same command on each. docs/study.md explains study files.
"""

import contextlib
import dataclasses
import operator
import shlex
import sys
from argparse import Namespace

import jax
from etils import epath

from llada_jax import cli
from llada_jax.parallel import hosts
from llada_jax.parallel.stop import Stop
from llada_jax.study import definition, report, summary
from llada_jax.study.definition import Study
from llada_jax.study.session import Session


def parser() -> cli.Parser:
    """Returns the parser of the command's flags."""
    parser = cli.Parser("study", __doc__)
    parser.add_argument("file", metavar="FILE.py", help="a file with get_study()")
    parser.add_argument("--out", required=True, help="folder of the runs and of what they show")
    parser.add_argument("--report", action="store_true", help="train nothing; write the reports")
    parser.add_argument("--seeds", help="other seeds than the file's, as 5,6,7")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a key of the config for all runs that do not set it themselves; may be repeated",
    )
    hosts.add_flags(parser)
    return parser


def main(args: Namespace) -> int:
    """Runs the command; returns the exit status."""
    study = _changed(definition.load(args.file), args)
    hosts.initialize(args.coordinator_address, args.num_processes, args.process_id)
    out = epath.Path(args.out).expanduser().absolute()
    session = Session(study, out)
    command = f"python -m llada_jax.study {shlex.join(sys.argv[1:])}"
    status = 0
    if not args.report:
        hosts.say(f"{study.title}: {session.total} runs take {study.takes}")
        stop = Stop()
        try:
            with _compiled_once(out / "compiled"):
                status = session.to_the_end(stop, lambda: report.write(session, out, command))
        finally:
            stop.restore()
    report.write(session, out, command)
    hosts.say(f"\n{report.tables(session, summary.rows(session))}\nsee {out / 'study.md'}")
    return status


def _changed(study: Study, args: Namespace) -> Study:
    """The study with the changes of --seeds and --set."""
    if args.seeds is not None:
        try:
            seeds = [int(seed) for seed in args.seeds.split(",")]
        except ValueError:
            raise ValueError(f"--seeds={args.seeds}: give integers with commas between") from None
        study = dataclasses.replace(study, seeds=seeds)
    for word in args.set:
        name = word.partition("=")[0]
        config = cli.read_config([f"--config={study.base}", f"--config.{word}"])
        value = operator.attrgetter(name)(config)
        study = dataclasses.replace(study, overrides={**study.overrides, name: value})
    return study


@contextlib.contextmanager
def _compiled_once(folder: epath.Path):
    """Context in which JAX keeps compiled programs in a folder, and reads them there."""
    if jax.config.jax_compilation_cache_dir:  # the caller has one
        yield
        return
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


if __name__ == "__main__":
    sys.exit(cli.run(main, parser()))
