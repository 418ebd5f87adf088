"""Instructions and transfers of a compiled program, read from XLA's text of it.

XLA's own sums take the body of a loop once, however often it runs, and a custom kernel for nothing;
so the text is walked, and what stands in a loop is multiplied by its trips.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator

# Bytes of an element, by the name of its type.
_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8,
}  # fmt: skip
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
# The text up to the closing bracket; types of operands may hold brackets of their own.
_OPERANDS = re.compile(r"(?:[^()]+|\([^()]*\))*")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
# Instructions that move no bytes by themselves.
_FREE = {"bitcast", "constant", "get-tuple-element", "parameter", "tuple", "after-all", "iota"}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONSTANT = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = [su](?:32|64)\[\]\S* constant\((\d+)\)")
_CALLED = re.compile(r"(?:to_apply|true_computation|false_computation|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? ?\{([^}]*)\}"
)
_KERNEL_NAME = re.compile(r"(\w+)\)*/pallas_call$")
_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu", "mosaic_gpu_v2")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction as it is met when the program runs.

    Attributes:
      kind: the operation's name, as in "fusion".
      result: types of what it makes, as text.
      source: where it comes from in the traced program; empty if XLA made it up.
      trips: how often it runs.
      cycles: the compiler's estimate for one time; 0 if it makes none.
      moved_bytes: of device memory, read and written, one time.
      text: the whole line.
    """

    kind: str
    result: str
    source: str
    trips: int
    cycles: int
    moved_bytes: int
    text: str

    @property
    def is_kernel(self) -> bool:
        """True for a kernel of our own, of which the compiler knows nothing."""
        return any(f'"{name}"' in self.text for name in _KERNELS)

    @property
    def kernel_name(self) -> str:
        """Name that a kernel of our own gives itself; empty for anything else, or without one."""
        found = _KERNEL_NAME.search(self.source) if self.is_kernel else None
        return found[1] if found else ""

    @property
    def kernel_flops(self) -> int:
        """Operations that a kernel of our own says it takes; 0 if it does not say."""
        found = (
            re.search(r'"cost_estimate":\{"flops":"(\d+)"', self.text) if self.is_kernel else None
        )
        return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True)
class Collective:
    """Transfers between devices of one kind and size, in one run of the program.

    Attributes:
      kind: one of ``COLLECTIVES``.
      num_bytes: of the result of one, on one device.
      group_size: devices that take part; None if the text does not say.
      count: how many there are.
    """

    kind: str
    num_bytes: int
    group_size: int | None
    count: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device must send for all of them, at best, in a ring."""
        others = 1.0 if self.group_size is None else 1.0 - 1.0 / self.group_size
        per_byte = {"all-reduce": 2.0 * others, "collective-permute": 1.0}.get(self.kind, others)
        if self.kind == "reduce-scatter" and self.group_size is not None:
            per_byte = self.group_size * others
        return self.count * self.num_bytes * per_byte


def bytes_of(types: str, *, in_device_memory: bool = False) -> int:
    """Bytes of arrays named in XLA's way, as in ``(bf16[8,128]{1,0}, f32[])``.

    Args:
      types: the text.
      in_device_memory: leaves out what a TPU holds in the fast memory beside its cores.
    """
    total = 0
    for name, sizes, layout in _ARRAY.findall(types):
        if in_device_memory and "S(1)" in layout:
            continue
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += _BYTES.get(name, 0) * count
    return total


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction outside fusions, with the number of times it runs."""
    computations, entry = _computations(text)

    def walk(name: str, trips: int) -> Iterator[Instruction]:
        lines = computations.get(name, ())
        matches = (_INSTRUCTION.match(line) for line in lines)
        sizes = {m[1]: bytes_of(m[2], in_device_memory=True) for m in matches if m}
        for line in lines:
            if not (match := _INSTRUCTION.match(line)):
                continue
            kind = match[3]
            if kind == "while":
                body = re.search(r"body=%?([\w.\-]+)", line)
                condition = re.search(r"condition=%?([\w.\-]+)", line)
                assert body is not None
                assert condition is not None
                yield from walk(body[1], trips * _trips(line, computations.get(condition[1], [])))
                continue
            if kind in ("call", "conditional") or kind.startswith("async"):
                called = _CALLED.findall(line)
                if branches := _BRANCHES.search(line):
                    called += re.findall(r"%?([\w.\-]+)", branches[1])
                for inner in called:
                    yield from walk(inner, trips)
            cycles, source = _CYCLES.search(line), _OP_NAME.search(line)
            yield Instruction(
                kind,
                match[2],
                source[1] if source else "",
                trips,
                int(cycles[1]) if cycles else 0,
                0 if kind in _FREE else sizes[match[1]] + _operand_bytes(line, match, sizes),
                line,
            )

    if entry is not None:
        yield from walk(entry, 1)


