"""What a user asks of prediction: which images, which classes."""

import glob
import os
from collections.abc import Sequence

from etils import epath

from segdiff_jax import files
from segdiff_jax.data import vocabulary
from segdiff_jax.data.sources import IMAGE_EXTENSIONS
from segdiff_jax.data.vocabulary import Vocabulary
from segdiff_jax.errors import UserError


def parse_classes(text: str) -> Vocabulary:
    """The value of --classes: "a; b, synonym", "@file", or the name of a packaged vocabulary.

    Raises `UserError` for an empty list, an empty or a repeated name, an unreadable file.
    """
    text = text.strip()
    if text in vocabulary.packaged():
        return vocabulary.load(text)
    if text.startswith("@"):
        return vocabulary.load(text[1:])
    return vocabulary.from_names([p for p in text.split(";") if p.strip()], name="--classes")


def find_images(arguments: Sequence[str]) -> list[str]:
    """Files that --images names, each once, in the order of the arguments, folders by name.

    Folders give their images (by extension) and are not searched further down. Raises `UserError`
    for an argument that names nothing.
    """
    found: dict[str, str] = {}  # identity -> path as named
    for argument in arguments:
        for path in _expand(argument):
            found.setdefault(identity(path), path)
    return list(found.values())


def _expand(argument: str) -> list[str]:
    if not argument:
        raise UserError("--images: an empty name, name a file, a folder or a pattern")
    path = epath.Path(argument)
    if path.is_dir():
        inside = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS]
        inside = [p for p in inside if not p.name.startswith(".")]
        if not inside:
            raise UserError(f"--images {argument}: no images in this folder, name another one")
        return sorted(os.fspath(p) for p in inside)
    if path.exists():
        return [argument]
    if not glob.has_magic(argument):
        raise UserError(f"--images {argument}: no such file or folder, correct the path")
    if files.is_remote(argument):
        matches = [os.fspath(p) for p in path.parent.glob(path.name)]
    else:
        matches = [p for p in glob.glob(argument, recursive=True) if os.path.isfile(p)]
    if not matches:
        raise UserError(f"--images {argument}: no file matches this pattern, correct it")
    return sorted(matches)


def identity(path: str) -> str:
    """The same for all names of one file."""
    return path if files.is_remote(path) else os.path.realpath(path)
