"""TPU chips: peak rates, memory and prices, and stand-ins for those that are not here.

Sources, read in 2026. Peak, HBM and its bandwidth: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e};
some versions of these pages round the bandwidth of v5e and v6e to 800 and 1,600 GB/s. Prices: on
demand, US regions, as public repositories quoted cloud.google.com/tpu/pricing in 2025 and, for v6e,
in August 2026; that page itself could not be read.
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from segdiff_jax.errors import UserError

# libtpu would look for a TPU and its metadata server, and log that there is none.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Chip:
    """One chip."""

    name: str  # as in a topology: "v5e"
    flops: float  # bfloat16 FLOP/s
    hbm: int  # bytes; the compiler keeps some for itself
    hbm_bandwidth: float  # bytes/s
    price: float  # dollars per hour
    dimensions: int  # of the torus that links the chips of a slice
    kinds: tuple[str, ...]  # its names as `jax.Device.device_kind`
    config: str | None = None  # libtpu's name for one device per chip, where it is not the default


CHIPS = {
    "v4": Chip("v4", 275e12, 32 * 2**30, 1.2e12, 3.22, 3, ("TPU v4",), "megacore"),
    "v5e": Chip("v5e", 197e12, 16 * 2**30, 819e9, 1.20, 2, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip("v5p", 459e12, 95 * 2**30, 2765e9, 4.20, 3, ("TPU v5", "TPU v5p")),
    "v6e": Chip("v6e", 918e12, 32 * 2**30, 1638e9, 2.70, 2, ("TPU v6 lite", "TPU v6e")),
}


def of_kind(device_kind: str) -> Chip | None:
    """Return the chip that JAX calls `device_kind`, if it is one of these."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


def stand_ins(topology: str, slices: int = 1) -> tuple[Chip, list[jax.Device]]:
    """Return the chip of `topology` and absent devices to compile for, in slice order.

    topology: `v5e:4x4`. Three-dimensional chips take a flat shape too: `v5p:2x2` is `v5p:2x2x1`.
    Raises `UserError` for an unknown chip, for a shape that is none or that libtpu does not know,
    and where libtpu is not installed.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology {topology}: choose one of {', '.join(CHIPS)}, such as v5e:4x4")
    chip, sizes = CHIPS[name], shape.split("x")
    if not 2 <= len(sizes) <= chip.dimensions or not all(s.isdigit() and int(s) for s in sizes):
        example = f"{name}:{'2x2x1' if chip.dimensions == 3 else '4x4'}"
        raise UserError(f"--topology {topology}: write the shape of the slice, such as {example}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("no TPU compiler: pip install 'jax[tpu]', which brings it (libtpu)")
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"chip_config_name": chip.config} if chip.config else {}
    if slices > 1:
        options["num_slices"] = slices
    if set(sizes) == {"1"}:  # libtpu takes hosts for larger
        options["chips_per_host_bounds"] = (1, 1, 1)
    sizes += ["1"] * (chip.dimensions - len(sizes))
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{'x'.join(sizes)}", **options
        )
    except (RuntimeError, NotImplementedError) as error:  # the former is what libtpu's become
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology {topology}: the TPU compiler refuses it ({reason})") from error
    return chip, list(found.devices)
