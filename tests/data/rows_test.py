"""Packing (by the rows that `rows.prepare` makes of a source), the cache on disk and the loader."""

import collections
import itertools
import os
import re
import shutil
import time

import jax
import numpy as np
import pytest

from llada_jax import tokenizer
from llada_jax.data import batches as batches_lib
from llada_jax.data import packing, templates
from llada_jax.data import rows as rows_lib
from llada_jax.data.packing import Packer, Packing
from llada_jax.tokenizer import EOT, Tokenizer

CORPUS = ["the user asks and the assistant says hello", "numbers 12 and 345, a few more words"] * 3


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizer.train(CORPUS, tmp_path_factory.mktemp("tokenizer"), vocab_size=320)


@pytest.fixture
def prepare(tok, tmp_path):
    def prepare(source, kind, **settings):
        settings = {"row_length": 64, "template": "plain"} | settings
        packing = Packing(kind=kind, **settings)
        return rows_lib.prepare(source, tok, packing, cache_dir=tmp_path / "cache")

    return prepare


def words(n, seed=0):
    """A text of n tokens: a digit is one token."""
    return "".join(str(d) for d in np.random.default_rng([n, seed]).integers(0, 10, n))


def pair(p, w, l, seed=0):
    return {
        "prompt": words(p, seed),
        "chosen": "1" + words(w - 1, seed),
        "rejected": "2" + words(l - 1, seed),
    }


def pairs(count, most=12, seed=1):
    rng = np.random.default_rng(seed)
    return [pair(*(int(n) for n in rng.integers(1, most, 3)), seed=i) for i in range(count)]


def segments(row):
    """[(prompt ids, response ids)] of a row."""
    found = []
    for s in range(1, int(row["segment_ids"].max()) + 1):
        inside = row["segment_ids"] == s
        mask = row["response_mask"]
        assert (np.diff(mask[inside].astype(int)) >= 0).all()  # a prompt, then a response
        found.append(
            (row["tokens"][inside & ~mask].tolist(), row["tokens"][inside & mask].tolist())
        )
    return found


# ---- bad records


def test_bad_records_stop_or_are_counted(write, prepare, caplog):
    bad = [
        "{broken",
        "[1]",
        {"prompt": "q"},
        '{"prompt": "\\ud83d", "chosen": "1", "rejected": "2"}',
    ]
    source = write([pair(1, 2, 3), *bad, "", pair(2, 3, 4)])
    with pytest.raises(ValueError) as e:
        prepare(source, "preference")
    assert re.search(
        r"data\.jsonl:2: no JSON .*bad_records=\"skip\"$", str(e.value)
    ) and "\n" not in str(e.value)
    with caplog.at_level("WARNING", logger="absl"):
        stats = prepare(source, "preference", bad_records="skip").stats
    assert (stats.records, stats.bad, stats.samples) == (6, 4, 2)
    assert "data.jsonl:3: a record is an object" in caplog.text


def test_text_that_encodes_to_the_mask_is_bad(tok, write, prepare, monkeypatch):
    monkeypatch.setattr(tok, "mask_id", tok.encode("7")[0])
    source = write([{"prompt": "1", "response": "2"}, {"prompt": "1", "response": "27"}])
    with pytest.raises(ValueError, match=r"jsonl:2: its text encodes to the mask token"):
        prepare(source, "sft")


@pytest.mark.parametrize(
    "ids, reason", [([], "it has no tokens"), ([9], "chosen and rejected are the same tokens")]
)
def test_what_a_tokenizer_leaves_of_a_record(ids, reason, tok, write, prepare, monkeypatch):
    monkeypatch.setattr(tok, "encode", lambda text: ids)
    with pytest.raises(ValueError, match=rf"jsonl:1: {reason}"):
        prepare(write([{"prompt": "q", "chosen": "a", "rejected": "b"}]), "preference")


# ---- packing


