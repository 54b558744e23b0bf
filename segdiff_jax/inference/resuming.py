"""Which photos an earlier run has segmented already, and whether in the same way."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from segdiff_jax import files, ownership
from segdiff_jax.inference import page, writers
from segdiff_jax.text.vocabulary import Vocabulary

DIGEST = "photo_sha256"  # among the settings of a photo's description
_PICTURES = {"overlay", "uncertainty"}  # written whatever is asked for


def earlier(output: str, names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return what O/<name>.json says of each photo that has one, if all files it names are there.

    names: path of a photo → name of its results. Only what the folder's marker lists counts
    (`ownership`).
    """
    ours = ownership.owned(output).get(writers.KIND, frozenset())
    folder, found = epath.Path(output), {}
    for path, name in names.items():
        if f"{name}.json" not in ours:
            continue
        try:
            with files.reading(folder):
                said = json.loads((folder / f"{name}.json").read_bytes())
                whole = all(file in ours and (folder / file).exists() for file in _files(said))
            if whole and DIGEST in said["settings"]:
                found[path] = said
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # half of it, or of another version: the photo is segmented again
    return found


def _files(said: Mapping[str, Any]) -> list[str]:
    written = said["files"].values()
    return [name for one in written for name in ([one] if isinstance(one, str) else one or [])]


def changes(
    said: Mapping[str, Any], settings: Mapping[str, Any], classes: Vocabulary, kinds: Sequence[str]
) -> list[str]:
    """Say how a photo was segmented otherwise than is asked now, such as "steps 10 → 20"."""
    before, now = said["settings"], json.loads(files.to_json(settings))
    found = ["the photo"] if before[DIGEST] != now[DIGEST] else []
    keys = sorted({*before, *now} - {DIGEST})
    found += [f"{k} {before.get(k)} → {now.get(k)}" for k in keys if before.get(k) != now.get(k)]
    listed = [[one["name"], *one["synonyms"]] for one in said["classes"]]
    found += ["the classes"] if listed != [list(one.names) for one in classes.classes] else []
    had = sorted(set(said["files"]) - _PICTURES)
    return found + ([f"format {' '.join(had)}"] if had != sorted(set(kinds)) else [])


def row(
    output: str, path: str, pixels: np.ndarray, said: Mapping[str, Any], classes: Vocabulary
) -> page.Row:
    """Return the photo's row of the page, as the run that segmented it had it."""
    present = sorted((one for one in said["classes"] if one["pixels"]), key=lambda c: -c["pixels"])
    colors = dict(zip(classes.names, classes.palette().tolist(), strict=True))
    legend = {one["name"]: colors[one["name"]] for one in present}
    other = page.no_class(said["other"]["pixels"] > 0)
    return writers.row(output, path, pixels, legend | other, said["files"])
