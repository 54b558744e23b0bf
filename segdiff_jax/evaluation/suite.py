"""The open-vocabulary benchmarks side by side, in the columns of the papers."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from segdiff_jax import codec, files
from segdiff_jax.config import Config
from segdiff_jax.evaluation.open_vocabulary import BENCHMARKS, PUBLISHED
from segdiff_jax.evaluation.tables import section
from segdiff_jax.inference import page
from segdiff_jax.models import flops
from segdiff_jax.models.unet import UNetConfig
from segdiff_jax.models.vae import VAEConfig

COLUMNS = {name: benchmark.column for name, benchmark in BENCHMARKS.items()}
OUTPUTS = ("suite.json", "suite.md", "suite.html")


class Cost(NamedTuple):
    """Of one image, asked for all classes of a vocabulary."""

    unet_calls: int
    tflop: float


def cost(
    unet: UNetConfig, vae: VAEConfig, config: Config, num_classes: int, tokens: int
) -> Cost | None:
    """Count the cost of an image; None where its photo decides it (windows), or a file ("tiny").

    tokens: that the text encoder reads.
    """
    sampler, size = config.sampler, config.data.image_size
    if sampler.decoder == "tiny" or sampler.tiles > 1:
        return None
    group = codec.group_size(num_classes, config.codec.classes_per_pass)
    passes = codec.num_groups(num_classes, group)
    seen = group if config.codec.context == "bound" else tokens
    height, width = (pixels // vae.downsampling for pixels in size)
    call = flops.unet(unet, height, width, seen).forward
    decode, rank = (flops.mask_decode(vae, kind, *size) for kind in (sampler.decoder, "linear"))
    needed = flops.maps(call, passes, sampler, decode, rank) + flops.vae_encode(vae, *size)
    if sampler.decoder == "joint":
        needed += flops.sharpening(min(sampler.shortlist, passes) or passes, *size)
    return Cost(flops.unet_calls(passes, sampler), needed / 1e12)


def write(
    output: str,
    about: dict[str, Any],
    found: Mapping[str, Mapping[str, Any]],
    missing: Mapping[str, str],
) -> str:
    """Write suite.json, .md and .html below `output`; return the Markdown.

    about: title, command, commit, date. found: what metrics.json says, by the names of COLUMNS.
    missing: why a benchmark has no figure.
    """
    columns = ["method", *COLUMNS.values(), "UNet calls, A-150", "TFLOP, A-150", "source"]
    own: list[str] = [_percent(found.get(name, {}).get("miou_present")) for name in COLUMNS]
    cells = [["ours", *own, *_costs(found.get("ade20k_150", {})), "this run"]]
    for row in PUBLISHED:
        shown = ["" if value is None else f"{value:.1f}" for value in row.miou]
        rest = [""] * (len(COLUMNS) - len(shown) + 2)
        cells.append([row.method, *shown, *rest, row.source])
    details = _details(found)
    reasons = [f"{COLUMNS[name]} has no figure: {reason}." for name, reason in missing.items()]
    verdict = " ".join(["mIoU in percent, over the classes in the ground truth.", *reasons])
    result = about | {"columns": columns, "cells": cells, "verdict": verdict, "details": details}
    text = f"# {about['title']}\n\n{section(result)}\n{section(about | details)}"
    files.write_json(os.path.join(output, "suite.json"), result)
    files.write_text(os.path.join(output, "suite.md"), text)
    page.page(
        os.path.join(output, "suite.html"),
        about["title"],
        tables=[
            page.Table("Beside published figures", columns, cells),
            page.Table("Each benchmark", details["columns"], details["cells"]),
        ],
        note=verdict,
    )
    return text


_OF_EACH = {
    "mIoU, present": "miou_present",
    "mIoU, union": "miou_union",
    "IoU by frequency": "frequency_weighted_iou",
    "pixel accuracy": "pixel_accuracy",
}


def _details(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    columns = ["benchmark", "classes", "images", *_OF_EACH, "UNet calls", "TFLOP"]
    cells = [
        [COLUMNS[name], str(len(values["per_class"])), str(values["images"])]
        + [_percent(values[key]) for key in _OF_EACH.values()]
        + _costs(values)
        for name, values in found.items()
    ]
    return {"columns": columns, "cells": cells}


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _costs(values: Mapping[str, Any]) -> list[str]:
    """Return UNet calls and TFLOP of an image, where they are known."""
    return [f"{values[key]:.4g}" if key in values else "" for key in Cost._fields]
