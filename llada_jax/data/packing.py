"""Packing: normalised records -> tokens -> packed rows.

A sample (a preference pair, or a prompt with its response) is never split over two rows. Text
documents are joined into one stream, which is cut into rows.
"""

import collections
import dataclasses
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from llada_jax import config
from llada_jax.config import key
from llada_jax.data.records import FIELDS, BadRecord, BadRecords, normalise, parse
from llada_jax.data.sources import raw_records
from llada_jax.data.templates import encode_prompt
from llada_jax.tokenizer import Tokenizer

OPEN_ROWS = 256  # most rows that first fit keeps open; beyond that the oldest one is closed
REPORT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Packing:
    """How records become rows. Every field is part of the cache key, in this order.

    kind: "preference" (pairs), "sft" (a prompt and a response) or "text" (documents). Text
        documents are put between bos and EOS, joined end to end and cut into rows; a last short row
        is dropped. `template` and `too_long` have no effect on text.
    answer_multiple: responses are padded with EOS to a multiple of this many tokens, but not past
        the row. The padding is part of the response. If it equals row_length, every row of "sft"
        holds exactly one sample, as in the published SFT.
    too_long: what to do with a sample that is longer than a row. (The length of a pair is twice its
        prompt plus both responses.) "drop" drops it. "truncate" cuts the end of the longer
        response, then of both; an EOS at the end is cut too. A sample is still dropped if its
        prompt leaves no room, or if cutting makes the two responses of a pair equal.
    Raises ValueError for an unknown or impossible value.
    """

    kind: str = key("preference", given=True)
    row_length: int = 4096  # tokens of a row
    template: str = "chat"  # how a prompt becomes tokens: "chat" or "plain"
    append_eos: bool = True  # a response or document ends with EOS
    # pad responses with EOS to a multiple of this; the published SFT: row_length
    answer_multiple: int = 1
    too_long: str = "drop"  # samples longer than a row: "drop" or "truncate"
    bad_records: str = "stop"  # "stop" with an error at the first one, or "skip" and count
    holdout: float = 0.0  # share of the records to hold out
    split: str = key("train", given=True)  # or "heldout"
    limit: int = 0  # number of records to read, before the split; 0: all

    def __post_init__(self):
        config.one_of(self, kind=("preference", "sft", "text"), template=("chat", "plain"))
        config.one_of(self, too_long=("drop", "truncate"), bad_records=("stop", "skip"))
        config.one_of(self, split=("train", "heldout"))
        config.at_least(self, row_length=2, answer_multiple=1, limit=0)
        if self.answer_multiple > 1 and self.kind == "text":
            raise ValueError(
                f"answer_multiple={self.answer_multiple} is for responses; use 1 for text"
            )
        if not 0 <= self.holdout < 1:
            raise ValueError(
                f"holdout={self.holdout} is no fraction of the records; use 0 <= holdout < 1"
            )
        if self.split == "heldout" and not self.holdout:
            raise ValueError('split="heldout" is empty at holdout=0; set data.holdout, e.g. to 0.1')

    def holds(self, index: int) -> bool:
        """Whether record number `index` belongs to this split.

        A hash of the index decides, so records keep their split when others are appended.
        """
        draw = (
            int.from_bytes(hashlib.blake2b(index.to_bytes(8, "big"), digest_size=8).digest(), "big")
            / 2**64
        )
        return (draw < self.holdout) == (self.split == "heldout")


@dataclasses.dataclass
class Stats:
    """Counts of one preparation. A sample is a pair, a prompt with its response, or a document."""

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
        """Fraction of the positions in all rows that hold a token, not padding."""
        return self.tokens / max(self.rows * self.row_length, 1)

    def __str__(self) -> str:
        counts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return (
            ", ".join(f"{name} {count:,}" for name, count in counts.items())
            + f", fill {self.fill:.1%}"
        )