def test_encode_prompt(tok):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "12"}]
    assert templates.encode_prompt(tok, "12", "plain") == [tok.bos_id, *tok.encode("12")]
    assert templates.encode_prompt(tok, "12", "chat") == tok.chat_prompt(messages[1:])
    assert templates.encode_prompt(tok, messages, "chat") == tok.chat_prompt(messages)
    assert templates.encode_prompt(tok, messages, "plain") == [
        tok.bos_id,
        *tok.encode("\n\nSystem: be\n\nHuman: 12\n\nAssistant: "),
    ]


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_packed_pairs(template, tok, write, prepare):
    """Every pair is whole, in one row, winner before loser; nothing else is there."""
    records = pairs(200)
    rows = prepare(write(records), "preference", row_length=160, template=template)
    want = collections.Counter()
    for r in records:
        prompt = tuple(templates.encode_prompt(tok, r["prompt"], template))
        want[
            tuple((prompt, (*tok.encode(r[key]), tok.eos_id)) for key in ("chosen", "rejected"))
        ] += 1
    got = collections.Counter()
    for i in range(len(rows)):
        row = rows[i]
        assert {key: value.dtype for key, value in row.items()} == (
            {"tokens": np.int32, "segment_ids": np.uint16, "response_mask": bool}
        )
        assert len(row["tokens"]) <= 160 and row["segment_ids"][0] == 1
        assert set(np.diff(row["segment_ids"].astype(int))) <= {0, 1}
        found = [(tuple(p), tuple(r)) for p, r in segments(row)]
        assert len(found) % 2 == 0 and len(found) <= rows.num_segments
        got.update(zip(found[::2], found[1::2], strict=True))
    assert got == want
    assert rows.num_segments == max(int(rows[i]["segment_ids"].max()) for i in range(len(rows)))
    stats = rows.stats
    assert stats.tokens == sum(len(rows[i]["tokens"]) for i in range(len(rows)))
    assert stats.response_tokens == sum(len(w) + len(l) for (_, w), (_, l) in want.elements())
    assert (stats.records, stats.samples, stats.rows) == (200, 200, len(rows))
    assert stats.fill == stats.tokens / (len(rows) * 160) > 0.8
    assert "\n" not in str(stats) and "samples 200" in str(stats)


def test_first_fit(write, prepare):
    """Sizes 41 33 23 32, rows of 64: the third just fits the first row, the fourth fits neither."""
    sizes = [41, 33, 23, 32]
    source = write([{"prompt": "1", "response": words(n - 3)} for n in sizes])
    rows = prepare(source, "sft")
    assert [[len(p) + len(r) for p, r in segments(rows[i])] for i in range(len(rows))] == [
        [41, 23],
        [33],
        [32],
    ]


def test_the_number_of_open_rows_is_bounded(write, prepare, monkeypatch):
    monkeypatch.setattr(packing, "OPEN_ROWS", 2)
    source = write([{"prompt": "1", "response": words(n - 3)} for n in (40, 41, 42, 20)])
    rows = prepare(source, "sft")
    # The first row was closed before the last record came.
    assert [int(row["segment_ids"].max()) for row in rows] == [1, 2, 1]


def test_too_long_pairs_are_dropped(write, prepare):
    # bos + 10 + response + eos, twice: 30 tokens and 64 fit in 64, 66 do not.
    rows = prepare(write([pair(10, 3, 3), pair(10, 20, 20), pair(10, 20, 21)]), "preference")
    assert (rows.stats.samples, rows.stats.too_long_dropped, rows.stats.truncated) == (2, 1, 0)


@pytest.mark.parametrize(
    "sizes, kept",
    [
        ((10, 50, 10), (31, 11)),  # only the longer is cut
        ((10, 10, 50), (11, 31)),
        ((10, 50, 50), (21, 21)),  # both to half of the room
        ((10, 21, 50), (21, 21)),  # the shorter is above its half: both
        ((30, 9, 9), (1, 1)),
        ((31, 9, 9), None),  # the prompts fill the row
    ],
)
def test_truncated_pairs(sizes, kept, tok, write, prepare):
    small = pair(1, 2, 2)
    rows = prepare(write([small, pair(*sizes)]), "preference", too_long="truncate")
    assert (rows.stats.truncated, rows.stats.too_long_dropped) == ((1, 0) if kept else (0, 1))
    if kept:
        record = pair(*sizes)
        row = next(row for row in rows if len(row["tokens"]) > 8)
        (prompt, winner), (again, loser) = segments(row)[-2:]
        assert prompt == again == [tok.bos_id, *tok.encode(record["prompt"])]
        whole = [[*tok.encode(record[key]), tok.eos_id] for key in ("chosen", "rejected")]
        assert (winner, loser) == tuple(ids[:n] for ids, n in zip(whole, kept, strict=True))


