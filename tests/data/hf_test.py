"""The source hf: on a local folder; there is no network here."""

import hashlib
import json

import pytest

from llada_jax.data.sources import identify, raw_records

datasets = pytest.importorskip("datasets", reason="datasets (the extra evaluate) is not installed")
ROWS = [{"question": f"{k}?", "answer": str(k), "tags": ["a", "b"]} for k in range(5)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "set").mkdir()
    for split, rows in (("train", ROWS[:3]), ("test", ROWS[3:])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "set" / f"{split}.jsonl").write_text(text)
    return str(tmp_path / "set")


def test_records_of_a_split(folder):
    assert [record for _, record in raw_records(f"hf:{folder}?split=test")] == ROWS[3:]
    assert [record for _, record in raw_records(f"hf:{folder}")] == ROWS[:3]
    where, _ = list(raw_records(f"hf:{folder}?split=test"))[1]
    assert where == f"{folder}:test:1"
    digests = []
    for split, limit in (("train", 0), ("test", 0), ("train", 3), ("train", 2)):
        digests.append(hashlib.sha256())
        identify(f"hf:{folder}?split={split}", digests[-1], limit)
    names = [digest.hexdigest() for digest in digests]
    assert names[0] == names[2] and len(set(names)) == 3


@pytest.mark.parametrize(
    "rest, message",
    [
        ("?split=dev", "cannot be loaded .*dev.*: see the network, the name and the split"),
        ("/nothing", "cannot be loaded"),
        ("?splits=test", "splits is none of split, name, revision, data_files"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(folder, rest, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        list(raw_records(f"hf:{folder}{rest}"))
    assert "\n" not in str(error.value)
