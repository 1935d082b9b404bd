"""Sources and the forms of records."""

import bz2
import gzip
import hashlib
import lzma
import re

import pytest
import tensorflow_datasets as tfds

from llada_jax.data import records, sources, templates
from llada_jax.data.records import NAMED_BAD_RECORDS, BadRecord


def identity(source, limit=0):
    """What a preparation knows of the content of a source."""
    digest = hashlib.sha256()
    sources.identify(source, digest, limit)
    return digest.hexdigest()


# ---- records


USER = {"role": "user", "content": "q"}
BOT = {"role": "assistant", "content": "a"}
BAD = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": [BOT], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, BAD]},
        {"prompt": "q", "chosen": [USER, BOT], "rejected": "b"},
        {"chosen": [USER, BOT], "rejected": [USER, BAD]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "a", "rejected": "b"},
    ],
)
def test_forms_of_preference_records(raw):
    got = records.normalise(raw, "preference")
    assert (templates.as_messages(got["prompt"]), got["chosen"], got["rejected"]) == (
        [USER],
        "a",
        "b",
    )
    assert templates.as_messages(records.normalise(raw, "prompt")["prompt"]) == [USER]
    assert records.normalise(raw, "sft")["response"] == "a"


@pytest.mark.parametrize(
    "raw, prompt",
    [
        ({"prompt": "q", "response": "a"}, "q"),
        ({"question": "q", "answer": "a"}, "q"),
        ({"instruction": "q", "input": "", "output": "a"}, "q"),
        ({"instruction": "q", "input": "more", "output": "a"}, "q\n\nmore"),
        ({"prompt": "q", "completion": "a"}, "q"),
        ({"messages": [USER, BOT]}, [USER]),
        ({"messages": [USER, BAD, USER, BOT]}, [USER, BAD, USER]),
        ({"prompt": "q", "messages": [{"role": "system", "content": "s"}, USER, BOT]}, None),
    ],
)
def test_forms_of_sft_records(raw, prompt):
    got = records.normalise(raw, "sft")
    assert got["response"] == "a"
    assert got["prompt"] == (raw["messages"][:-1] if prompt is None else prompt)
    if prompt is not None:
        assert records.normalise(raw, "prompt")["prompt"] == prompt


def test_transcripts_of_several_turns():
    begin = "\n\nHuman: one\n\nAssistant:  two \n\nthree\n\nHuman: four\n\nAssistant: "
    got = records.normalise(
        {"chosen": begin + "five", "rejected": begin + "six Human: seven"}, "preference"
    )
    assert [m["content"] for m in got["prompt"]] == ["one", "two \n\nthree", "four"]
    assert [m["role"] for m in got["prompt"]] == ["user", "assistant", "user"]
    assert (got["chosen"], got["rejected"]) == ("five", "six Human: seven")


@pytest.mark.parametrize(
    "kind, raw, reason",
    [
        (
            "preference",
            {"prompt": "q", "chosen": "a"},
            r"no field rejected \(it has prompt, chosen\)",
        ),
        (
            "preference",
            {"prompt": "q", "chosen": "a", "rejected": "a"},
            "chosen and rejected are the same",
        ),
        ("preference", {"prompt": "q", "chosen": " \n", "rejected": "a"}, "chosen is empty"),
        (
            "preference",
            {"prompt": "q", "chosen": 3, "rejected": "a"},
            "chosen is neither a string nor a list",
        ),
        (
            "preference",
            {"prompt": 3, "chosen": "b", "rejected": "a"},
            "prompt is neither a string nor a list",
        ),
        (
            "preference",
            {"prompt": "q", "chosen": [USER], "rejected": "a"},
            "chosen does not end with a turn of",
        ),
        (
            "preference",
            {"prompt": "other", "chosen": [USER, BOT], "rejected": "a"},
            "repeats another prompt",
        ),
        ("preference", {"chosen": "a", "rejected": "b"}, "no prompt, and chosen is no transcript"),
        ("preference", {"chosen": [BOT], "rejected": [BAD]}, "no prompt: chosen has one turn only"),
        (
            "preference",
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
            "answer different prompts",
        ),
        (
            "preference",
            {"chosen": "\n\nHuman: q\n\nAssistant: ", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            "the last turn of chosen is empty",
        ),
        ("sft", {"prompt": "q", "response": None}, "no field messages or response or"),
        ("sft", {"prompt": "q", "response": ["a"]}, "response is neither"),
        ("sft", {"messages": []}, "messages is neither"),
        ("sft", {"messages": [{"role": "user"}]}, "messages is neither"),
        ("text", {"text": 1}, "text is int, not a string"),
        ("text", {}, r"no field text \(it has none\)"),
        ("prompt", {"text": "q"}, "no field"),
    ],
)
def test_bad_records(kind, raw, reason):
    with pytest.raises(BadRecord, match=reason):
        records.normalise(raw, kind)


GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}


