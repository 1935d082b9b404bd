"""4x4 Sudoku: the generator of puzzles and the score, against the rules written a second way."""

import collections
import itertools
import time

import pytest

from llada_jax.tasks import sudoku


def valid(cells):
    """The rules, written a second way: 16 digits against rows, columns and boxes by coordinates."""
    groups = collections.defaultdict(set)
    for i, digit in enumerate(cells):
        row, column = divmod(i, 4)
        for name in (("row", row), ("column", column), ("box", row // 2, column // 2)):
            groups[name].add(digit)
    return all(group == set("1234") for group in groups.values())


def test_there_are_288_grids():
    # Truth: enumeration of all grids whose rows and boxes are permutations.
    rows = ["".join(p) for p in itertools.permutations("1234")]
    bands = [a + b for a, b in itertools.product(rows, repeat=2) if not set(a[:2]) & set(b[:2])]
    found = sorted(grid for grid in map("".join, itertools.product(bands, repeat=2)) if valid(grid))
    assert len(found) == 288
    assert ["".join(map(str, g)) for g in sudoku.grids()] == found


def solve(puzzle, cell=0):
    """All solutions by plain backtracking: a second route to uniqueness."""
    if cell == 16:
        return [puzzle] if valid(puzzle) else []
    if puzzle[cell] != "0":
        return solve(puzzle, cell + 1)
    row, column = divmod(cell, 4)
    peers = {
        puzzle[i]
        for i in range(16)
        if i // 4 == row or i % 4 == column or (i // 8, i % 4 // 2) == (cell // 8, column // 2)
    }
    return [
        s
        for d in "1234"
        if d not in peers
        for s in solve(puzzle[:cell] + d + puzzle[cell + 1 :], cell + 1)
    ]


def test_every_puzzle_has_its_response_as_the_only_solution():
    for record in sudoku.records(150, seed=3):
        assert solve(record["prompt"]) == [record["response"]]
        assert sudoku.count_solutions(record["prompt"]) == 1
        assert sudoku.score(record, record["response"]) == 1.0


def test_count_solutions_agrees_with_backtracking():
    full = "1234341221434321"
    for empty in ((0, 1), (0, 1, 4, 5), range(8), range(0, 16, 2), range(13), range(16)):
        puzzle = "".join("0" if i in empty else c for i, c in enumerate(full))
        assert sudoku.count_solutions(puzzle) == len(solve(puzzle))


def test_records_are_distinct_reproducible_and_spread():
    first = list(sudoku.records(3000, seed=1))
    assert len({r["prompt"] for r in first}) == 3000
    assert first[:500] == list(sudoku.records(500, seed=1))
    assert first != list(sudoku.records(3000, seed=2))
    clues = collections.Counter(16 - r["prompt"].count("0") for r in first)
    assert set(clues) == {4, 5, 6, 7, 8} and min(clues.values()) > 500
    assert {16 - r["prompt"].count("0") for r in sudoku.records(50, clues_min=9, clues_max=10)} == {
        9,
        10,
    }


def test_splits_share_no_puzzle_whatever_the_seed():
    train = {r["prompt"] for seed in range(3) for r in sudoku.records(3000, seed=seed)}
    heldout = {
        r["prompt"] for seed in range(3) for r in sudoku.records(1000, seed=seed, split="heldout")
    }
    assert not train & heldout
    # A stable hash: these must never move, or published numbers would be of other puzzles.
    assert sudoku.split_of("2103401000011004") == "train"
    assert next(sudoku.records(1, split="heldout"))["prompt"] == HELDOUT


HELDOUT = "0342021300003004"


def test_score_judges_by_rules():
    puzzle = {"prompt": "1000000000000000"}
    assert sudoku.score(puzzle, "1234341221434321") == 1.0
    assert sudoku.score(puzzle, " 1234341221434321\n") == 1.0
    assert sudoku.score({"prompt": "1..............."}, "1243341221344321") == 1.0
    assert (
        sudoku.score(puzzle, "1234341221434322") == sudoku.score(puzzle, "123434122143432x") == 0.0
    )
    assert sudoku.score(puzzle, "2143431234211234") == 0.0  # a valid grid that ignores the clue
    assert sudoku.score({"prompt": "." * 16}, "2143431234211234") == 1.0
    assert sudoku.score(puzzle, "1234" * 4) == 0.0  # columns
    assert sudoku.score(puzzle, "1234234134124123") == 0.0  # a Latin square whose boxes clash
    assert sudoku.score(puzzle, "") == sudoku.score(puzzle, "12343412214343211") == 0.0
    assert sudoku.score(puzzle, "1234341221434٣21") == 0.0  # a digit, but not an ASCII one


@pytest.mark.parametrize("prompt", [None, "", "123", "5" * 16, "0" * 17, 1234])
def test_malformed_puzzle_is_one_clear_error(prompt):
    with pytest.raises(ValueError, match="not a 4x4 Sudoku puzzle") as e:
        sudoku.score({"prompt": prompt}, "1234341221434321")
    assert "\n" not in str(e.value) and repr(prompt) in str(e.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"count": 0}, "count=0"),
        ({"count": 5, "seed": -1}, "seed=-1"),
        ({"count": 5, "split": "test"}, "split='test'"),
        ({"count": 5, "clues_min": 3}, "clues_min=3"),
        ({"count": 5, "clues_min": 8, "clues_max": 6}, "clues_max=6"),
        ({"count": 289, "clues_min": 16, "clues_max": 16}, "only 2[0-9]+ such Sudoku puzzles"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        list(sudoku.records(**arguments))


def test_clue_counts_that_run_out_make_room_for_others():
    # At most 288 of the complete grids are there for 16 clues; the other 15 x 288 puzzles have 15.
    found = list(sudoku.records(1500, clues_min=15, clues_max=16))
    assert len({r["prompt"] for r in found}) == 1500


def test_twenty_thousand_take_seconds():
    start = time.perf_counter()
    assert sum(sudoku.score(r, r["response"]) for r in sudoku.records(20000)) == 20000
    assert time.perf_counter() - start < 20