class Packer:
    """One pass over a source: turns records into samples, and samples into rows. Fills `stats`."""

    def __init__(self, source: str, tokenizer: Tokenizer, settings: Packing):
        self.source, self.tokenizer, self.settings = source, tokenizer, settings
        self.stats = Stats(settings.row_length)
        self.bad = BadRecords(settings.bad_records)

    def rows(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields rows without padding: tokens int32, segment_ids uint16, response_mask bool."""
        packed = self._text_rows() if self.settings.kind == "text" else self._packed_rows()
        began = reported = time.monotonic()
        for row in packed:
            self.stats.rows += 1
            self.stats.tokens += len(row["tokens"])
            self.stats.response_tokens += int(row["response_mask"].sum())
            if (now := time.monotonic()) - reported > REPORT_SECONDS:
                reported, records = now, self.stats.records
                rate = (
                    f"{records / (now - began):,.0f} records/s,"
                    f" {self.stats.tokens / (now - began):,.0f} tokens/s"
                )
                print(
                    f"preparing {self.source}: {records:,} records, {rate}",
                    file=sys.stderr,
                    flush=True,
                )
            yield row

    def _encoded(self) -> Iterator[list[np.ndarray]]:
        """Encodes the records of this split on all cores; yields those that are good, in order."""
        first = enumerate(itertools.islice(raw_records(self.source), self.settings.limit or None))
        chosen = (item for index, item in first if self.settings.holds(index))
        size = 64 if self.settings.kind == "text" else 1024
        pool = ThreadPoolExecutor(os.cpu_count())

        def started():
            # Executor.map reads its whole input at once, so we give it one block at a time.
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
            pool.shutdown(cancel_futures=True)  # after an error, skip the rest of the block

    def _encode(self, item: tuple[str, object]) -> list[np.ndarray] | BadRecord:
        """Returns the ids of [prompt, response, ...] or of [document], or why the record is bad."""
        try:
            record = normalise(parse(item[1]), self.settings.kind)
            ids = [self.tokenizer.encode(record[key]) for key in FIELDS[self.settings.kind]]
            if not all(ids):
                raise BadRecord("it has no tokens")
            if ids[1:] == ids[:1]:
                raise BadRecord("chosen and rejected are the same tokens")
            if self.settings.append_eos:
                ids = [[*response, self.tokenizer.eos_id] for response in ids]
            if self.settings.kind == "text":
                bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
                ids = [bos + ids[0]]
            else:
                ids = [
                    encode_prompt(self.tokenizer, record["prompt"], self.settings.template),
                    *ids,
                ]
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
        """Packs by first fit: a sample goes into the oldest open row that has room for it.

        At most OPEN_ROWS rows are open at a time.
        """
        opened: collections.deque[_Row] = collections.deque()
        for prompt, *encoded in self._encoded():
            responses = self._fit(prompt, encoded)
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
        """Cuts or pads the responses so that the sample fits into a row; None drops the sample.

        `rows.prepare` documents too_long and answer_multiple.
        """
        room = self.settings.row_length - len(responses) * len(prompt)
        if sum(map(len, responses)) > room:
            if self.settings.too_long == "drop" or room < len(responses):
                return None
            # Each response may use an equal share of the room. Room that a shorter response does
            # not use goes to the other one, so the longer response is cut first.
            shortest = min(map(len, responses))
            share = max(room // len(responses), room - shortest * (len(responses) - 1))
            responses = [response[:share] for response in responses]
            if len(responses) > 1 and np.array_equal(*responses):
                return None
            self.stats.truncated += 1
        left = room - sum(map(len, responses))
        padded = []
        for response in responses:
            fill = min(-len(response) % self.settings.answer_multiple, left)
            left -= fill
            ends = np.full(fill, self.tokenizer.eos_id, np.int32)
            padded.append(np.concatenate([response, ends]))
        return padded

    def why_empty(self) -> str:
        """The error message for a source that gave no row."""
        stats, settings = self.stats, self.settings
        if not stats.records:
            where = (
                f" in its {settings.split} split (holdout={settings.holdout})"
                if settings.holdout
                else ""
            )
            return f"data source {self.source} holds no record{where}; give one that does"
        if settings.kind == "text":
            return (
                f"data source {self.source} fills no row of {settings.row_length} tokens ({stats});"
                " lower row_length"
            )
        return (
            f"data source {self.source} gives no sample ({stats}); raise row_length or set"
            ' data.too_long="truncate" if they are too long'
        )


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
            "segment_ids": np.repeat(
                np.arange(1, len(self.segments) + 1, dtype=np.uint16), self.segments
            ),
            "response_mask": np.concatenate(self.masks),
        }
