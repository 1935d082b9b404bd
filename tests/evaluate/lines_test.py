"""Files of lines that go on after a kill, and those of several hosts."""

import json

import pytest

from llada_jax.evaluate import lines


def test_a_line_that_was_cut_is_cut_off(tmp_path):
    path = tmp_path / "x.jsonl"
    assert lines.read(path) == []
    for i in range(3):
        lines.append(path, {"i": i})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = lines.read(path, repair=False)
        assert path.read_bytes() == whole[:length]
        assert lines.read(path) == kept == [{"i": i} for i in range(whole[:length].count(b"\n"))]
        lines.append(path, {"i": 9})
        assert lines.read(path) == [*kept, {"i": 9}]


@pytest.mark.parametrize("line", ["[1]", "{", "7"])
def test_other_files_are_refused(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"i": 0}}\n{line}\n')
    with pytest.raises(ValueError, match=r"x.jsonl:2 is no line of this command"):
        lines.read(path)


def test_settings_are_compared(tmp_path):
    path = tmp_path / "x.settings.json"
    lines.check_same(path, {"a": 1, "b": [2]})
    lines.check_same(path, {"a": 1, "b": [2]})
    with pytest.raises(
        ValueError, match=r"is of \{'b': \[2\], 'c': None\}, not of \{'b': 3, 'c': 4"
    ):
        lines.check_same(path, {"a": 1, "b": 3, "c": 4})
    path.write_text("{")
    with pytest.raises(ValueError, match="is no file of this command"):
        lines.check_same(path, {})


def test_parts_of_hosts_are_merged(tmp_path):
    key = lambda line: line["id"]
    first = [lines.Parts(tmp_path, "t", i, 2) for i in range(2)]
    for i in (3, 1, 0):
        first[i % 2].append({"id": i})
    # Three hosts go on, and know what two have done; what another writes at the moment stays.
    with (tmp_path / "t.responses.0-of-2.jsonl").open("a") as file:
        file.write('{"id"')
    second = [lines.Parts(tmp_path, "t", i, 3) for i in range(3)]
    assert [sorted(map(key, part.read())) for part in second] == [[0, 1, 3]] * 3
    assert (tmp_path / "t.responses.0-of-2.jsonl").read_text().endswith('{"id"')
    second[2].append({"id": 2})
    second[1].append({"id": 1, "again": True})
    assert second[0].merge(key) == [{"id": i} for i in range(4)]
    assert [p.name for p in tmp_path.iterdir()] == ["t.responses.jsonl"]
    # One host alone knows the merged file.
    alone = lines.Parts(tmp_path, "t")
    alone.append({"id": 4})
    assert [json.loads(line)["id"] for line in (tmp_path / "t.responses.jsonl").open()] == [
        0, 1, 2, 3, 4
    ]  # fmt: skip
    assert len(alone.read()) == 5
