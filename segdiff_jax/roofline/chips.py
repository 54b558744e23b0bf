"""The TPU chips a step can be compiled for: peak rates, memory and the names they go by.

Sources, read in 2026. Compute, HBM and ICI: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; some
versions of the pages round the HBM bandwidth of v5e and v6e to 800 and 1,600 GB/s. ICI is what they
call bidirectional bandwidth per chip, halved: what a chip can send while it receives as much. v4's
page gives none: six links of 50 GB/s (arXiv 2304.01433, table 4). The JAX team's
jax-ml.github.io/scaling-book/tpus has 45 GB/s for a link of v4 and v5e and 90 for v5p and v6e, a
tenth less than here. DCN is per chip. v5p: 50 Gbit/s (its page). v5e and v6e: 6.4 and 25.6 Tbit/s
per pod of 256 chips (their pages). v4: no page of Google's says; the scaling book gives 6.25 GB/s
for all but v5e and v6e. Dollars: the price list quoted in launch/README.md.
"""

import dataclasses
import math
from dataclasses import dataclass

from segdiff_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """Rates per chip in units per second, sizes in bytes."""

    name: str
    flops: float  # bfloat16
    hbm: float  # bytes that the chip has; the compiler keeps some for itself
    hbm_bandwidth: float
    ici_bandwidth: float  # one way, all links together: two for each dimension of the torus
    dcn_bandwidth: float  # one way, this chip's share of its host's
    dollars: float | None  # on-demand list price per hour, US; None where none is known to us
    dimensions: int  # of the torus
    config: str | None = None  # libtpu's name for one device per chip, where it is not the default


CHIPS = {
    "v4": Chip("v4", 275e12, 32 * 2**30, 1.2e12, 300e9, 6.25e9, 3.22, 3, "megacore"),
    "v5e": Chip("v5e", 197e12, 16 * 2**30, 819e9, 200e9, 3.125e9, 1.20, 2),
    "v5p": Chip("v5p", 459e12, 95 * 2**30, 2765e9, 600e9, 6.25e9, 4.20, 3),
    "v6e": Chip("v6e", 918e12, 32 * 2**30, 1638e9, 400e9, 12.5e9, 2.70, 2),
}


def parse_topology(text: str) -> tuple[Chip, str]:
    """`v5e:4x4` → (the chip, libtpu's name of the slice).

    Raises `UserError` for an unknown chip or a shape that is no shape. Three-dimensional chips
    take a flat shape too: `v5p:2x2` is `v5p:2x2x1`.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology {text}: choose one of {', '.join(CHIPS)}, such as v5e:4x4")
    chip = CHIPS[name]
    sizes = shape.split("x")
    if not 2 <= len(sizes) <= chip.dimensions or not all(s.isdigit() and int(s) for s in sizes):
        example = "2x2x1" if chip.dimensions == 3 else "4x4"
        raise UserError(
            f"--topology {text}: write the shape of the slice, such as {name}:{example}"
        )
    sizes += ["1"] * (chip.dimensions - len(sizes))
    return chip, f"{name}:{'x'.join(sizes)}"


def in_slice(chip: Chip, topology: str) -> Chip:
    """`chip` with the part of its ICI bandwidth that exchanges over a whole slice can use.

    topology: as `parse_topology` returns it. Along a dimension of one chip there is no link. A
    dimension that closes to a ring serves both ways round; one that does not has ends, which
    receive all there is over one link, so it is as fast as one. Rings close along 16 chips of v5e
    and v6e, and in v4 and v5p where every dimension is a multiple of 4 (scaling book, "TPUs").
    """
    sizes = [int(size) for size in topology.partition(":")[2].split("x")]
    if math.prod(sizes) == 1:
        return chip
    cubes = all(size % 4 == 0 for size in sizes)
    closed = [cubes if chip.dimensions == 3 else size == 16 for size in sizes]
    links = sum(1 + ring for size, ring in zip(sizes, closed, strict=True) if size > 1)
    share = links / (2 * chip.dimensions)
    return dataclasses.replace(chip, ici_bandwidth=chip.ici_bandwidth * share)
