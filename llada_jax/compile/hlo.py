"""Reads the text of a compiled program (HLO).

It finds the arrays, loops, collectives and memory traffic of one device.
"""

import collections
import copy
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
# Instructions that only name arrays, wait, or call a computation. They move no bytes themselves.
_FREE = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "while",
    "conditional",
    "call",
    "after-all",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: its type and dimensions, and whether it is in HBM or in on-chip memory."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def nbytes(self) -> int:
        """The size of the array in bytes; 0 for a type that is not in `_BYTES`."""
        return math.prod(self.dims) * _BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation, with the text after its name."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; a tuple has several
    operands: tuple[str, ...]
    text: str
    is_root: bool

    def attribute(self, key: str) -> str | None:
        """The computation or number after `key=`; None if there is no such attribute."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.text)
        return found.group(1) if found else None


def _shapes(text: str) -> tuple[Shape, ...]:
    # S(1) and higher numbers are memory spaces on the chip.
    return tuple(
        Shape(
            dtype,
            tuple(int(d) for d in dims.split(",") if d),
            not re.search(r"S\([1-9]", layout or ""),
        )
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _instruction(line: str) -> Instruction | None:
    if not (found := _LINE.match(line)):
        return None
    root, name, rest = found.groups()
    opcode = _OPCODE.search(" " + rest)
    start = opcode.end() - 1
    depth, end = 1, start
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[start : end - 1]))
    return Instruction(
        name, opcode.group(1), _shapes(rest[: opcode.start()]), operands, rest, bool(root)
    )


def _constant(instruction: Instruction) -> int | None:
    found = (
        re.search(r" constant\((\d+)\)", instruction.text)
        if instruction.opcode == "constant"
        else None
    )
    return int(found.group(1)) if found else None


def _parameter(instruction: Instruction) -> int:
    """The number of a parameter of a computation."""
    return int(re.search(r"parameter\((\d+)\)", instruction.text).group(1))


class Program:
    """The computations of one compiled program (`compiled.as_text()`)."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.aliased_outputs = len(re.findall(r"\{\d[\d, ]*\}: \(\d+", text.split("\n", 1)[0]))
        partitions = re.search(r"num_partitions=(\d+)", text)
        self.num_partitions = int(partitions.group(1)) if partitions else 1
        current = None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header.group(1), {})
                if line.startswith("ENTRY"):
                    self.entry = header.group(1)
            elif current is not None and (instruction := _instruction(line)):
                current[instruction.name] = instruction

    def part(self, name: str) -> "Program":
        """The same program, of which one run of a computation is called, such as a loop's body."""
        part = copy.copy(self)
        part.entry = name
        part.__dict__.pop("times", None)
        return part

    def writers(self, dims: tuple[int, ...]) -> list[Instruction]:
        """The instructions in loops that write a whole array of these dimensions to HBM."""
        found = []
        for name in self.times.keys() - {self.entry}:
            scope = self.computations[name]
            for instruction in scope.values():
                whole = [s.nbytes for s in instruction.shapes if s.dims == dims and s.in_hbm]
                if whole and self._traffic(instruction, scope) >= max(whole):
                    found.append(instruction)
        return found

    def arrays(self) -> Iterator[Shape]:
        """Every array in HBM that is the result of an instruction outside fusions."""
        for name in self.times:
            for instruction in self.computations[name].values():
                yield from (s for s in instruction.shapes if s.in_hbm)

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often each computation outside fusions runs in one call of the program."""
        times: dict[str, int] = collections.defaultdict(int)

        def visit(name: str, count: int):
            times[name] += count
            for instruction in self.computations[name].values():
                if instruction.opcode == "while":
                    visit(instruction.attribute("body"), count * self.trip_count(instruction))
                elif instruction.opcode == "call":
                    visit(instruction.attribute("to_apply"), count)
                elif instruction.opcode == "conditional":
                    branches = re.findall(r"branch_computations=\{([^}]*)\}", instruction.text)
                    branches += re.findall(
                        r"(?:true|false)_computation=(%[\w.\-]+)", instruction.text
                    )
                    for called in re.findall(r"%([\w.\-]+)", " ".join(branches)):
                        visit(called, count)

        visit(self.entry, 1)
        return dict(times)

    def trip_count(self, loop: Instruction) -> int:
        """How often the body of a `while` runs: from XLA, or else from its counter and bound."""
        if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.text):
            return int(known.group(1))
        condition = self.computations[loop.attribute("condition")]
        bound = max((c for c in map(_constant, condition.values()) if c is not None), default=1)
        counter = next(
            (i.attribute("index") for i in condition.values() if i.opcode == "get-tuple-element"),
            None,
        )
        body = self.computations[loop.attribute("body")]
        result = next(i for i in body.values() if i.is_root)
        if counter is None or result.opcode != "tuple":
            return bound
        # The counter increases by 1, or by the number of iterations that the compiler unrolled.
        steps = [
            _constant(body[o]) for o in body[result.operands[int(counter)]].operands if o in body
        ]
        return -(-bound // max((s for s in steps if s), default=1))

    def collectives(self) -> Iterator[tuple[str, Instruction, int]]:
        """(kind, instruction, how often it runs) of every collective.

        A collective that is split into start and done is returned once. The TPU compiler may fuse
        an all-reduce with the slice that each device keeps. This is returned as a reduce-scatter.
        """
        for name, count in self.times.items():
            seen = set()
            for scope, instruction in self._with_fused(name):
                opcode = instruction.opcode.removesuffix("-start")
                channel = opcode, instruction.attribute("channel_id")
                if opcode in COLLECTIVES and (channel[1] is None or channel not in seen):
                    seen.add(channel)
                    yield (
                        "reduce-scatter" if scope.startswith("all-reduce-scatter") else opcode,
                        instruction,
                        count,
                    )

    def _with_fused(self, name: str) -> Iterator[tuple[str, Instruction]]:
        for instruction in self.computations[name].values():
            yield name, instruction
            if instruction.opcode in ("fusion", "async-start"):
                yield from self._with_fused(instruction.attribute("calls"))

    def collective_bytes(self) -> dict[str, tuple[int, int]]:
        """{kind: (calls, bytes sent)} of one device within its slice, in one call of the program.

        In a ring of k devices, a device sends (k - 1) / k of the bytes that are gathered or
        scattered, and twice as many for an all-reduce.
        """
        total: dict[str, tuple[int, int]] = {}
        for kind, instruction, count in self.collectives():
            arrays = [s for s in instruction.shapes if s.dims] or instruction.shapes
            if instruction.opcode.endswith("-start"):
                arrays = arrays[len(arrays) // 2 :]  # inputs first, then outputs: keep the outputs
            size = sum(s.nbytes for s in arrays)
            share = 1.0
            if kind != "collective-permute":
                group = self.group_size(instruction)
                ring = (group - 1) / group
                if kind == "all-reduce":
                    share = 2 * ring
                else:
                    # The result of a reduce-scatter instruction is the part that is kept. The
                    # result of a fused all-reduce is the whole array.
                    share = (
                        group * ring if instruction.opcode.startswith("reduce-scatter") else ring
                    )
            calls, sent = total.get(kind, (0, 0))
            total[kind] = calls + count, sent + int(size * share) * count
        return total

    def between_slices(self, slices: int) -> tuple[int, int]:
        """(transfers, bytes) that a device sends to other slices in one call of the program.

        XLA compiles the program of one slice. Traffic between slices does not appear as a
        collective with replica groups; it appears as `send` instructions that pass the whole array
        to the runtime. The bytes are computed for rings over `slices` slices.

        Raises ValueError for a type of transfer that is not known.
        """
        ring = (slices - 1) / slices
        shares = {
            "ALL_REDUCE": 2 * ring,
            "ALL_GATHER": slices - 1,
            "REDUCE_SCATTER": ring,
            "ALL_TO_ALL": ring,
        }
        calls = sent = 0
        for name, count in self.times.items():
            for instruction in self.computations[name].values():
                form = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)
                if instruction.opcode == "send" and form:
                    if form.group(1) not in shares:
                        raise ValueError(
                            f"unknown transfer between slices, {form.group(1)}, "
                            f"in {instruction.name}"
                        )
                    calls += count
                    sent += int(instruction.shapes[0].nbytes * shares[form.group(1)]) * count
        return calls, sent

    def hbm_bytes(self) -> int:
        """The HBM traffic of one call: bytes read and written by every instruction, loops included.

        A fusion counts as one instruction. An array that is only sliced, or updated in place,
        counts with its slice. This is an estimate: the compiler may keep an operand on the chip
        from one instruction to the next.
        """
        return sum(
            count
            * sum(
                self._traffic(i, self.computations[name]) for i in self.computations[name].values()
            )
            for name, count in self.times.items()
        )

    def _traffic(self, instruction: Instruction, scope: dict[str, Instruction]) -> int:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0
        # The result is a tuple of source and destination; copy-start has them in reverse order.
        if opcode.endswith("-start"):
            ends = [s for s in instruction.shapes if s.dims][:2]
            moved = min((s.nbytes for s in ends), default=0)
            return sum(moved for s in ends if s.in_hbm)
        written = sum(s.nbytes for s in instruction.shapes if s.in_hbm)
        sizes = [
            sum(s.nbytes for s in scope[o].shapes if s.in_hbm) if o in scope else 0
            for o in instruction.operands
        ]
        if opcode == "dynamic-slice":
            return 2 * written
        if opcode == "dynamic-update-slice":
            return 2 * sizes[1]
        if opcode == "send":  # its result is its operand again: it only reads
            return sizes[0]
        if opcode == "fusion":
            written, sizes = self._fusion_traffic(instruction, written, sizes)
        return written + sum(sizes)

    def _fusion_traffic(self, fusion: Instruction, written: int, sizes: list[int]):
        name = fusion.attribute("calls")
        inside, users = self.computations[name], self._users(name)
        for instruction in inside.values():
            if instruction.opcode != "parameter":
                continue
            number = _parameter(instruction)
            uses = users[instruction.name]
            if uses and all(
                u.opcode == "dynamic-update-slice" and u.operands[0] == instruction.name
                for u in uses
            ):
                updates = sum(inside[u.operands[1]].shapes[0].nbytes for u in uses)
                whole = sum(u.shapes[0].nbytes for u in uses)
                sizes[number], written = 0, max(written - whole, 0) + 2 * updates
            else:
                sizes[number] = min(sizes[number], self._read(name, instruction.name))
        return written, sizes

    def _users(self, name: str) -> dict[str, list[Instruction]]:
        """The instructions of a computation that have each value as an operand."""
        users = collections.defaultdict(list)
        for instruction in self.computations[name].values():
            for operand in set(instruction.operands):
                users[operand].append(instruction)
        return users

    def _read(self, name: str, value: str) -> int:
        """The bytes that a fused computation reads of one of its values: all, or slices of it."""
        whole = sum(s.nbytes for s in self.computations[name][value].shapes)
        total = 0
        for use in self._users(name)[value]:
            if use.opcode in ("dynamic-slice", "slice", "gather") and use.operands[0] == value:
                total += use.shapes[0].nbytes
            # Within a fusion, a fusion that aliases its operand only names another tiling.
            elif use.opcode == "bitcast" or "output_to_operand_aliasing" in use.text:
                total += self._read(name, use.name)
            elif use.opcode == "fusion":
                called = use.attribute("calls")
                total += sum(
                    self._read(called, i.name)
                    for i in self.computations[called].values()
                    if i.opcode == "parameter" and use.operands[_parameter(i)] == value
                )
            else:
                return whole
        return min(total, whole) if total else whole

    def group_size(self, collective: Instruction) -> int:
        """The number of devices in one group of a collective.

        Raises ValueError if the form of its replica groups is not known.
        """
        text = collective.text
        if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
            return int(found.group(2))
        if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
            return len(found.group(1).split(","))
        if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found.group(2)))
        if "replica_groups={}" in text:  # all of them
            return self.num_partitions
        raise ValueError(f"unknown replica groups in {text[:200]}")