def test_a_pair_that_becomes_equal_is_dropped(write, prepare):
    same = {"prompt": "1", "chosen": "5" * 50 + "1", "rejected": "5" * 50 + "2"}
    stats = prepare(write([pair(1, 2, 2), same]), "preference", too_long="truncate").stats
    assert (stats.samples, stats.truncated, stats.too_long_dropped) == (1, 0, 1)


def test_truncated_sft(tok, write, prepare):
    source = write(
        [{"prompt": words(10), "response": words(70)}, {"prompt": words(63), "response": "1"}]
    )
    rows = prepare(source, "sft", too_long="truncate")
    assert (rows.stats.truncated, rows.stats.too_long_dropped, rows.stats.tokens) == (1, 1, 64)
    assert segments(rows[0]) == [([tok.bos_id, *tok.encode(words(10))], tok.encode(words(70))[:53])]


@pytest.mark.parametrize(
    "multiple, answers", [(1, [4, 8]), (8, [8, 8]), (5, [5, 10]), (64, [60, 60])]
)
def test_answer_multiple(multiple, answers, tok, write, prepare):
    source = write([{"prompt": "123", "response": "456"}, {"prompt": "123", "response": "4567890"}])
    rows = prepare(source, "sft", answer_multiple=multiple)
    found = [answer for i in range(len(rows)) for _, answer in segments(rows[i])]
    assert [len(answer) for answer in found] == answers
    assert set(found[0][3:]) == {tok.eos_id} and found[0][:3] == tok.encode("456")
    assert len(rows) == (2 if multiple == 64 else 1)


def test_answer_multiple_of_pairs(tok, write, prepare):
    pairs = [{"prompt": "1", "chosen": "23", "rejected": "4567"}]
    for row_length, answers in ((64, [8, 8]), (16, [6, 6]), (15, [6, 5])):
        multiple = answers[0]
        rows = prepare(write(pairs), "preference", answer_multiple=multiple, row_length=row_length)
        found = [answer for _, answer in segments(rows[0])]
        assert [len(answer) for answer in found] == answers
        assert set(found[0][2:]) == set(found[1][4:]) == {tok.eos_id}


def test_without_eos(tok, write, prepare):
    rows = prepare(write([{"prompt": "1", "response": "2"}]), "sft", append_eos=False)
    assert rows[0]["tokens"].tolist() == [tok.bos_id, *tok.encode("12")]


def test_text_is_one_stream(tok, write, prepare):
    texts = [words(n, seed=n) for n in (5, 200, 1, 90, 62)]
    rows = prepare(write([{"text": t} for t in texts]), "text")
    stream = [i for t in texts for i in (tok.bos_id, *tok.encode(t), tok.eos_id)]
    assert len(rows) == len(stream) // 64 == 5
    got = [rows[i] for i in range(5)]
    assert np.concatenate([row["tokens"] for row in got]).tolist() == stream[: 5 * 64]
    assert all((row["segment_ids"] == 1).all() and row["response_mask"].all() for row in got)
    assert rows.num_segments == 1 and rows.stats.fill == 1


def test_holdout_is_disjoint_and_complete(write, prepare):
    source = write([{"prompt": str(i), "response": "1"} for i in range(500)])
    got = {}
    for split, holdout in (("train", 0.1), ("heldout", 0.1), ("train", 0.0)):
        rows = prepare(source, "sft", holdout=holdout, split=split)
        got[split, holdout] = {tuple(p) for i in range(len(rows)) for p, _ in segments(rows[i])}
    assert (
        got["train", 0.1] | got["heldout", 0.1] == got["train", 0.0]
        and len(got["train", 0.0]) == 500
    )
    assert not got["train", 0.1] & got["heldout", 0.1]
    assert 30 <= len(got["heldout", 0.1]) <= 70  # 50 +- 3 standard deviations


def test_limit(write, prepare):
    source = write([*({"prompt": str(i), "response": "1"} for i in range(10)), "{broken"])
    assert prepare(source, "sft", limit=4).stats.samples == 4
    assert prepare(source, "sft", limit=10).stats.samples == 10


# ---- the cache


