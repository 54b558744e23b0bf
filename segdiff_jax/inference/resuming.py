"""Which photos an earlier run has segmented already, and whether in the same way."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from segdiff_jax import files, ownership
from segdiff_jax.inference import overview, writers
from segdiff_jax.inference.photos import Photos
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
            if whole and said["settings"][DIGEST] and said["width"] * said["height"] > 0:
                found[path] = said
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # half of it, or of another version: the photo is segmented again
    return found


def _files(said: Mapping[str, Any]) -> list[str]:
    written = said["files"].values()
    return [name for one in written for name in ([one] if isinstance(one, str) else one or [])]


def is_same(said: Mapping[str, Any] | None, path: str, read: Photos) -> bool:
    """Return whether a photo was read by an earlier run, of the same bytes, and is small enough."""
    if said is None or said["width"] * said["height"] > read.max_pixels:
        return False
    return read.digest(path) == said["settings"][DIGEST]


def changes(
    said: Mapping[str, Any], settings: Mapping[str, Any], classes: Vocabulary, kinds: Sequence[str]
) -> list[str]:
    """Say how a photo was segmented otherwise than is asked now, such as "steps 10 → 20"."""
    try:
        overview.legend(said)
        before, now = dict(said["settings"]), json.loads(files.to_json(settings))
        named = [[one["name"], *one["synonyms"]] for one in said["classes"]]
        colors, written = [one["color"] for one in said["classes"]], set(said["files"])
    except (KeyError, TypeError, AttributeError):
        return ["the description is damaged"]
    found = []
    if before.pop(DIGEST) != now.pop(DIGEST):
        found.append("the clip changed" if "frames" in said else "the photo changed")
    keys = sorted({*before, *now})
    found += [f"{k} {before.get(k)} → {now.get(k)}" for k in keys if before.get(k) != now.get(k)]
    if named != [list(one.names) for one in classes.classes]:
        found.append("the classes changed")
    elif colors != classes.palette().tolist():
        found.append("the colours changed")
    had, wanted = (" ".join(sorted(set(k) - _PICTURES)) or "none" for k in (written, kinds))
    return found + ([f"format {had} → {wanted}"] if had != wanted else [])
