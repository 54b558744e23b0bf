"""Compiles a step for TPUs that are not here: libtpu's compiler needs no device."""

import os
import re
import time
from typing import Any, NamedTuple

import jax

from segdiff_jax.errors import UserError
from segdiff_jax.roofline.chips import Chip
from segdiff_jax.roofline.steps import Step

# libtpu would look for a TPU and its metadata server, and log that there is none.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Compiled(NamedTuple):
    """Per chip and call. Sizes in bytes; costs with loops counted once, as XLA does.

    None: not known before code is generated (`plan.py`).
    """

    arguments: int
    outputs: int
    aliased: int  # outputs that reuse the memory of donated arguments
    temporaries: int
    code: int | None
    flops: float
    bytes_accessed: float | None
    text: str
    seconds: float


class OutOfMemory(NamedTuple):
    """The compiler found no way to fit the step into the chip."""

    message: str  # its first sentence, or two where the first is a heading
    buffers: tuple[str, ...]  # the largest that it names, with their sizes
    seconds: float


def devices(chip: Chip, topology: str, slices: int = 1) -> list[Any]:
    """Stand-ins for the chips of `slices` slices, in slice order.

    Raises `UserError` where libtpu is missing or knows no such topology.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"chip_config_name": chip.config} if chip.config else {}
    if slices > 1:
        options["num_slices"] = slices
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if "libtpu" in reason.lower() or "nknown backend" in reason:
            raise UserError(f"no TPU compiler: pip install 'jax[tpu]' ({reason})") from error
        raise UserError(f"--topology {topology}: the TPU compiler refuses it ({reason})") from error
    return list(description.devices)


def compile_step(step: Step) -> Compiled | OutOfMemory:
    """Compiles `step` for the devices of its arguments' shardings; minutes for a large network."""
    lowered = step.function.lower(*step.arguments)
    start = time.monotonic()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _out_of_memory(str(error), time.monotonic() - start)
    seconds = time.monotonic() - start
    memory, costs = program.memory_analysis(), program.cost_analysis()
    return Compiled(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        costs["flops"],
        costs["bytes accessed"],
        program.as_text(),
        seconds,
    )


def _out_of_memory(message: str, seconds: float) -> OutOfMemory:
    """Reads XLA's message, which may end in a list of the largest allocations."""
    lines = [line.strip() for line in message.removeprefix("RESOURCE_EXHAUSTED: ").splitlines()]
    lines = [line for line in lines if line]
    # A kernel that does not fit its chip's VMEM: the heading names the error, the next the kernel.
    first = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])
    buffers = []
    for entry in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size = entry.split()[0]
        named = re.search(r"Operator: op_(?:type|name)=\"([^\"]+)\"", entry)
        shape = re.search(r"Shape: (\S+)", entry)
        kind = re.search(r"Allocation type: (.+)", entry)
        parts = (size, *(m[1] for m in (shape, named, kind) if m))
        buffers.append(" ".join(parts))
    return OutOfMemory(first, tuple(buffers), seconds)
