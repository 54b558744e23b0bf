"""What the compiler makes of a jitted step, and the time that a chip's peaks allow for it.

step, shapes ─► trace: FLOPs of attention kernels, rounds of loops
             ─► compile: fits or not, HBM, FLOPs, bytes accessed, collectives
and peaks, price ─► roofline, MFU, images/s, hours, dollars
"""

import re
import time
from collections import Counter
from typing import Any, NamedTuple

import jax

from segdiff_jax.models import flops
from segdiff_jax.parallel.chips import Chip

# An exchange between chips in a compiled program; "send" is one between slices. XLA may hide one
# behind several fusions and write it into each, under the same channel.
_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|all-to-all|reduce-scatter|collective-(?:permute|broadcast)|send)"
    r"(?:-start)?\(.*?\bchannel_id=(\d+)"
)


class Step(NamedTuple):
    """A jitted function and what to lower it for. The counts are per call, over all chips."""

    function: Any
    arguments: tuple[Any, ...]  # ShapeDtypeStructs with shardings, or static values
    batch: int  # training examples, or jobs of the sampler
    images: float  # training examples, or segmented images
    flops: float  # what the networks need, by the analytic count


def measure(step: Step, chip: Chip, count: int, steps: int | None) -> dict[str, Any]:
    """Compile `step` for `count` chips; return what one does, and what a run of `steps` costs."""
    started, trace = time.monotonic(), step.function.trace(*step.arguments)
    made: dict[str, Any] = {"fits": False, "hbm_of_chip": chip.hbm}
    try:
        program = trace.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return made | {"why": _excerpt(str(error))}
    made |= {"fits": True, "compile_seconds": time.monotonic() - started}
    found = made["per_chip"] = _per_chip(program, flops.traced(trace.jaxpr), step, count)
    needed, total = found["flops"]["analytic"], found["flops"]["total"]
    compute, memory = total / chip.flops, found["bytes_accessed"] / chip.hbm_bandwidth
    slowest = max(compute, memory)
    made["roofline"] = {
        "compute_seconds": compute,
        "memory_seconds": memory,
        "step_seconds": slowest,
        "mfu": needed / (slowest * chip.flops),
        "images_per_second": step.images / slowest,
    }
    if steps is not None:  # of FLOPs alone too: the bytes are not HBM's only
        hours = [steps * seconds / 3600 for seconds in (compute, slowest)]
        dollars = [count * chip.price * h for h in hours]
        made["run"] = {"steps": steps, "hours": hours, "dollars": dollars, "price": chip.price}
    return made


def _per_chip(program: Any, traced: flops.Traced, step: Step, count: int) -> dict[str, Any]:
    """Return the memory, FLOPs, bytes and collectives of a compiled `step` on one of its chips.

    XLA counts the body of a loop once. The other rounds are added from the traced function's matrix
    products, and bytes are taken to grow by as much.
    """
    memory, costs = program.memory_analysis(), program.cost_analysis()
    hbm = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,  # beside arguments
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    kernels, rounds = traced.kernels / count, (traced.run - traced.once) / count
    counted = {"xla": costs["flops"], "loops": rounds, "kernels": kernels}
    return {
        "hbm": hbm | {"total": sum(hbm.values())},
        "flops": counted | {"total": sum(counted.values()), "analytic": step.flops / count},
        "bytes_accessed": costs["bytes accessed"] * (1 + rounds / costs["flops"]),
        "collectives": Counter(name for name, _ in set(_COLLECTIVE.findall(program.as_text()))),
    }


def _excerpt(message: str) -> str:
    """Return of the compiler's message its reason and the largest buffers, 24 lines."""
    lines = message.removeprefix("RESOURCE_EXHAUSTED: ").splitlines()
    return "\n".join([line.strip() for line in lines if line.strip(" =")][:24])
