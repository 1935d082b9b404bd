"""What all commands share: flags, one-line errors and exit statuses.

A command module has `parser()`, which returns a `Parser`, and `main(args)`, which does the work and
returns an exit status (None means 0). It ends with `sys.exit(cli.run(main, parser()))`.
"""

import argparse
import difflib
import functools
import operator
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from llada_jax.parallel import hosts

USAGE, INTERRUPTED = 2, 130  # exit statuses; any other error is 1
# Errors that a user can fix are shown in one line. Any other error is a bug: show its traceback.
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)


class Parser(argparse.ArgumentParser):
    """The flags of one command. It reports an error in one line."""

    def __init__(self, command: str = "", doc: str = "", **settings: Any):
        # `settings` are argparse's own, for the parser of a subcommand.
        super().__init__(
            **{
                "prog": f"python -m llada_jax.{command}",
                "description": doc,
                "formatter_class": argparse.RawDescriptionHelpFormatter,
                "allow_abbrev": False,
                **settings,
            }
        )
        self.default_command = ""  # the subcommand of a command line that begins with a flag
        self.keys: Callable[[Any], str] | None = None
        self._takers: list[argparse.ArgumentParser] = []

    def take_config(self, keys: Callable[[Any], str], *subcommands: argparse.ArgumentParser):
        """Adds --config=FILE and --config.NAME=VALUE to the command, or to `subcommands` only.

        `keys(config)` returns the description of the keys for --help. It gets None if the command
        line names no config.
        """
        self.keys, self._takers = keys, list(subcommands or (self,))
        for taker in self._takers:
            taker.add_argument(
                "--config", metavar="FILE[:WORD]", required=True, help="a file with get_config()"
            )
            taker.add_argument("--config.NAME", metavar="VALUE", help="another value of a key")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses a command line; see the function `parse`."""
        if self.default_command and argv and argv[0].startswith("--") and argv[0] != "--help":
            argv = [self.default_command, *argv]
        if self.keys is None:
            return self.parse_args(argv)
        of_config, others = _split(argv)
        config = None
        try:
            if of_config:
                config = read_config(of_config)
        except (Exception, flags.Error) as error:  # whatever a config file or ml_collections raises
            _show(error)
            self.error(_text(error))
        if {"-h", "--help"} & set(others):
            for taker in self._takers:
                taker.epilog = self.keys(config)
        args = self.parse_args(others)
        args.config = config
        return args

    def error(self, message: str):
        """Prints the message in one line and ends the process with status 2."""
        self.exit(USAGE, f"error: {one_line(message)}; --help says more\n")


def parse(parser: Parser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line; `config` is a locked ConfigDict if the command takes one.

    If a flag or a config key does not exist, it prints one line and ends the process with status 2.
    """
    return parser.parse(list(sys.argv[1:] if argv is None else argv))


def run(
    main: Callable[[argparse.Namespace], int | None],
    parser: Parser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the flags and calls `main` with them; returns the exit status.

    After an error it prints one line and raises SystemExit with status 1. LLADA_JAX_TRACEBACK=1
    also prints the traceback. An interrupt (Ctrl-C) gives status 130.
    """
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    args = parse(parser, argv)
    try:
        return main(args) or 0
    except KeyboardInterrupt:
        hosts.fail("interrupted", INTERRUPTED)
    except Exception as error:
        if not isinstance(error, EXPECTED):
            hosts.fail(traceback.format_exc())
        _show(error)
        hosts.fail(f"error: {_text(error)}")


def one_line(text: object) -> str:
    """Returns the text with every run of white space replaced by one space."""
    return " ".join(str(text).split())


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns (the flags of the config with their values, the words for argparse)."""
    of_config, others = [], []
    words = iter(argv)
    for word in words:
        name = word.partition("=")[0]
        if name != "--config" and not name.startswith(("--config.", "--noconfig.")):
            others.append(word)
            continue
        of_config.append(word)
        if "=" not in word and not name.startswith("--no"):
            of_config += [value for value in [next(words, None)] if value is not None]
        if name == "--config":
            others.append("--config=given")
    return of_config, others


def read_config(argv: list[str]) -> Any:
    """Returns the config that flags name (--config=FILE --config.NAME=VALUE), with its changes.

    Raises ValueError for a wrong flag, and whatever its file raises.
    """
    pairs = zip(argv, [*argv[1:], ""], strict=True)
    file = next((w.partition("=")[2] or after for w, after in pairs if _name(w) == "--config"), "")
    if not file:
        raise ValueError("--config.NAME=VALUE without --config=FILE: name a file of configs/")
    if not pathlib.Path(file.partition(":")[0]).exists():
        raise ValueError(f"--config={file}: there is no such file; name one of configs/")
    config = _parsed([f"--config={file}"])
    for word in argv:
        if _name(word) != "--config" and word.startswith("--"):
            _check_key(config, _name(word).partition("config.")[2], file)
    try:
        return _parsed(argv)
    except flags.IllegalFlagValueError as error:
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
        if not wrong:
            raise
        path, value = wrong.groups()
        section, _, name = path.rpartition(".")
        holder = operator.attrgetter(section)(config) if section else config
        kind = holder.get_type(name).__name__
        raise ValueError(f"config.{path}={value} is not of type {kind}") from error


def set_key(config: Any, path: str, value: Any, file: str) -> None:
    """Sets a key of a config of `file`. Raises ValueError for another key or another type."""
    _check_key(config, path, file)
    *sections, name = path.split(".")
    section = functools.reduce(operator.getitem, sections, config)
    try:
        section[name] = value
    except TypeError as error:
        kind = type(section[name]).__name__
        raise ValueError(f"config.{path}={value!r} is not of type {kind}") from error


def _parsed(argv: list[str]):
    values = flags.FlagValues()
    argv = ["", *argv]
    config_flags.DEFINE_config_file(
        "config", None, flag_values=values, lock_config=True, sys_argv=argv
    )
    values(argv)
    values.config.keys()  # raises what went wrong when the file was loaded
    return values.config


def _name(word: str) -> str:
    return word.partition("=")[0]


def _check_key(config: Any, path: str, file: str):
    """Raises ValueError if a config has no key of this path, with the keys that are near."""
    node, parts = config, path.split(".")
    for k, part in enumerate(parts):
        if not hasattr(node, "keys") or part not in node:
            there = list(node.keys()) if hasattr(node, "keys") else []
            near = difflib.get_close_matches(part, there, 1)
            where = f"the section {'.'.join(parts[:k])}" if k else file
            advice = (
                f'did you mean "{near[0]}"?' if near else f"it has {', '.join(there) or 'none'}"
            )
            objective = f" (objective {config.objective!r})" if "objective" in config else ""
            raise ValueError(f"config.{path}: {where}{objective} has no key {part!r}; {advice}")
        node = node[part]


def _show(error: BaseException):
    """Prints the traceback if LLADA_JAX_TRACEBACK=1 is set."""
    if os.environ.get("LLADA_JAX_TRACEBACK"):
        traceback.print_exception(error)


def _text(error: BaseException) -> str:
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = ": ".join(map(str, error.args)) if len(error.args) > 1 else str(error)
    if isinstance(error, OSError):
        text = str(error)
    if "Traceback (most recent call last)" in text:  # ml_collections puts that of the file in it
        text = re.sub(r"^[\w.]+(Error|Exception): ", "", text.strip().splitlines()[-1])
    return one_line(text) or type(error).__name__
