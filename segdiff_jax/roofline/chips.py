"""The TPU chips a step can be compiled for: peak rates, memory and the names they go by.

Sources, read in 2026: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} for compute, HBM and ICI;
the price list quoted in launch/README.md for dollars. ICI is what the documents call bidirectional
bandwidth per chip, halved: what a chip can send while it receives as much. v4's page gives none:
2,400 Gbit/s per chip are six links of 50 GB/s (arXiv 2304.01433, table 4). DCN is per chip:
v5p's page says 50 Gbit/s; v5e's 6.4 Tbit/s per pod of 256 chips; v6e has four times v5e's
(cloud.google.com/blog, "Trillium ... GA"); v4 is assumed to be like v5p.
"""

from dataclasses import dataclass

from segdiff_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """Rates per chip in units per second, sizes in bytes."""

    name: str
    flops: float  # bfloat16
    hbm: float  # bytes that the chip has; the compiler keeps some for itself
    hbm_bandwidth: float
    ici_bandwidth: float  # one way, all links together
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
