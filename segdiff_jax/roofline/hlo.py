"""What a compiled program's text tells: collectives, and kernels that XLA cannot look into."""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(
    r"\b(pred|bf16|f16|f32|f64|[su](?:8|16|32|64))\[([\d,]*)\](?:\{[^}]*?S\((\d)\)\})?"
)
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+)")
_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of the result: (type, dimensions)
    opcode: str
    rest: str  # operands and attributes
    on_chip: tuple[bool, ...] = ()  # per shape: in VMEM or another small memory, not in HBM

    @property
    def bytes(self) -> int:
        return sum(map(size, self.shapes))


def size(shape: tuple[str, tuple[int, ...]]) -> int:
    """Bytes of an array of (type, dimensions)."""
    return _BYTES[shape[0]] * math.prod(shape[1])


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over one network, per chip and step.

    payload: bytes of the whole array on one chip (input of a reduction, result of a gather).
    moved: bytes a chip sends when peers form a ring, which no algorithm betters.
    """

    kind: str
    network: str  # "ici" | "dcn"
    count: float
    payload: float
    moved: float


def computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every computation by its name; that of `entry_name` is the program."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = found.setdefault(header[1], [])
            continue
        match = _INSTRUCTION.match(line)
        if match:
            arrays = _SHAPE.findall(match[2])
            shapes = tuple(
                (t, tuple(int(n) for n in dims.split(",") if n)) for t, dims, _ in arrays
            )
            on_chip = tuple(space not in ("", "0") for *_, space in arrays)
            current.append(Instruction(match[1], shapes, match[3], match[4], on_chip))
    return found


def entry_name(text: str) -> str:
    match = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if match is None:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    return match[1]


def executed(text: str) -> Iterator[tuple[str, Instruction, float]]:
    """(computation, instruction, how often it runs), loops of known length counted out."""
    bodies = computations(text)
    pending = [(entry_name(text), 1.0)]
    while pending:
        name, times = pending.pop()
        for instruction in bodies.get(name, []):
            yield name, instruction, times
            inner = times * trips(instruction, bodies)
            pending += [(called, inner) for called in _CALLED.findall(instruction.rest)]


def trips(instruction: Instruction, bodies: dict[str, list[Instruction]]) -> float:
    """How often a loop runs: what XLA noted, else the bound that its condition compares with."""
    if instruction.opcode != "while":
        return 1.0
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.rest)
    if known:
        return float(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
    tests = bodies.get(condition[1], []) if condition else []
    bounds = [i.rest.split(")")[0] for i in tests if i.opcode == "constant"]
    return max((float(b) for b in bounds if b.isdigit()), default=1.0)


def collectives(text: str, chips: int, slices: int = 1) -> list[Collective]:
    """Every exchange between chips, summed by kind and network.

    Chips are numbered slice by slice: a group that spans two slices uses the data-center network.
    XLA hides an exchange behind several fusions and writes it into each, under one channel. Between
    slices it leaves the exchange to the runtime ("megascale"), to which it sends a chip's part.
    """
    totals: dict[tuple[str, str], list[float]] = {}
    channels: set[str] = set()

    def add(kind: str, network: str, times: float, size: float, moved: float) -> None:
        total = totals.setdefault((kind, network), [0.0, 0.0, 0.0])
        for i, value in enumerate((1.0, size, moved)):
            total[i] += times * value

    for computation, instruction, times in executed(text):
        kind = instruction.opcode.removesuffix("-start")
        across = re.search(r"_xla_megascale_transfer_type=\"(\w+)\"", instruction.rest)
        if kind == "send" and across:
            kind = across[1].lower().replace("_", "-")
            size = _sent_bytes(instruction) * (slices if kind == "all-gather" else 1)
            add(kind, "dcn", times, size, size * _ring(kind, slices))
            continue
        if kind not in _KINDS:
            continue
        channel = re.search(r"\bchannel_id=(\d+).*async_collective_fusion_config", instruction.rest)
        if channel and channel[1] in channels:
            continue
        channels |= {channel[1]} if channel else set()
        size = float(instruction.bytes)
        if instruction.opcode.endswith("-start"):
            size = _started_bytes(kind, instruction)
        groups = _groups(instruction.rest, chips)
        peers = groups.shape[1]
        if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # a fusion in which every chip keeps its part
        elif kind == "reduce-scatter":
            size *= peers
        if peers < 2:
            continue
        owner = groups // (chips // slices)
        network = "dcn" if (owner != owner[:, :1]).any() else "ici"
        add(kind, network, times, size, size * _ring(kind, peers))
    return [Collective(*key, *total) for key, total in sorted(totals.items())]


def _sent_bytes(instruction: Instruction) -> float:
    """A send returns (what is sent, context, token)."""
    return float(size(instruction.shapes[0]))


def _started_bytes(kind: str, instruction: Instruction) -> float:
    """An asynchronous start returns (operands, results, contexts) for gathers and permutes."""
    sizes = [_BYTES[t] * math.prod(s) for t, s in instruction.shapes if s]
    if kind == "all-reduce":
        return float(sum(sizes))
    return float(sum(sizes[len(sizes) // 2 :]))


def _ring(kind: str, peers: int) -> float:
    """Bytes sent per byte of payload."""
    share = (peers - 1) / peers
    factors = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
    return factors.get(kind, share)


def _groups(rest: str, chips: int) -> np.ndarray:
    """Which chips exchange: int [groups, peers], from any of the ways XLA writes it."""
    everyone = np.arange(chips)[None]
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    if pairs:
        numbers = [int(n) for n in re.findall(r"\d+", pairs[1])]
        return np.array(numbers).reshape(-1, 2)
    mesh = re.search(
        r"replica_groups=(?:@?[\w.]+)?mesh\[(.*?)\]\s*(?:\([^)]*\))?\s*\{(.*?)\}", rest
    )
    if mesh:
        sizes = [int(n) for n in re.findall(r"=(\d+)", mesh[1])]
        names = re.findall(r"'([^']+)'=", mesh[1])
        used = [names.index(n) for n in re.findall(r"'([^']+)'", mesh[2])]
        kept = [i for i in range(len(sizes)) if i not in used]
        ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(kept + used)
        return ids.reshape(math.prod(sizes[i] for i in kept), -1)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        return ids.reshape(shape[0], -1)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if listed:
        rows = [
            [int(n) for n in row.split(",") if n] for row in re.findall(r"\{(.*?)\}", listed[1])
        ]
        return np.array(rows)
    return everyone


_NOT_ESTIMATED = 2**40  # XLA writes the largest integer where it has no estimate


def estimated_cycles(text: str) -> float | None:
    """Cycles of a chip that XLA's cost model gives its instructions, one after the other.

    Attention kernels and exchanges are not among them. None in a plan, where code is missing.
    """
    found = [
        times * int(cycles)
        for _, instruction, times in executed(text)
        for cycles in re.findall(r'"estimated_cycles":"(\d+)"', instruction.rest)
        if int(cycles) < _NOT_ESTIMATED
    ]
    return sum(found) if found else None


# Matrix products per attention kernel: q·k and p·v forward; again q·k, v·do, then dq, or dk and dv.
_KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
_TOGETHER = 5  # where dkv makes dq too: more results than two sums and two gradients


def kernel_flops(text: str) -> float:
    """FLOPs of the attention kernels, which XLA counts as 0, from the shapes they are called with.

    A product of q [..., S, D] and k [..., L, D] is 2 · S · L · D times the leading dimensions.
    """
    bodies = computations(text)
    total = 0.0
    for computation, instruction, times in executed(text):
        matmuls = next((n for k, n in _KERNELS.items() if instruction.name.startswith(k)), None)
        if matmuls is None or instruction.opcode != "custom-call":
            continue
        if instruction.name.startswith("splash_mha_dkv") and len(instruction.shapes) > 4:
            matmuls = _TOGETHER
        results = {i.name: i.shapes for i in bodies[computation]}
        operands = re.findall(r"%([\w.\-]+)", instruction.rest.split(")")[0])
        given = [results[name][0] for name in operands if len(results[name]) == 1]
        # The block tables that come first are integers.
        query, key = [s for kind, s in given if kind in ("bf16", "f32") and len(s) >= 3][:2]
        total += times * 2.0 * matmuls * math.prod(query) * key[-2]
    return total
