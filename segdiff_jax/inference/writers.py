"""The files of one predicted image: in the formats asked for, a picture, and a description."""

import collections
import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import Any

import numpy as np
from etils import epath

from segdiff_jax import codec, files, ownership
from segdiff_jax.config import Config
from segdiff_jax.errors import UserError
from segdiff_jax.inference import formats, pictures
from segdiff_jax.inference.photos import file_name, identity
from segdiff_jax.inference.result import Segmentation
from segdiff_jax.text.vocabulary import Vocabulary

_LONGEST_NAME = 255  # bytes, on most file systems
_ALWAYS = ("_overlay.png", "_uncertainty.png", ".json")  # whatever formats are asked for

KIND = "prediction"  # of a folder's marker (`ownership`)


def names(paths: Sequence[str]) -> dict[str, str]:
    """Return what the results of each of `paths` are called: <name>_labels.png and so on.

    It is the file's stem, its whole name where several stems are equal or one `is_coco`, and with
    the names of the folders above it where these are equal too: <folder>_<name>. Raise `UserError`
    if even so two are the same, or one is too long for a file.
    """
    named = {path: _plain(file_name(path)) for path in paths}
    named |= {path: f"{name}_" for path, name in named.items() if is_coco(name)}
    stems = {path: PurePath(name).stem for path, name in named.items()}
    stems |= {path: named[path] for path, stem in stems.items() if is_coco(stem)}
    forms = [stems, named]
    for depth in range(1, max(path.count("/") for path in paths) + 1):
        forms += [
            {p: "_".join([*_folders(p)[-depth:], n]) for p, n in f.items()} for f in forms[:2]
        ]
    chosen: dict[str, str] = {}
    for form in forms:
        left = {path: name for path, name in form.items() if path not in chosen}
        counts = collections.Counter(left.values())
        taken = set(chosen.values())
        chosen |= {p: n for p, n in left.items() if counts[n] == 1 and n not in taken}
    for path in paths:
        if path not in chosen:
            raise UserError(
                f"{path}: its results would have the name of another one's, {named[path]}: "
                "rename one, or use two --output folders"
            )
        if len(f"{chosen[path]}_uncertainty.png".encode()) > _LONGEST_NAME:
            raise UserError(f"{path}: its results' names would be too long: rename it")
    return {path: chosen[path] for path in paths}


def is_coco(stem: str) -> bool:
    """Return whether <stem>.json may be a file of the format COCO: no description may be that."""
    return bool(re.fullmatch("(.*_)?coco", stem))


def _folders(path: str) -> list[str]:
    return [_plain(part) for part in path.split("/")[:-1] if part not in ("", ".", "..")]


def _plain(name: str) -> str:
    """Replace what no list of names can hold: a line break and its like."""
    return re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", "_", files.shown(name))


def outputs(names: Iterable[str], kinds: Sequence[str], count: int) -> list[str]:
    """Return all files that may be written for images of these `names` and `count` classes."""
    found = [end for kind in kinds for end in formats.SUMMARIES.get(kind, ())]
    for name in names:
        found += [path for kind in kinds for path in formats.names_of(name, kind, count)]
        found += [f"{name}{end}" for end in _ALWAYS]
    return found


def check_output(output: str, names: Mapping[str, str], written: Sequence[str]) -> None:
    """Raise `UserError` if a file to be written would replace another, a photo or one not ours.

    names: path → name of its results.
    """
    for name, count in collections.Counter(written).items():
        if count > 1:
            raise UserError(
                f"--output {output}: two of --images would give {name}: use two --output folders"
            )
    inputs = {identity(path) for path in names}
    for name in written:
        if identity(os.path.join(output, name)) in inputs:
            raise UserError(
                f"--output {output}: {name} would overwrite an image of --images: "
                "choose another folder"
            )
    ownership.check(output, KIND, written)


