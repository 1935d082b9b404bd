"""Normalised records -> tokens -> packed rows on disk -> batches.

`prepare` packs a source (see `records`) once into rows with random access, cached by content; `loader` turns rows into
batches whose order depends on the seed alone, so that one integer resumes it on any number of hosts.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from llada_jax.batch import Batch
from llada_jax.records import FIELDS, BadRecord, BadRecords, as_messages, identify, normalise, parse, raw_records
from llada_jax.tokenizer import Tokenizer

FORMAT = 1  # of the files on disk, part of the cache key: raise it when the same input gives other rows
OPEN_ROWS = 256  # rows that first fit looks at; the oldest is closed when one more is opened
REPORT_SECONDS = 10.0
STALE_SECONDS = 24 * 3600.0


# ---- tokens and rows


def encode_prompt(tokenizer: Tokenizer, prompt: str | list[dict], template: str) -> list[int]:
    """Ids of a prompt up to where the response begins.

    "chat": the tokenizer's chat template (a string is one message of the user). "plain": bos, where the tokenizer has
    one, and the text; messages are written as HH-RLHF transcripts (`\n\nHuman: ...\n\nAssistant: `).
    """
    if template == "chat":
        return tokenizer.chat_prompt(as_messages(prompt))
    if not isinstance(prompt, str):
        roles = {"user": "Human", "assistant": "Assistant"}
        turns = [f"\n\n{roles.get(m['role'], m['role'].title())}: {m['content']}" for m in prompt]
        prompt = "".join(turns) + "\n\nAssistant: "
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)


@dataclasses.dataclass(frozen=True)
class _Settings:
    kind: str
    row_length: int
    template: str
    append_eos: bool
    answer_multiple: int
    too_long: str
    bad_records: str
    holdout: float
    split: str
    limit: int

    def __post_init__(self):
        for name, values in (
            ("kind", ("preference", "sft", "text")),
            ("template", ("chat", "plain")),
            ("too_long", ("drop", "truncate")),
            ("bad_records", ("stop", "skip")),
            ("split", ("train", "heldout")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(values)}")
        for name, least in (("row_length", 2), ("answer_multiple", 1), ("limit", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is too small; use at least {least}")
        if self.answer_multiple > 1 and self.kind != "sft":
            raise ValueError(f'answer_multiple={self.answer_multiple} is for kind="sft"; use 1 for {self.kind!r}')
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout={self.holdout} is no fraction of the records; use 0 <= holdout < 1")
        if self.split == "heldout" and not self.holdout:
            raise ValueError('split="heldout" is empty at holdout=0; set data.holdout, e.g. to 0.1')

    def holds(self, index: int) -> bool:
        """Whether record number `index` is of this split: a hash decides, so that a longer file keeps the choice."""
        draw = int.from_bytes(hashlib.blake2b(index.to_bytes(8, "big"), digest_size=8).digest(), "big") / 2**64
        return (draw < self.holdout) == (self.split == "heldout")


@dataclasses.dataclass
class Stats:
    """Counts of one preparation; a sample is a pair, a prompt with its response, or a document of text."""

    row_length: int
    records: int = 0
    bad: int = 0
    too_long_dropped: int = 0
    truncated: int = 0
    samples: int = 0
    rows: int = 0
    tokens: int = 0
    response_tokens: int = 0

    @property
    def fill(self) -> float:
        """Part of the rows that is not padding."""
        return self.tokens / max(self.rows * self.row_length, 1)

    def __str__(self) -> str:
        counts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ", ".join(f"{name} {count:,}" for name, count in counts.items()) + f", fill {self.fill:.1%}"


class _Packer:
    """One pass over a source: records to samples to rows, counted in `stats`."""

    def __init__(self, source: str, tokenizer: Tokenizer, settings: _Settings):
        self.source, self.tokenizer, self.settings = source, tokenizer, settings
        self.stats = Stats(settings.row_length)
        self.bad = BadRecords(settings.bad_records)

    def rows(self) -> Iterator[dict[str, np.ndarray]]:
        """Each row: tokens int32, segment_ids uint16, response_mask bool, all [length], without padding."""
        packed = self._text_rows() if self.settings.kind == "text" else self._packed_rows()
        began = reported = time.monotonic()
        for row in packed:
            self.stats.rows += 1
            self.stats.tokens += len(row["tokens"])
            self.stats.response_tokens += int(row["response_mask"].sum())
            if (now := time.monotonic()) - reported > REPORT_SECONDS:
                reported, records = now, self.stats.records
                rate = f"{records / (now - began):,.0f} records/s, {self.stats.tokens / (now - began):,.0f} tokens/s"
                print(f"preparing {self.source}: {records:,} records, {rate}", file=sys.stderr, flush=True)
            yield row

    def _encoded(self) -> Iterator[list[np.ndarray]]:
        """What `_encode` makes of the good records of this split, in order, on all cores."""
        first = enumerate(itertools.islice(raw_records(self.source), self.settings.limit or None))
        chosen = (item for index, item in first if self.settings.holds(index))
        size = 64 if self.settings.kind == "text" else 1024
        pool = ThreadPoolExecutor(os.cpu_count())

        def started():
            # `map` of an executor reads all of its input: hand it a block at a time.
            while block := list(itertools.islice(chosen, size)):
                yield block, pool.map(self._encode, block)

        try:
            # The next block is encoded while this one is packed and written.
            blocks = started()
            ahead = next(blocks, None)
            while ahead:
                (block, results), ahead = ahead, next(blocks, None)
                self.stats.records += len(block)
                for (where, _), result in zip(block, results, strict=True):
                    if isinstance(result, BadRecord):
                        self.bad.add(where, result)
                        self.stats.bad += 1
                    else:
                        yield result
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nobody wants the rest of the block

    def _encode(self, item: tuple[str, object]) -> list[np.ndarray] | BadRecord:
        """Ids of [prompt, response, ...], or of [document]."""
        try:
            record = normalise(parse(item[1]), self.settings.kind)
            ids = [self.tokenizer.encode(record[key]) for key in FIELDS[self.settings.kind]]
            if not all(ids):
                raise BadRecord("it has no tokens")
            if ids[1:] == ids[:1]:
                raise BadRecord("chosen and rejected are the same tokens")
            if self.settings.append_eos:
                ids = [response + [self.tokenizer.eos_id] for response in ids]
            if self.settings.kind == "text":
                bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
                ids = [bos + ids[0]]
            else:
                ids = [encode_prompt(self.tokenizer, record["prompt"], self.settings.template), *ids]
            if any(self.tokenizer.mask_id in part for part in ids):
                raise BadRecord(f"its text encodes to the mask token {self.tokenizer.mask_id}")
        except BadRecord as reason:
            return reason
        return [np.asarray(part, np.int32) for part in ids]

    def _text_rows(self) -> Iterator[dict[str, np.ndarray]]:
        length = self.settings.row_length
        rest = np.zeros(0, np.int32)
        ones = {"segment_ids": np.ones(length, np.uint16), "response_mask": np.ones(length, bool)}
        for (document,) in self._encoded():
            self.stats.samples += 1
            rest = np.concatenate([rest, document])
            cut = len(rest) - len(rest) % length
            yield from ({"tokens": tokens, **ones} for tokens in rest[:cut].reshape(-1, length))
            rest = rest[cut:]

    def _packed_rows(self) -> Iterator[dict[str, np.ndarray]]:
        """First fit: a sample goes into the oldest open row that has room; OPEN_ROWS bounds how many are open."""
        opened: collections.deque[_Row] = collections.deque()
        for prompt, *responses in self._encoded():
            responses = self._fit(prompt, responses)
            if responses is None:
                self.stats.too_long_dropped += 1
                continue
            self.stats.samples += 1
            size = len(responses) * len(prompt) + sum(map(len, responses))
            row = next((row for row in opened if row.room >= size), None)
            if row is None:
                row = _Row(self.settings.row_length)
                opened.append(row)
            row.add(prompt, responses, size)
            if row.room == 0:
                opened.remove(row)
                yield row.arrays()
            elif len(opened) > OPEN_ROWS:
                yield opened.popleft().arrays()
        yield from (row.arrays() for row in opened)

    def _fit(self, prompt: np.ndarray, responses: list[np.ndarray]) -> list[np.ndarray] | None:
        """The responses as they go into a row (see `prepare` for too_long), None if they do not."""
        room = self.settings.row_length - len(responses) * len(prompt)
        if sum(map(len, responses)) > room:
            if self.settings.too_long == "drop" or room < len(responses):
                return None
            # The longer is cut first: each may have an equal share, and what a shorter one leaves goes to the other.
            shortest = min(map(len, responses))
            share = max(room // len(responses), room - shortest * (len(responses) - 1))
            responses = [response[:share] for response in responses]
            if len(responses) > 1 and np.array_equal(*responses):
                return None
            self.stats.truncated += 1
        if (multiple := self.settings.answer_multiple) > 1:
            size = min(-(-len(responses[0]) // multiple) * multiple, room)
            fill = np.full(size - len(responses[0]), self.tokenizer.eos_id, np.int32)
            responses = [np.concatenate([responses[0], fill])]
        return responses


class _Row:
    """A row that is being filled."""

    def __init__(self, length: int):
        self.room, self.tokens, self.segments, self.masks = length, [], [], []

    def add(self, prompt: np.ndarray, responses: list[np.ndarray], size: int) -> None:
        for response in responses:
            self.tokens += [prompt, response]
            self.segments.append(len(prompt) + len(response))
            self.masks += [np.zeros(len(prompt), bool), np.ones(len(response), bool)]
        self.room -= size

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "tokens": np.concatenate(self.tokens),
            "segment_ids": np.repeat(np.arange(1, len(self.segments) + 1, dtype=np.uint16), self.segments),
            "response_mask": np.concatenate(self.masks),
        }


# ---- rows on disk


class _Builder(tfds.core.GeneratorBasedBuilder):
    """Writes an iterator of rows in its order."""

    name = "llada_jax_rows"
    VERSION = tfds.core.Version(f"{FORMAT}.0.0")
    pkg_dir_path = None  # there is no folder of documentation

    def __init__(self, rows: Iterator[dict[str, np.ndarray]], data_dir: epath.Path):
        self._rows = rows
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self):
        types = {"tokens": np.int32, "segment_ids": np.uint16, "response_mask": np.bool_}
        features = {key: tfds.features.Tensor(shape=(None,), dtype=dtype) for key, dtype in types.items()}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"rows": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self._rows)

    def _log_download_bytes(self):
        """Nothing is downloaded, so nothing is said about it."""

    _log_download_done = _log_download_bytes


class Rows(Sequence):
    """Packed rows with random access; `rows[i]` is a dict of tokens, segment_ids, response_mask, all [length] and
    without padding (the loader pads).

    `stats`: `Stats`; `num_segments`: most segments in any row; `row_length`; `pad_id`; `kind`; `fingerprint`: hash of
    the records, the tokenizer and every setting.
    """

    def __init__(self, directory: str | os.PathLike):
        meta = json.loads((epath.Path(directory) / "prepared.json").read_text())
        self.stats = Stats(**meta["stats"])
        self.row_length: int = self.stats.row_length
        self.num_segments: int = meta["num_segments"]
        self.pad_id: int = meta["pad_id"]
        self.kind: str = meta["kind"]
        self.fingerprint: str = meta["fingerprint"]
        self._source = tfds.builder_from_directory(directory).as_data_source(split="rows")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._source[range(len(self))[index]]  # IndexError ends an iteration, the source has its own


def prepare(
    source: str,
    kind: str,
    tokenizer: Tokenizer,
    *,
    row_length: int,
    cache_dir: str | os.PathLike,
    template: str = "chat",
    append_eos: bool = True,
    answer_multiple: int = 1,
    too_long: str = "drop",
    bad_records: str = "stop",
    holdout: float = 0.0,
    split: str = "train",
    limit: int = 0,
) -> Rows:
    """Packs a source into rows of at most `row_length` tokens under cache_dir/<hash>, or opens those already there.

    kind: "preference" (pairs), "sft" (a prompt and a response) or "text" (documents, between bos and EOS, laid end to
        end and cut into rows; the last short row is dropped; `template` and `too_long` do not matter).
    template: see `encode_prompt`. append_eos: a response or document ends with EOS.
    answer_multiple: ("sft") EOS pads the response, as part of it, to a multiple of so many tokens, never past the row;
        row_length gives the published form, one sample a row.
    too_long: what happens to a sample (for "preference" a pair, twice its prompt and both responses) that is longer
        than a row: "drop", or "truncate", which cuts the end of the longer response, then of both; an EOS goes with
        the end. A prompt that leaves no room, or a pair whose responses become equal, is dropped all the same.
    bad_records: "stop" with an error that names the first, or "skip" and count them.
    holdout, split: this fraction of the records is "heldout", the others are "train".
    limit: only so many records of the source, before they are split; 0 is all.
    ValueError or FileNotFoundError, in one line, for a source that gives no row. cache_dir is a local directory.
    """
    settings = _Settings(
        kind, row_length, template, append_eos, answer_multiple, too_long, bad_records, holdout, split, limit
    )
    if "://" in os.fspath(cache_dir):
        raise ValueError(
            f"cache_dir={cache_dir} is not local, and ArrayRecord reads local files; use a local directory"
        )
    if tokenizer.eos_id is None:
        raise ValueError("rows are padded with EOS, which this tokenizer does not have; use one with <|endoftext|>")
    digest = hashlib.sha256(f"{FORMAT} {tokenizer.fingerprint} {dataclasses.asdict(settings)}".encode())
    identify(source, digest, limit)
    fingerprint = digest.hexdigest()[:20]
    directory = epath.Path(cache_dir).expanduser() / fingerprint
    if not directory.exists():
        _write(_Packer(source, tokenizer, settings), directory, fingerprint)
    return Rows(directory)


def _write(packer: _Packer, directory: epath.Path, fingerprint: str) -> None:
    """Writes the packer's rows to a temporary directory and renames it when it is complete."""
    # A killed process leaves its directory behind; one younger than a day may be at work still.
    for left in directory.parent.glob(f"{directory.name}.*.incomplete"):
        if time.time() - left.stat().mtime > STALE_SECONDS:
            left.rmtree(missing_ok=True)
    most = 0

    def counted():
        nonlocal most
        for row in packer.rows():
            most = max(most, int(row["segment_ids"][-1]))
            yield row

    rows = counted()
    first = next(rows, None)
    if first is None:
        raise ValueError(_why_empty(packer))
    temporary = directory.with_name(f"{directory.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        tfds.disable_progress_bar()
        builder = _Builder(itertools.chain([first], rows), temporary)
        builder.download_and_prepare()
        meta = {
            "fingerprint": fingerprint,
            "source": packer.source,
            "kind": packer.settings.kind,
            "num_segments": most,
            "pad_id": packer.tokenizer.eos_id,
            "stats": dataclasses.asdict(packer.stats),
        }
        (builder.data_path / "prepared.json").write_text(json.dumps(meta, indent=1))
        try:
            builder.data_path.rename(directory)
        except OSError:
            if not directory.exists():
                raise
            # Another process was faster; its rows are the same.
    finally:
        temporary.rmtree(missing_ok=True)


def _why_empty(packer: _Packer) -> str:
    stats, settings = packer.stats, packer.settings
    if not stats.records:
        where = f" in its {settings.split} split (holdout={settings.holdout})" if settings.holdout else ""
        return f"data source {packer.source} holds no record{where}; give one that does"
    if settings.kind == "text":
        return f"data source {packer.source} fills no row of {settings.row_length} tokens ({stats}); lower row_length"
    return (
        f"data source {packer.source} gives no sample ({stats}); raise row_length or set"
        ' data.too_long="truncate" if they are too long'
    )


# ---- batches


class Loader(Iterator[Batch]):
    """Iterator of batches; `next_index` is the global index of the next row, the loader's whole state."""

    def __init__(self, batches: grain.IterDataset, start: int, batch_rows: int):
        self._batches, self._batch_rows, self.next_index = iter(batches), batch_rows, start

    def __next__(self) -> Batch:
        batch = Batch(**next(self._batches))
        self.next_index += self._batch_rows
        return batch


def loader(
    rows: Rows,
    *,
    batch_rows: int,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = None,
    start: int = 0,
    pad: bool = False,
    shard_index: int = 0,
    shard_count: int = 1,
    threads: int = 8,
) -> Loader:
    """Batches of `batch_rows` rows over all shards, in numpy arrays; this shard gets batch_rows / shard_count of them.

    The global batch at row index k (k = step * batch_rows) is a function of rows, seed and k; a shard takes its rows
    [shard_index::shard_count]. Each epoch is shuffled anew. epochs=None repeats for ever; else a last partial batch is
    dropped, or with `pad` filled up with empty rows (segment_ids 0, row_ids -1). `start`: the index to go on from.
    """
    if batch_rows < 1 or batch_rows % shard_count or not 0 <= shard_index < shard_count:
        raise ValueError(
            f"batch_rows={batch_rows} cannot be shared by shard {shard_index} of {shard_count};"
            " use a positive multiple of the number of shards"
        )
    count = len(rows)
    order = grain.MapDataset.range(count)
    if shuffle:
        # grain adds the epoch to the seed: spread seeds out, or seed 0 in epoch 1 is seed 1 in epoch 0.
        order = order.shuffle(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    total = 1 << 62 if epochs is None else count * epochs
    batches = (total - start + (batch_rows - 1) * pad) // batch_rows
    if batches < 1 and start == 0:
        raise ValueError(f"{count} rows x {epochs} epochs fill no batch of {batch_rows}; lower batch_rows or pad")

    def row(k: int) -> dict[str, np.ndarray]:
        if k >= total:
            return _padded({}, rows, row_id=-1, epoch=epochs - 1)
        index = int(order[k]) % count
        return _padded(rows[index], rows, row_id=index, epoch=k // count)

    indices = grain.MapDataset.range(start + shard_index, start + max(batches, 0) * batch_rows, shard_count)
    local_rows = batch_rows // shard_count
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, 2 * local_rows))
    return Loader(indices.map(row).to_iter_dataset(options).batch(local_rows), start, batch_rows)


def _padded(row: dict[str, np.ndarray], rows: Rows, row_id: int, epoch: int) -> dict[str, np.ndarray]:
    """One row of a batch."""
    length = rows.row_length
    tokens, segment_ids = np.full(length, rows.pad_id, np.int32), np.zeros(length, np.int32)
    response_mask = np.zeros(length, bool)
    if row:
        size = len(row["tokens"])
        tokens[:size], segment_ids[:size] = row["tokens"], row["segment_ids"]
        response_mask[:size] = row["response_mask"]
    place = np.arange(length, dtype=np.int32)
    begins = np.diff(segment_ids, prepend=-1) != 0
    return {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "positions": place - np.maximum.accumulate(np.where(begins, place, 0)),
        "response_mask": response_mask,
        "row_ids": np.int32(row_id),
        "epochs": np.int32(epoch),
    }
