"""Plays both games of every question, and keeps them in a file that a later run continues."""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import IO, Any, NamedTuple

from llada_jax import metrics
from llada_jax.evaluate.judge.answers import Question
from llada_jax.evaluate.judge.client import NoAnswerError
from llada_jax.evaluate.judge.judges import ORDERS, Judge, Ruling

Verdicts = dict[tuple[str, str], str | None]  # by (id, order)
_MOST_FAILURES = 3  # games without an answer, one after another: the judge is down


class Game(NamedTuple):
    """A question, with the model's answer first or second."""

    question: Question
    order: str

    @property
    def name(self) -> tuple[str, str]:
        """Its key in `Verdicts`."""
        return self.question.id, self.order


def play(judge: Judge, questions: Sequence[Question], path: pathlib.Path) -> Verdicts:
    """Plays the games that the file at `path` does not have; returns the verdicts of all.

    A game whose judge gave no verdict has None, and is not played again. A game that got no answer
    is not in the file and not in the result: a later run plays it.

    Raises ValueError if the file belongs to another judge or to other answers, if another process
    writes it, or if the judge does not answer.
    """
    games = [Game(question, order) for question in questions for order in ORDERS]
    with _opened(path) as file:
        verdicts = _read(file, path, judge.settings, games)
        waiting = [game for game in games if game.name not in verdicts]
        if not waiting:
            return verdicts
        judge.check()
        first = len(games) - len(waiting)
        progress = metrics.Progress(len(games), first, unit="game", show=(), every=2)
        with progress, contextlib.closing(_rulings(judge, waiting)) as rulings:
            progress.update(first)
            failures = 0
            for game, found in rulings:
                if isinstance(found, NoAnswerError):
                    failures += 1
                    if failures == _MOST_FAILURES:
                        raise ValueError(
                            f"{found}; {len(verdicts)} of {len(games)} games are in {path}, the "
                            "same command goes on from there"
                        ) from found
                    continue
                failures = 0
                verdicts[game.name] = found.verdict
                _append(file, _line(game, found))
                progress.update(len(verdicts))
    return verdicts


def _rulings(
    judge: Judge, games: Sequence[Game]
) -> Generator[tuple[Game, Ruling | NoAnswerError], None, None]:
    """Yields the games as they end. Any error but a missing answer ends them all."""
    if judge.workers == 1:
        for game in games:
            yield game, _ruling(judge, game)
        return
    todo: queue.SimpleQueue[Game | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Game, Any]] = queue.SimpleQueue()

    def work():
        while (game := todo.get()) is not None:
            try:
                done.put((game, _ruling(judge, game)))
            except Exception as error:  # it is raised in the main thread
                done.put((game, error))

    # Daemons: a process that is interrupted does not wait for their answers.
    for _ in range(judge.workers):
        threading.Thread(target=work, daemon=True).start()
    waiting = iter(games)
    for game in itertools.islice(waiting, judge.workers):
        todo.put(game)
    try:
        for _ in games:
            game, found = done.get()
            if isinstance(found, Exception) and not isinstance(found, NoAnswerError):
                raise found
            yield game, found
            todo.put(next(waiting, None))
    finally:
        for _ in range(judge.workers):
            todo.put(None)


def _ruling(judge: Judge, game: Game) -> Ruling | NoAnswerError:
    try:
        return judge.rule(game.question, game.order)
    except NoAnswerError as error:
        return error


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """The file, open for this process alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{path}: another process writes it; wait for it to end") from error
        yield file


def _read(file: IO[bytes], path: pathlib.Path, settings: dict, games: Sequence[Game]) -> Verdicts:
    """The verdicts in a file; a last line that is not whole is cut off. Begins an empty file."""
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    if _json({"settings": settings}).startswith(content):
        os.ftruncate(file.fileno(), 0)
        _append(file, {"settings": settings})
        return {}
    wanted = {game.name: game.question.digest for game in games}
    try:
        head, *lines = [json.loads(line) for line in whole.splitlines()]
        was = head["settings"]
        found = [((line["id"], line["order"]), line["digest"], line["verdict"]) for line in lines]
        differs = sorted(k for k in was.keys() | settings if was.get(k) != settings.get(k))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path} is not a file of this command: give another --out") from None
    if differs:
        old, new = ({name: x.get(name) for name in differs} for x in (was, settings))
        raise ValueError(f"{path} is of {old}, not of {new}: give another --out")
    verdicts: Verdicts = {}
    for name, digest, verdict in found:
        if wanted.get(name, digest) != digest:
            raise ValueError(
                f"{path} is of another text of the question {name[0]!r} or its answers: give "
                "another --out"
            )
        if name in wanted:
            verdicts[name] = verdict
    os.ftruncate(file.fileno(), len(whole))
    return verdicts


def _line(game: Game, ruling: Ruling) -> dict[str, Any]:
    digest = game.question.digest
    return {"id": game.question.id, "order": game.order, "digest": digest, **ruling._asdict()}


def _append(file: IO[bytes], line: dict) -> None:
    file.write(_json(line))
    file.flush()


def _json(line: dict) -> bytes:
    return json.dumps(line).encode() + b"\n"