def all_settings(settings: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return those settings of the model that shape its results, with `settings` of the call."""
    groups = config.sampler, config.codec, config.diffusion, config.prompts
    of_model = {k: v for group in groups for k, v in dataclasses.asdict(group).items()}
    view = {name: getattr(config.data, name) for name in ("image_size", "fit", "max_value")}
    return of_model | view | dict(settings)


def write(
    output: str,
    name: str,
    path: str,
    found: Segmentation,
    settings: Mapping[str, Any],
    kinds: Sequence[str],
) -> dict[str, Any]:
    """Write the files of the image at `path`, all or none of them, and return its description.

    name: what its results are called in the folder `output`: "a" for O/a_labels.png and so on.

    Raise `UserError` if a file cannot be written.
    """
    contents, description = contents_of(name, path, found, settings, kinds)
    _write_set(output, contents)
    remove(output, name, contents)
    return description


def contents_of(
    name: str, path: str, found: Segmentation, settings: Mapping[str, Any], kinds: Sequence[str]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the files of one image, its description last, and what that says."""
    contents = _pictured(name, path, found, kinds)
    description = {"image": path} | _describe(found, settings)
    description["files"] = _by_kind(name, found, kinds, contents)
    contents[f"{name}.json"] = files.to_json(description).encode("utf-8")
    return contents, description


def _pictured(name: str, path: str, found: Segmentation, kinds: Sequence[str]) -> dict[str, bytes]:
    """Make the files of one image but its description, side by side: zlib lets threads run."""
    source = files.shown(file_name(path))
    makers: dict[str, Callable[[], bytes | None]] = {}
    for kind in kinds:
        makers |= formats.makers(name, kind, found, source)
    makers[f"{name}_overlay.png"] = lambda: pictures.encode(found.overlay(), level=1)
    spread = found.uncertainty
    if spread is not None:
        colored = lambda: pictures.encode(pictures.uncertainty_map(spread), level=1)  # noqa: E731
        makers[f"{name}_uncertainty.png"] = colored
    with ThreadPoolExecutor(2) as pool:
        made = zip(makers, pool.map(lambda make: make(), makers.values()), strict=True)
        return {file: data for file, data in made if data is not None}


def _describe(found: Segmentation, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what O/<name>.json says of one image. Shares are of its pixels and sum to 1."""
    other, spread = codec.ignore_label(len(found.classes)), found.uncertainty
    height, width = found.labels.shape
    return {
        "width": width,
        "height": height,
        **counted(found.vocabulary, np.bincount(found.labels.ravel(), minlength=other + 1)),
        "uncertainty": None
        if spread is None
        else {"mean": float(spread.mean()), "max": float(spread.max())},
        "settings": dict(settings),
    }


def counted(classes: Vocabulary, pixels: np.ndarray) -> dict[str, Any]:
    """Return what a description says of each class and of *other*: of each label, its `pixels`."""
    total = pixels.sum()

    def count(label: int) -> dict[str, Any]:
        return {"pixels": int(pixels[label]), "share": float(pixels[label] / total)}

    colors, other = classes.palette().tolist(), codec.ignore_label(len(classes))
    listed = [
        {"id": i, "name": e.name, "synonyms": list(e.synonyms), "color": colors[i], **count(i)}
        for i, e in enumerate(classes.classes)
    ]
    return {"classes": listed, "other": {"id": other, **count(other)}}


def _by_kind(
    name: str, found: Segmentation, kinds: Sequence[str], contents: Mapping[str, bytes]
) -> dict[str, Any]:
    """Name the files there are of each format, in a list where it has several, and the pictures."""
    written: dict[str, Any] = {}
    for kind in kinds:
        named = formats.names_of(name, kind, len(found.classes))
        several = len(formats.FORMATS[kind]) > 1 or formats.FORMATS[kind][0].per_class
        written[kind] = [file for file in named if file in contents] if several else named[0]
    for kind in ("overlay", "uncertainty"):
        picture = f"{name}_{kind}.png"
        written[kind] = picture if picture in contents else None
    return written


def _write_set(output: str, contents: Mapping[str, bytes]) -> None:
    """Write all files of one image or, if one cannot be written, none of them."""
    written = []
    try:
        for name, data in contents.items():
            files.write_bytes(os.path.join(output, name), data)
            written.append(name)
    except BaseException:
        for name in written:
            epath.Path(output, name).unlink(missing_ok=True)
        raise


def remove(output: str, name: str, but: Iterable[str] = ()) -> None:
    """Remove what an earlier run wrote of an image, `but` for what this one has written."""
    patterns = [file.name for kind in formats.FORMATS.values() for file in kind]
    named = [re.escape(p).replace(r"\{name\}", re.escape(name)) for p in patterns]
    ours = re.compile("|".join(p.replace(r"\{number\}", r"\d+") for p in named))
    listed = ownership.owned(output).get(KIND, frozenset())
    always = {f"{name}{end}" for end in _ALWAYS}
    _remove(output, {file for file in listed if file in always or ours.fullmatch(file)} - set(but))


def write_summaries(
    output: str, names: Sequence[str], classes: Vocabulary, kinds: Sequence[str]
) -> None:
    """Write what formats of whole sets need beside the files of the images of these `names`.

    What an earlier run wrote of a format that is not asked for now is removed, and so are files of
    its other images in the folder of a format where ids now mean other classes.
    """

    def read(name: str) -> bytes:
        return epath.Path(output, name).read_bytes()

    listed = ownership.owned(output).get(KIND, frozenset())
    for kind in formats.SUMMARIES:
        if kind not in kinds:
            _remove(output, listed & set(formats.SUMMARIES[kind]))
            continue
        made = formats.summary(kind, read, names, classes)
        meaning = formats.SUMMARIES[kind][0]  # of the ids, in YOLO's and CVAT's folders
        if not epath.Path(output, meaning).exists() or read(meaning) != made[meaning]:
            own = {file for name in names for file in formats.names_of(name, kind, len(classes))}
            inside = {file for file in listed if file.startswith(f"{kind}/")}
            _remove(output, inside - own - set(made))
        _write_set(output, made)


def _remove(output: str, stale: Iterable[str]) -> None:
    for name in stale:
        epath.Path(output, name).unlink(missing_ok=True)


@contextlib.contextmanager
def claimed(output: str, written: Sequence[str]) -> Iterator[None]:
    """List the files of a run in O's marker, around the block that writes them.

    In the end what the block removed is off the list: a new file of that name would not be ours.
    """
    with ownership.claimed(output, KIND, written):
        yield
    ownership.release_unwritten(output, KIND, ownership.owned(output).get(KIND, ()))
