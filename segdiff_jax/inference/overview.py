"""O/index.html over all photos of a run: each row is made from a photo and its description."""

import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from segdiff_jax import files
from segdiff_jax.inference import page, pictures
from segdiff_jax.inference.requests import is_url, plural
from segdiff_jax.text.vocabulary import Vocabulary

PAGE = "index.html"

_THUMBNAIL = 640  # pixels of the longer side of photos inside the page
_IN_BROWSERS = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")


def row(output: str, path: str, photo: np.ndarray, said: Mapping[str, Any]) -> page.Row:
    """Return the row of a photo uint8 [H, W, 3] of which O/<name>.json says `said`.

    The page holds a large photo reduced; a click then opens the photo itself, where a browser can.
    """
    picture, title, originals = Image.fromarray(photo), "image", {}
    width, height = picture.size
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    if picture.size != (width, height):
        small = f"{picture.width} × {picture.height}"
        title = f"image, here at {small} of {width} × {height} pixels"
        address = _address(output, path)
        originals = {title: address} if address else {}
    shown: dict[str, bytes | str] = {title: pictures.encode(picture, photo=True)}
    for kind in ("labels", "overlay", "uncertainty"):
        if said["files"].get(kind):
            shown[kind] = said["files"][kind]
    return page.Row(path, shown, legend(said), originals, (width, height))


def legend(said: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Return the colour of each class that a description names as present, most pixels first."""
    present = sorted((one for one in said["classes"] if one["pixels"]), key=lambda c: -c["pixels"])
    colors = {one["name"]: one["color"] for one in present}
    return colors | page.no_class(said["other"]["pixels"] > 0)


def _address(output: str, path: str) -> str | None:
    """Return where a browser that shows O/index.html finds a photo, None where it cannot."""
    if is_url(path):
        return path
    shown = path.lower().endswith(_IN_BROWSERS)
    if not shown or files.is_remote(path) or files.is_remote(output):
        return None
    return quote(os.fsencode(os.path.relpath(path, output)))


def note(checkpoint: str, settings: Mapping[str, Any]) -> str:
    """Say in a line what was asked of which model, without what is switched off."""
    said = {k: v for k, v in settings.items() if v or k not in ("shortlist", "tiles", "closed")}
    if said.pop("closed", False):
        said["threshold"] = "none, every pixel has a class"
    return f"{checkpoint}: " + ", ".join(f"{name} {value}" for name, value in said.items())


def write_page(
    output: str,
    rows: Sequence[page.Row],
    classes: Vocabulary,
    note: str,
    unreadable: Mapping[str, str],
) -> None:
    """Write index.html over all images. unreadable: those that were left out → why."""
    listed = page.Table(
        "Classes",
        ["class", "synonyms"],
        [(entry.name, ", ".join(entry.synonyms)) for entry in classes.classes],
        colors=classes.palette().tolist(),
    )
    tables = [listed]
    if unreadable:
        left_out = list(unreadable.items())
        tables.append(page.Table("Left out: cannot be read", ["image", "why"], left_out))
    page.page(
        os.path.join(output, PAGE),
        f"{plural(len(rows), 'image')}, {plural(len(classes), 'class')}",
        tables=tables,
        rows=rows,
        note=f"{note}. Uncertainty is brightest at each image's own maximum.",
    )
