"""What a compiled program reads from and writes to HBM, from the memory of each array in its text.

XLA's "bytes accessed" adds up operands and results wherever they are. On TPUs many are in VMEM, on
the chip: the scheduler copies arrays there ahead of use, and such a copy is counted when it starts,
when it ends and when it is read. Here only HBM counts, and a copy once.
"""

import re
from collections.abc import Iterator

from segdiff_jax.roofline import hlo

# Name, alias or control what others compute.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"while", "conditional", "call", "add-dependency", "opt-barrier"}
_FREE |= {"partition-id", "replica-id"}
_VIEWS = ("ConcatBitcast", "AllocateBuffer")  # custom calls that move nothing
_ENTERED = re.compile(r"\b(?:to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+)")


def hbm_bytes(text: str) -> float:
    """Bytes between HBM and the chip per call, loops of known length counted out.

    Whole operands are counted though a fusion may read part of one, and results though it may
    change a part in place: an upper bound for the program as scheduled.
    """
    bodies = hlo.computations(text)
    tables = {name: {i.name: i for i in body} for name, body in bodies.items()}
    return sum(times * _moved(i, tables[body]) for body, i, times in _scheduled(text, bodies))


def _scheduled(
    text: str, bodies: dict[str, list[hlo.Instruction]]
) -> Iterator[tuple[str, hlo.Instruction, float]]:
    """As `hlo.executed`, without looking into fusions: what is inside them stays on the chip."""
    pending = [(hlo.entry_name(text), 1.0)]
    while pending:
        name, times = pending.pop()
        for instruction in bodies.get(name, []):
            yield name, instruction, times
            if instruction.opcode in ("while", "conditional", "call"):
                inner = times * hlo.trips(instruction, bodies)
                pending += [(entered, inner) for entered in _ENTERED.findall(instruction.rest)]


def _moved(instruction: hlo.Instruction, table: dict[str, hlo.Instruction]) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    if opcode == "custom-call" and any(f'"{view}"' in instruction.rest for view in _VIEWS):
        return 0.0
    if opcode in ("copy-start", "slice-start"):
        # The result lists source and target; what crosses is as large as the smaller.
        sizes = [hlo.size(shape) for shape in instruction.shapes[:2]]
        return float(min(sizes) * instruction.on_chip[:2].count(False))
    written = _in_hbm(instruction)
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        return float(written)  # the result lists the operands too
    operands = re.findall(r"%([\w.\-]+)", instruction.rest.split("), ")[0])
    return float(written + sum(_in_hbm(table[name]) for name in operands if name in table))


def _in_hbm(instruction: hlo.Instruction) -> int:
    return sum(
        hlo.size(shape)
        for shape, on_chip in zip(instruction.shapes, instruction.on_chip, strict=True)
        if not on_chip
    )