def test_the_cache_is_used_and_covers_content_and_settings(
    write, prepare, tok, tmp_path, monkeypatch
):
    source = write(pairs(20))
    first = prepare(source, "preference")
    (tmp_path / "data.jsonl").rename(tmp_path / "moved.jsonl")
    with monkeypatch.context() as m:
        m.setattr(Tokenizer, "encode", None)
        again = prepare(f"jsonl:{tmp_path}/moved.jsonl", "preference")  # the path does not matter
    assert again.fingerprint == first.fingerprint and again.stats == first.stats
    assert all((a[key] == b[key]).all() for a, b in zip(first, again, strict=True) for key in a)
    other = {
        prepare(f"jsonl:{tmp_path}/moved.jsonl", "preference", **change).fingerprint
        for change in (
            {"row_length": 128},
            {"template": "chat", "row_length": 256},
            {"append_eos": False},
            {"too_long": "truncate"},
            {"bad_records": "skip"},
            {"holdout": 0.5},
            {"holdout": 0.5, "split": "heldout"},
            {"limit": 19},
        )
    }
    other |= {prepare(write(pairs(20, seed=2)), "preference").fingerprint}
    other |= {prepare(f"jsonl:{tmp_path}/moved.jsonl", "sft").fingerprint}
    other |= {prepare(write(pairs(20)), "preference").fingerprint}  # the first again
    assert len(other) == 11
    assert {p.name for p in (tmp_path / "cache").iterdir()} == other


def test_another_tokenizer_is_another_cache(write, prepare, tok, tmp_path):
    source = write(pairs(5))
    small = tokenizer.train(CORPUS, tmp_path / "t", vocab_size=310)
    settings = Packing(row_length=64, template="plain")
    other = rows_lib.prepare(source, small, settings, cache_dir=tmp_path / "cache")
    assert prepare(source, "preference").fingerprint != other.fingerprint


def test_a_failure_leaves_nothing_behind(write, prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "OPEN_ROWS", 1)
    source = write([*pairs(100), "{broken"])
    with pytest.raises(ValueError, match=r"^[^\n]*data\.jsonl:101: no JSON[^\n]*$"):
        prepare(source, "preference")
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(
        rows_lib._Builder, "_generate_examples", lambda self: iter([(0, {"tokens": "x"})])
    )
    with pytest.raises(Exception):  # noqa: B017  (whatever TFDS makes of it)
        prepare(source, "preference", bad_records="skip")
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.undo()
    assert prepare(source, "preference", bad_records="skip").stats.samples == 100


def test_what_a_killed_preparation_left_is_removed_after_a_day(write, prepare, tmp_path):
    source = write(pairs(5))
    rows = prepare(source, "preference")
    cache = tmp_path / "cache"
    shutil.rmtree(cache / rows.fingerprint)
    names = (f"{rows.fingerprint}.1", f"{rows.fingerprint}.2", "another.1")
    old, fresh, other = (cache / f"{name}.incomplete" for name in names)
    for path in (old, fresh, other):
        (path / "rows").mkdir(parents=True)
    for path in (old, other):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    prepare(source, "preference")
    assert {path.name for path in cache.iterdir()} == {rows.fingerprint, fresh.name, other.name}


def test_the_loser_of_a_race_uses_the_rows_of_the_winner(write, prepare, tmp_path, monkeypatch):
    source = write(pairs(20))
    write_rows = rows_lib._write

    def late(packer, directory, fingerprint):
        write_rows(Packer(packer.source, packer.tokenizer, packer.settings), directory, fingerprint)
        write_rows(packer, directory, fingerprint)

    monkeypatch.setattr(rows_lib, "_write", late)
    rows = prepare(source, "preference")
    assert rows.stats.samples == 20
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [rows.fingerprint]


# ---- what cannot be prepared