def _operand_bytes(line: str, match: re.Match[str], sizes: dict[str, int]) -> int:
    return sum(sizes.get(name, 0) for name in _operands(line, match))


def _operands(line: str, match: re.Match[str]) -> list[str]:
    """Names of what an instruction takes."""
    operands = _OPERANDS.match(line, match.end())
    return re.findall(r"%([\w.\-]+)", operands[0]) if operands else []


def collectives(text: str) -> list[Collective]:
    """All transfers between devices, the largest sums first.

    A TPU compiler hides some inside of fusions, where they run beside a product: they are counted
    where they start.
    """
    computations, _ = _computations(text)
    counts: collections.Counter[tuple[str, int, int | None]] = collections.Counter()
    for instruction in instructions(text):
        kind = instruction.kind.removesuffix("-start")
        if kind in COLLECTIVES:
            result = instruction.result
            if instruction.kind.endswith("-start"):
                result = _result_of_start(result, instruction.text)
            key = (kind, bytes_of(result), _group_size(instruction.text))
            counts[key] += instruction.trips
        elif kind in ("fusion", "async") and "async-collective-start" in instruction.text[:80]:
            for called in _CALLED.findall(instruction.text):
                for line in computations.get(called, ()):
                    match = _INSTRUCTION.match(line)
                    if match and match[3] in COLLECTIVES:
                        counts[match[3], bytes_of(match[2]), _group_size(line)] += instruction.trips
    found = [Collective(*key, count) for key, count in counts.items()]
    return sorted(found, key=lambda c: -c.sent_bytes)


def _result_of_start(types: str, line: str) -> str:
    """Types of an asynchronous transfer's results, out of all types that its start op returns."""
    arrays = [f"{name}[{size}]" for name, size, _ in _ARRAY.findall(types)]
    match = _INSTRUCTION.match(line)
    count = len(_operands(line, match)) if match else 0
    # Operands stand before the results, and counters after them; but some compilers name only the
    # results of a sum, which are as many as its operands.
    return " ".join(arrays[count : 2 * count] if 0 < count < len(arrays) else arrays)


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """Lines of every computation by its name, and the name of the one that is the program."""
    computations: dict[str, list[str]] = {}
    current: list[str] | None = None
    entry = None
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{") and "(" in line:
            words = line.split()
            name = words[1 if words[0] == "ENTRY" else 0].lstrip("%")
            current = computations.setdefault(name, [])
            entry = name if words[0] == "ENTRY" else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line.strip())
    return computations, entry


def _trips(line: str, condition: list[str]) -> int:
    """Trip count of a loop, as far as the text tells; 1 if it does not."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known[1])
    constants = {match[1]: int(match[2]) for text in condition if (match := _CONSTANT.match(text))}
    for text in condition:
        if "ROOT" in text and "compare(" in text:
            for name, value in constants.items():
                if f"%{name}" in text:
                    return value
    return max(constants.values(), default=1)


def _group_size(line: str) -> int | None:
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := _MESH_GROUPS.search(line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        total = 1
        # A part of an axis is written ``:(offset)size`` after the axis.
        for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2]):
            total *= int(part or sizes.get(axis, 1))
        return total
    return None
