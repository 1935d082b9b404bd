"""A source of your own: one Source and one entry of SOURCES, then a name like any other."""

import pathlib

import pytest

from llada_jax import tokenizer
from llada_jax.data.packing import Packing
from llada_jax.data.records import read_records
from llada_jax.data.rows import prepare
from llada_jax.data.sources import SOURCES
from llada_jax.data.sources.source import Source


def read_numbered(path):
    """Yields (where, record) of each line of a text file, "question | answer"."""
    for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
        prompt, _, response = line.partition(" | ")
        yield f"{path}:{number}", {"prompt": prompt, "response": response}


def identify(path, digest, limit):
    for _, record in list(read_numbered(path))[: limit or None]:
        digest.update(repr(record).encode())


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """Registers the source "lines"; writes lines to a file and returns the source of it."""
    monkeypatch.setitem(SOURCES, "lines", Source(read_numbered, identify))

    def lines(*content):
        (tmp_path / "x.txt").write_text("\n".join(content))
        return f"lines:{tmp_path / 'x.txt'}"

    return lines


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer.train(["what is 1 and 2 | 3"] * 9, tmp_path_factory.mktemp("t"), 280)


def test_its_records_are_read_and_named_in_errors(lines):
    found = list(read_records(lines("1 | 2", "3 | 4"), "sft"))
    assert [record for _, _, record in found] == [
        {"prompt": "1", "response": "2"},
        {"prompt": "3", "response": "4"},
    ]
    with pytest.raises(ValueError, match=r"x\.txt:2: response is empty; .*bad_records=\"skip\"$"):
        list(read_records(lines("1 | 2", "3 | "), "sft"))


def test_its_records_are_packed_and_another_content_gives_other_rows(lines, tok, tmp_path):
    def rows_of(source, **settings):
        packing = Packing(kind="sft", row_length=32, template="plain", **settings)
        return prepare(source, tok, packing, cache_dir=tmp_path / "cache")

    first = rows_of(lines("1 | 2", "3 | 4"))
    wanted = [tok.bos_id, *tok.encode("12"), tok.eos_id, tok.bos_id, *tok.encode("34"), tok.eos_id]
    assert first.stats.samples == 2 and first[0]["tokens"].tolist() == wanted
    other = rows_of(lines("1 | 2", "3 | 5"))
    assert other.fingerprint != first.fingerprint and other[0]["tokens"].tolist() != wanted
    assert rows_of(lines("1 | 2", "3 | 4")).fingerprint == first.fingerprint
    # With a limit, only the records up to it count.
    limited = {rows_of(lines("1 | 2", last), limit=1).fingerprint for last in ("3 | 4", "5 | 6")}
    assert len(limited) == 1 and first.fingerprint not in limited


def test_a_comma_joins_it_with_another_source(lines, write):
    mine, jsonl = lines("1 | 2", "3 | 4"), write([{"prompt": "5", "response": "6"}])
    for source, prompts in ((f"{mine},{jsonl}", "135"), (f"{jsonl},{mine}", "513")):
        assert "".join(record["prompt"] for _, _, record in read_records(source, "sft")) == prompts


def test_a_name_that_is_not_registered_is_one_line(lines):
    with pytest.raises(ValueError, match=f"'line' is none of {', '.join(SOURCES)}; write"):
        list(read_records(lines("1 | 2").replace("lines:", "line:", 1), "sft"))
    for source in ("lines:", "lines"):
        with pytest.raises(ValueError, match=f"^data source '{source}': [^\\n]*$"):
            list(read_records(source, "sft"))