def test_bad_records_stop_or_are_skipped(write, caplog):
    bad = [
        "{broken",
        "[1]",
        {"prompt": "q"},
        '{"prompt": "\\ud83d", "chosen": "1", "rejected": "2"}',
    ]
    source = write([GOOD, *bad, "", GOOD])
    with pytest.raises(ValueError) as e:
        list(records.read_records(source, "preference"))
    assert re.search(
        r"data\.jsonl:2: no JSON .*bad_records=\"skip\"$", str(e.value)
    ) and "\n" not in str(e.value)
    with caplog.at_level("WARNING", logger="absl"):
        found = list(records.read_records(source, "preference", "skip"))
    assert [(where.rpartition(":")[2], raw, record) for where, raw, record in found] == [
        ("1", GOOD, GOOD),
        ("7", GOOD, GOOD),
    ]
    assert "data.jsonl:3: a record is an object with fields, this is list" in caplog.text
    with pytest.raises(ValueError, match="bad_records='ignore' is unknown"):
        next(records.read_records(source, "preference", "ignore"))


def test_bytes_that_are_no_utf8_are_a_bad_record(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "1"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: no UTF-8"):
        list(records.read_records(f"jsonl:{tmp_path / 'x.jsonl'}", "text"))
    assert len(list(records.read_records(f"jsonl:{tmp_path / 'x.jsonl'}", "text", "skip"))) == 1


def test_only_the_first_bad_records_are_named(write, caplog):
    source = write([GOOD, *["{broken"] * 50])
    with caplog.at_level("WARNING", logger="absl"):
        assert len(list(records.read_records(source, "preference", "skip"))) == 1
    assert caplog.text.count("skipped") == NAMED_BAD_RECORDS + 1


# ---- sources


@pytest.mark.parametrize(
    "ending, opener", [("", open), (".gz", gzip.open), (".xz", lzma.open), (".bz2", bz2.open)]
)
def test_compressed_files(ending, opener, write):
    source = write([GOOD] * 5, f"a.jsonl{ending}", opener)
    assert [record for _, _, record in records.read_records(source, "preference")] == [GOOD] * 5


def test_globs_and_several_sources(write, tmp_path):
    for name in ("a1", "a2", "b"):
        write([{"prompt": name}], f"{name}.jsonl")
    for source, names in (
        (f"jsonl:{tmp_path}/a*.jsonl", ["a1", "a2"]),
        (f"jsonl:{tmp_path}/a?.jsonl,jsonl:{tmp_path}/b.jsonl", ["a1", "a2", "b"]),
    ):
        assert [raw["prompt"] for _, raw, _ in records.read_records(source, "prompt")] == names


def test_identity_of_files_is_their_content(write, tmp_path):
    first = identity(write([GOOD]))
    (tmp_path / "data.jsonl").rename(tmp_path / "moved.jsonl")
    assert identity(f"jsonl:{tmp_path}/moved.jsonl") == first
    assert identity(write([GOOD, GOOD])) != first


def numbers(count=3, start=0, word="x"):
    """What a python: source calls."""
    return ({"prompt": f"{word}{i}", "response": str(i)} for i in range(start, start + count))


def test_python_source():
    source = f"python:{__name__}:numbers"
    found = records.read_records(source + "?count=2&start=5&word=y", "sft")
    assert [raw["prompt"] for _, raw, _ in found] == ["y5", "y6"]
    assert (
        identity(source + "?count=3") == identity(source) == identity(source + "?count=9", limit=3)
    )
    assert identity(source + "?start=1") != identity(source)
    for bad, message in (
        (f"{__name__}:nothing", "has no function nothing"),
        ("no_such_module:f", "No module named 'no_such_module'; it must be importable from here"),
        (__name__, "is not of the form module:function"),
    ):
        with pytest.raises(ValueError, match=rf"^data source python: '{bad}'.* {message}$"):
            identity(f"python:{bad}")


class Chats(tfds.core.GeneratorBasedBuilder):
    """A small prepared dataset."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None

    def _info(self):
        text = tfds.features.Text()
        chat = tfds.features.Sequence({"role": text, "content": text})
        features = {"prompt": text, "chosen": text, "rejected": chat}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples(2)}

    def _generate_examples(self, count=4):
        for i in range(count):
            yield (
                i,
                {
                    "prompt": f"q{i}",
                    "chosen": "é",
                    "rejected": [{"role": "assistant", "content": "no"}],
                },
            )


def test_tfds_source(tmp_path):
    builder = Chats(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()

    def read(spec):
        return [record for _, _, record in records.read_records(f"tfds:{spec}", "preference")]

    found = read(builder.data_path)
    assert sorted(r["prompt"] for r in found) == ["q0", "q1", "q2", "q3"]
    assert {(r["chosen"], r["rejected"]) for r in found} == {("é", "no")}
    assert len(read(f"{builder.data_path}:test")) == 2
    assert len(read(f"{builder.data_path}:train[:1]")) == 1
    tfds.core.add_data_dir(tmp_path / "tfds")
    assert len(read("chats:train[1:]")) == 3
    assert (
        identity(f"tfds:{builder.data_path}")
        == identity("tfds:chats")
        != identity("tfds:chats:test")
    )
    with pytest.raises(ValueError, match="no split 'dev' in .* it has train, test"):
        read(f"{builder.data_path}:dev")
    for missing in (f"{tmp_path}/nowhere", "no_such_dataset"):
        with pytest.raises(FileNotFoundError, match=r"^[^\n]*no prepared dataset at [^\n]*$"):
            read(missing)


def test_sources_that_cannot_be_read(tmp_path):
    whole = gzip.compress(b'{"text": "hello"}\n' * 10_000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    for error, source, message in (
        (FileNotFoundError, f"jsonl:{tmp_path}/nowhere.jsonl", "no file matches .*nowhere.jsonl"),
        (
            ValueError,
            f"{tmp_path}/data.jsonl",
            f"is none of {', '.join(sources.SOURCES)}; write jsonl:PATH",
        ),
        (
            ValueError,
            f"jsonl:{tmp_path}/cut.jsonl.gz",
            r"cut\.jsonl\.gz cannot be read past line \d+ .*complete\?",
        ),
    ):
        with pytest.raises(error, match=message) as e:
            list(records.read_records(source, "text"))
        assert "\n" not in str(e.value)


# ---- real data


def test_hh_rlhf(shared):
    """1,991 of the 2,000 rows are pairs: 4 winners are empty, 5 answer another prompt."""
    source = f"jsonl:{shared}/data/preferences/hh_rlhf_harmless.jsonl.gz"
    found = list(records.read_records(source, "preference", "skip"))
    assert len(found) == 1991
    for where, raw, record in found:
        for key in ("chosen", "rejected"):
            said = "".join(m["content"] for m in record["prompt"]) + record[key]
            assert re.sub(r"\n\n(Human|Assistant):|\s", "", raw[key]) == re.sub(r"\s", "", said), (
                where
            )
        assert (
            record["prompt"][-1]["role"] in ("user", "assistant")
            and record["chosen"] != record["rejected"]
        )
