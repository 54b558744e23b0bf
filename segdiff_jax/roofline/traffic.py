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
_EXCHANGES = re.compile(r"\bcalls=%?async_collective_fusion")
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
    if instruction.name.startswith("async-collective-done"):
        return 0.0
    if opcode == "custom-call" and any(f'"{view}"' in instruction.rest for view in _VIEWS):
        return 0.0
    if opcode in ("copy-start", "slice-start", "async-start"):  # the last: a slice, before codegen
        # The result lists source and target; what crosses is as large as the smaller.
        sizes = [hlo.size(shape) for shape in instruction.shapes[:2]]
        return float(min(sizes) * instruction.on_chip[:2].count(False))
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        return float(_in_hbm(instruction))  # the result lists the operands too
    operands = re.findall(r"%([\w.\-]+)", instruction.rest.split("), ")[0])
    passed_in, passed_on = _under_way(instruction)
    read = [table[n] for i, n in enumerate(operands) if i not in passed_in and n in table]
    return float(_in_hbm(instruction, passed_on) + sum(map(_in_hbm, read)))


def _under_way(instruction: hlo.Instruction) -> tuple[set[int], set[int]]:
    """The operands and results of a fusion that are of an exchange going on beside it.

    XLA hides exchanges behind several fusions, each of which takes their arrays and returns them.
    The first reads what is sent and writes what arrives; to the others they are not traffic.
    """
    first = instruction.name.startswith("async-collective-start")
    if not first and not _EXCHANGES.search(instruction.rest):
        return set(), set()
    shared = re.search(r"output_to_operand_aliasing=\{(.*?)\}, calls", instruction.rest)
    pairs = re.findall(r"\{(\d*)\}: \((\d+),", shared[1] if shared else "")
    passed_in = set() if first else {int(operand) for _, operand in pairs}
    return passed_in, {int(result or 0) for result, _ in pairs}


def _in_hbm(instruction: hlo.Instruction, but: set[int] | None = None) -> int:
    return sum(
        hlo.size(shape)
        for i, shape in enumerate(instruction.shapes)
        if not instruction.on_chip[i] and i not in (but or ())
    )