def test_sources_that_give_nothing(write, prepare):
    cases = [
        (write([], "empty.jsonl"), {}, "empty.jsonl holds no record; give"),
        (write(["", ""], "blank.jsonl"), {}, "holds no record"),
        (write(["{"], "bad.jsonl"), {"bad_records": "skip"}, "gives no sample .*bad 1"),
        (
            write([pair(40, 9, 9)], "long.jsonl"),
            {},
            "gives no sample .*too_long_dropped 1.*row_length",
        ),
        (
            write(pairs(1), "one.jsonl"),
            {"holdout": 0.01, "split": "heldout"},
            "in its heldout split",
        ),
    ]
    for source, settings, message in cases:
        with pytest.raises(ValueError, match=message) as e:
            prepare(source, "preference", **settings)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="fills no row of 64 tokens"):
        prepare(write([{"text": "1"}], "text.jsonl"), "text")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "pairs"}, "kind='pairs' is not one of preference, sft, text"),
        ({"template": "llama"}, "template='llama' is not one of chat, plain"),
        ({"too_long": "cut"}, "too_long='cut' is not one of drop, truncate"),
        ({"bad_records": "ignore"}, "bad_records='ignore' is not one of stop, skip"),
        ({"split": "test"}, "split='test' is not one of train, heldout"),
        ({"split": "heldout"}, "is empty at holdout=0"),
        ({"holdout": 1.5}, "holdout=1.5 is no fraction"),
        ({"row_length": 1}, "row_length=1 must be at least 2"),
        ({"limit": -1}, "limit=-1 must be at least 0"),
        ({"answer_multiple": 0}, "answer_multiple=0 must be at least 1"),
        ({"answer_multiple": 8, "kind": "text"}, "answer_multiple=8 is for responses"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Packing(**settings)


def test_the_cache_is_on_a_local_disk(tok, write):
    with pytest.raises(ValueError, match="cache_dir=gs://bucket/x is not local"):
        rows_lib.prepare(write(pairs(2)), tok, Packing(), cache_dir="gs://bucket/x")


def test_a_template_that_the_tokenizer_cannot_write(tok, write, prepare, monkeypatch):
    monkeypatch.setitem(tok._specials, EOT, None)
    with pytest.raises(ValueError, match=r"the chat template needs <\|eot_id\|>"):
        prepare(write(pairs(2)), "preference", template="chat")


# ---- the loader


@pytest.fixture
def rows(write, prepare):
    made = prepare(write(pairs(60)), "preference", row_length=100)
    assert len(made) > 12
    return made


def take(iterator, count=None):
    return list(itertools.islice(iterator, count))


def arrays(batch):
    """{name: array} of a batch."""
    return {name: x for name, x in vars(batch).items() if isinstance(x, np.ndarray)}


def test_batches(rows):
    batch = next(batches_lib.loader(rows, batch_rows=4, seed=0, shuffle=False))
    assert {
        name: getattr(batch, name).shape
        for name in ("tokens", "segment_ids", "positions", "response_mask")
    } == (dict.fromkeys(("tokens", "segment_ids", "positions", "response_mask"), (4, 100)))
    assert [batch.tokens.dtype, batch.segment_ids.dtype, batch.positions.dtype] == [np.int32] * 3
    assert (
        batch.response_mask.dtype == bool and batch.row_ids.dtype == batch.epochs.dtype == np.int32
    )
    assert batch.row_ids.tolist() == [0, 1, 2, 3] and batch.num_segments == rows.num_segments
    for r in range(4):
        size = len(rows[r]["tokens"])
        for name, value in rows[r].items():
            assert (getattr(batch, name)[r, :size] == value).all()
        assert (batch.tokens[r, size:] == rows.pad_id).all() and not batch.segment_ids[
            r, size:
        ].any()
        assert not batch.response_mask[r, size:].any()
        for s in range(1, batch.segment_ids[r].max() + 1):
            inside = batch.positions[r][batch.segment_ids[r] == s]
            assert (inside == np.arange(len(inside))).all()


def test_the_number_of_segments_is_no_array_and_may_be_given(rows):
    first, second = take(batches_lib.loader(rows, batch_rows=4, seed=0, num_segments=32), 2)
    assert first.num_segments == second.num_segments == 32
    leaves, structure = jax.tree.flatten(first)
    assert len(leaves) == 6 and structure == jax.tree.structure(second)
    assert structure != jax.tree.structure(first.replace(num_segments=31))  # compiled anew


def test_each_epoch_is_a_new_permutation(rows):
    n = len(rows)
    batches = take(batches_lib.loader(rows, batch_rows=1, seed=0, epochs=3))
    ids = np.concatenate([b.row_ids for b in batches]).reshape(3, n)
    assert (np.sort(ids) == np.arange(n)).all()
    assert len({tuple(order) for order in ids.tolist()} | {tuple(range(n))}) == 4
    assert np.concatenate([b.epochs for b in batches]).tolist() == sorted([0, 1, 2] * n)
    for seed in (0, 1):
        other = np.concatenate(
            [b.row_ids for b in batches_lib.loader(rows, batch_rows=1, seed=seed, epochs=3)]
        ).reshape(3, n)
        assert (other == ids).all() if seed == 0 else not {*map(tuple, other)} & {*map(tuple, ids)}


@pytest.mark.parametrize("start", [0, 1, 5, 12, 39])
def test_resume_at_any_index(rows, start):
    all_ids = np.concatenate(
        [b.row_ids for b in take(batches_lib.loader(rows, batch_rows=1, seed=3), 60)]
    )
    resumed = batches_lib.loader(rows, batch_rows=4, seed=3, start=start)
    assert resumed.next_index == start
    assert (
        np.concatenate([b.row_ids for b in take(resumed, 5)]).tolist()
        == all_ids[start : start + 20].tolist()
    )
    assert resumed.next_index == start + 20


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_make_the_same_global_batch(rows, shards):
    whole = take(batches_lib.loader(rows, batch_rows=8, seed=3, start=3), 6)
    parts = [
        take(
            batches_lib.loader(
                rows,
                batch_rows=8,
                seed=3,
                start=3,
                shard_index=s,
                shard_count=shards,
                threads=s + 1,
            ),
            6,
        )
        for s in range(shards)
    ]
    for k, batch in enumerate(whole):
        for s in range(shards):
            found = arrays(parts[s][k])
            assert len(found) == 6 and parts[s][k].num_segments == batch.num_segments
            for name, value in arrays(batch).items():
                assert (found[name] == value[s::shards]).all()


def test_the_last_batch(rows):
    n = len(rows)
    size = n // 2 + 1  # two batches do not fill up

    def ids(**given):
        return [
            b.row_ids.tolist()
            for b in batches_lib.loader(rows, batch_rows=size, seed=0, shuffle=False, **given)
        ]

    assert ids(epochs=1) == [list(range(size))]
    padded = [*range(size, n), *[-1] * (2 * size - n)]
    assert ids(epochs=1, pad=True) == [list(range(size)), padded]
    assert ids(epochs=1, pad=True, start=size) == [padded]
    assert ids(epochs=1, start=2 * size) == []
    last = take(batches_lib.loader(rows, batch_rows=size, seed=0, epochs=1, pad=True))[-1]
    assert (
        not last.segment_ids[-1].any()
        and not last.response_mask[-1].any()
        and (last.tokens[-1] == rows.pad_id).all()
    )
    big = take(batches_lib.loader(rows, batch_rows=2 * n, seed=0, epochs=1, pad=True))
    assert len(big) == 1 and (big[0].row_ids >= 0).sum() == n


def test_loader_settings_are_checked(rows):
    with pytest.raises(ValueError, match="batch_rows=6 cannot be shared by shard 0 of 4"):
        batches_lib.loader(rows, batch_rows=6, seed=0, shard_count=4)
    with pytest.raises(ValueError, match="shard 4 of 4"):
        batches_lib.loader(rows, batch_rows=8, seed=0, shard_index=4, shard_count=4)
    with pytest.raises(ValueError, match=f"{len(rows)} rows x 1 epochs fill no batch of 1000"):
        batches_lib.loader(rows, batch_rows=1000, seed=0, epochs=1)


def test_one_row(write, prepare):
    rows = prepare(write(pairs(1)), "preference")
    batch = next(batches_lib.loader(rows, batch_rows=3, seed=0))
    assert batch.row_ids.tolist() == [0, 0, 0] and batch.epochs.tolist() == [0, 1, 2]


# ---- real data


def test_hh_rlhf(shared, prepare):
    source = f"jsonl:{shared}/data/preferences/hh_rlhf_harmless.jsonl.gz"
    with pytest.raises(ValueError, match=r"gz:80: the last turn of chosen is empty; .*skip"):
        prepare(source, "preference", row_length=512)
    stats = prepare(source, "preference", row_length=16384, limit=100, bad_records="skip").stats
    assert (stats.records, stats.bad, stats.samples) == (100, 1, 99)
