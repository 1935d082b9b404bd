"""4x4 Sudoku, the built-in task: a generator of puzzles with a unique solution, and a verifier.

A puzzle is a line of 16 digits, row by row, with 0 for an empty cell. Its solution is a line of 16
digits 1 to 4, in which every row, column and 2x2 box has each digit once. As a data source it is
written `python:llada_jax.tasks.sudoku:records?count=20000&seed=0`.
"""

import functools
import itertools
import zlib
from collections.abc import Iterator

import numpy as np

from llada_jax.tasks.task import Settings, Task

SPLITS = ("train", "heldout")
_ROWS = np.arange(16).reshape(4, 4)
_BOXES = _ROWS.reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(4, 4)
UNITS = np.concatenate([_ROWS, _ROWS.T, _BOXES])  # the 12 groups of 4 cells: each holds 1 to 4
FEWEST_CLUES = 4  # no 4x4 puzzle with fewer has a unique solution
_HELDOUT_SHARE = 8  # one puzzle in 8 is held out
_CANDIDATES = 4096  # random puzzles that are tried in one batch
_BARREN_BATCHES = 50  # after this many batches without a new puzzle, assume there are no more


@functools.cache
def grids() -> np.ndarray:
    """Returns all 288 complete grids, `[288, 16]` int8, in lexicographic order."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    # A band is two rows that fill two boxes: their left halves must be disjoint. A grid is a pair
    # of bands with valid columns.
    bands = np.array([a + b for a in rows for b in rows if not set(a[:2]) & set(b[:2])], np.int8)
    both = np.concatenate(
        [np.repeat(bands, len(bands), 0), np.tile(bands, (len(bands), 1))], axis=1
    )
    return both[(np.sort(both[:, UNITS], axis=-1) == [1, 2, 3, 4]).all((1, 2))]


@functools.cache
def _agreement() -> np.ndarray:
    """Returns `[288, 288]` uint16; bit c of entry [g, h] is set if grids g, h agree in cell c."""
    same = grids()[:, None] == grids()[None]
    return (same * (1 << np.arange(16))).sum(-1).astype(np.uint16)


def _clues(puzzle: object) -> np.ndarray:
    """Returns a puzzle's 16 digits, 0 for empty cells. Raises ValueError if it is no puzzle."""
    text = puzzle.strip().replace(".", "0") if isinstance(puzzle, str) else ""
    if len(text) != 16 or set(text) - set("01234"):
        raise ValueError(
            f"not a 4x4 Sudoku puzzle: {puzzle!r};"
            " write 16 digits 0 to 4 in one line, 0 or . for empty"
        )
    return np.array([int(c) for c in text])


def count_solutions(puzzle: str) -> int:
    """Counts the complete grids that agree with the clues. Raises ValueError if it is no puzzle."""
    clues = _clues(puzzle)
    return int(((grids() == clues) | (clues == 0)).all(1).sum())


def split_of(puzzle: str) -> str:
    """Returns the split of a puzzle, "train" or "heldout".

    A hash of the puzzle decides, so a puzzle is in the same split for every seed.
    """
    return SPLITS[zlib.crc32(puzzle.encode()) % _HELDOUT_SHARE == 0]


def _puzzles(seed: int, clues: int, split: str) -> Iterator[dict]:
    """Yields distinct records with `clues` clues, in random order, until almost none is left."""
    rng = np.random.default_rng((seed, clues))
    seen, barren = set(), 0
    while barren < _BARREN_BATCHES:
        solution = rng.integers(len(grids()), size=_CANDIDATES)
        # Show the cells at which a random permutation is below `clues`.
        shown = rng.random((_CANDIDATES, 16)).argsort(axis=1) < clues
        bits = (shown * (1 << np.arange(16))).sum(-1).astype(np.uint16)[:, None]
        # The puzzle is unique if no grid but the solution agrees with all clues.
        unique = ((_agreement()[solution] & bits) == bits).sum(1) == 1
        barren += 1
        for grid, show in zip(grids()[solution[unique]], shown[unique], strict=True):
            prompt = "".join(map(str, grid * show))
            if prompt not in seen and split_of(prompt) == split:
                seen.add(prompt)
                barren = 0
                yield {"prompt": prompt, "response": "".join(map(str, grid))}


def records(
    count: int, seed: int = 0, split: str = "train", clues_min: int = 4, clues_max: int = 8
) -> Iterator[dict[str, str]]:
    """Yields `count` distinct puzzles with a unique solution.

    A record is {"prompt": puzzle, "response": solution}, 16 digits each. The same seed gives the
    same puzzles, and a smaller count gives the first puzzles of a larger one.

    The number of clues is drawn uniformly from clues_min to clues_max (inclusive); fewer clues are
    harder. A number whose puzzles are used up is no longer drawn. The splits "train" and "heldout"
    (one puzzle in eight) share no puzzle, whatever the seeds.

    Raises ValueError for an invalid argument, or if there are fewer than `count` such puzzles.
    """
    for name, value, least in (
        ("count", count, 1),
        ("seed", seed, 0),
        ("clues_min", clues_min, FEWEST_CLUES),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name}={value!r}: the Sudoku generator needs an integer of at least {least}"
            )
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: Sudoku has the splits {', '.join(SPLITS)}")
    if not FEWEST_CLUES <= clues_min <= clues_max <= 16:
        raise ValueError(
            f"clues_min={clues_min!r}, clues_max={clues_max!r}:"
            f" needs {FEWEST_CLUES} <= clues_min <= clues_max <= 16, "
            f"since no puzzle with fewer than {FEWEST_CLUES} clues has a unique solution"
        )
    return _draw(count, seed, split, list(range(clues_min, clues_max + 1)))


def _draw(count: int, seed: int, split: str, clues: list[int]) -> Iterator[dict[str, str]]:
    rng = np.random.default_rng(seed)
    asked = f"count={count}, split={split}, {clues[0]} to {clues[-1]} clues"
    sources = [_puzzles(seed, n, split) for n in clues]
    given = 0
    while given < count:
        if not sources:
            raise ValueError(
                f"{asked}: only {given} such Sudoku puzzles found; lower count or widen the clues"
            )
        source = sources[rng.integers(len(sources))]
        record = next(source, None)
        if record is None:
            sources.remove(source)
        else:
            given += 1
            yield record


def score(record: dict, response: str) -> float:
    """Returns 1.0 if the response solves the puzzle `record["prompt"]`, else 0.0.

    It checks the rules and the clues, not the reference solution. White space around the response
    is ignored. Raises ValueError if the prompt is no puzzle.
    """
    clues = _clues(record.get("prompt"))
    text = response.strip()
    if len(text) != 16 or set(text) - set("1234"):
        return 0.0
    cells = np.array([int(c) for c in text])
    keeps_clues = ((cells == clues) | (clues == 0)).all()
    return float(keeps_clues and (np.sort(cells[UNITS], axis=1) == [1, 2, 3, 4]).all())


TASK = Task(
    fields={"prompt": str},
    score=score,
    source="python:llada_jax.tasks.sudoku:records?count=500&seed=1&split=heldout",
    settings={"ours": Settings({"gen_length": 16, "block_length": 16}, template="plain")},
)
