"""Files and folders that appear whole or not at all, JSON lines, and functions by their names."""

import gzip
import json
import os

import pytest
from etils import epath

from llada_jax import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- write_whole


@pytest.mark.parametrize("content", ["é\n", b"\xff\x00", ""])
def test_a_file_is_written_with_its_folder(tmp_path, content):
    path = tmp_path / "a" / "b" / "c.txt"
    for written in ("before", content):
        files.write_whole(path, written)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(path.parent) == ["c.txt"]


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "c.txt"
    files.write_whole(path, "old")
    seen = []

    def fail(*_):
        seen.append((names(tmp_path), path.read_text()))
        raise OSError("no space left on device")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(type(epath.Path(path)), "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        files.write_whole(path, "new")
    # Until all is written, the new content is in another file.
    assert len(seen) == 1 and len(seen[0][0]) == 2 and seen[0][1] == "old"
    assert path.read_text() == "old" and names(tmp_path) == ["c.txt"]


def test_an_object_store_gets_one_write(tmp_path, monkeypatch):
    # A disk plays the store, which can neither rename nor sync.
    monkeypatch.setattr(files, "is_remote", lambda path: True)
    monkeypatch.setattr(os, "fsync", None)
    monkeypatch.setattr(type(epath.Path(tmp_path)), "replace", None)
    files.write_whole(tmp_path / "a" / "c.txt", "content")
    assert (tmp_path / "a" / "c.txt").read_text() == "content"


def test_which_paths_are_remote():
    assert files.is_remote("gs://bucket/x") and files.is_remote(epath.Path("gs://bucket/x"))
    assert not files.is_remote("/tmp/x") and not files.is_remote(epath.Path("x"))
    with pytest.raises(ValueError, match="gs://bucket/x: safetensors are read and written on a lo"):
        files.local("gs://bucket/x")


# ---- new_folder


def test_a_folder_appears_when_its_block_ends(tmp_path):
    target = epath.Path(tmp_path / "a" / "out")
    with files.new_folder(target) as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1" and names(target.parent) == ["out"]
    with pytest.raises(ValueError, match="out exists and is not empty"), files.new_folder(target):
        raise AssertionError("the block must not run")
    with pytest.raises(ValueError, match="x exists and is not empty"):
        files.new_folder(target / "x").__enter__()  # a file
    assert (target / "x").read_text() == "1"


def test_a_block_that_fails_leaves_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("out", "empty"):  # an empty folder is no content
        with pytest.raises(KeyError), files.new_folder(epath.Path(tmp_path / name)) as folder:
            (folder / "x").write_text("1")
            raise KeyError
    assert names(tmp_path) == ["empty"] and not names(tmp_path / "empty")


def test_a_folder_of_an_object_store_is_written_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "is_remote", lambda path: True)
    with files.new_folder(epath.Path(tmp_path / "out")) as folder:
        assert folder == epath.Path(tmp_path / "out")


# ---- write_jsonl


RECORDS = [{"prompt": "é", "chosen": "\u2028x"}, {"prompt": "b"}]


def test_json_lines(tmp_path):
    path = tmp_path / "a" / "b.jsonl"
    files.write_jsonl(path, iter(RECORDS))
    *lines, end = path.read_text().split("\n")
    assert [json.loads(line) for line in lines] == RECORDS and end == ""


def test_equal_records_give_equal_compressed_files(tmp_path, monkeypatch):
    written = []
    for second in (1.0, 1e9):
        monkeypatch.setattr("time.time", lambda second=second: second)
        files.write_jsonl(tmp_path / "b.jsonl.gz", RECORDS)
        written.append((tmp_path / "b.jsonl.gz").read_bytes())
    assert written[0] == written[1]
    assert [json.loads(line) for line in gzip.decompress(written[0]).splitlines()] == RECORDS


# ---- load_function


def test_a_function_by_its_name():
    assert files.load_function("json:dumps", "scorer") is json.dumps


@pytest.mark.parametrize(
    "spec, message",
    [
        ("json", "scorer 'json' is not of the form module:function"),
        (":dumps", "scorer ':dumps' is not of the form module:function"),
        ("json:", "scorer 'json:' is not of the form module:function"),
        (
            "no_such_module:f",
            "scorer 'no_such_module:f': No module named 'no_such_module'; it must",
        ),
        ("json:no_such", "scorer 'json:no_such': the module json has no function no_such"),
        ("json:__name__", "scorer 'json:__name__': the module json has no function __name__"),
    ],
)
def test_a_function_that_is_not_there_is_one_line(spec, message):
    with pytest.raises(ValueError) as error:
        files.load_function(spec, "scorer")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
