"""What a user asks of prediction: which images, which classes."""

import glob
import itertools
import os
from collections.abc import Sequence

from etils import epath

from segdiff_jax import files, ownership
from segdiff_jax.data import vocabulary
from segdiff_jax.data.sources import IMAGE_EXTENSIONS
from segdiff_jax.data.vocabulary import Vocabulary
from segdiff_jax.errors import UserError

_MOST_FOLDERS = 1000  # that are looked into for images that were meant


def parse_classes(text: str) -> Vocabulary:
    """The value of --classes: "a; b, synonym", "@file", or the name of a packaged vocabulary.

    Raises `UserError` for an empty list, an empty or a repeated name, an unreadable file.
    """
    text = text.strip()
    if text in vocabulary.packaged():
        return vocabulary.load(text)
    if text.startswith("@"):
        files.check_scheme(text[1:])
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


def without_results(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """`paths` parted into photos and the files that an earlier command wrote beside them.

    The latter are those that the marker of their folder lists (`ownership`), nothing else.
    """
    listed: dict[str, set[str]] = {}

    def is_ours(path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set().union(*ownership.owned(folder or ".").values())
        return name in listed[folder]

    ours = [path for path in paths if is_ours(path) or is_ours(identity(path))]
    return [path for path in paths if path not in set(ours)], ours


def _expand(argument: str) -> list[str]:
    if not argument:
        raise UserError("--images: an empty name, name a file, a folder or a pattern")
    files.check_scheme(argument)
    path = epath.Path(argument)
    try:
        with files.reading(argument):
            if path.is_dir():
                return _images_in(argument)
            if path.exists():
                return [argument]
            if glob.has_magic(argument):
                return _matches(argument)
    except OSError as error:
        raise UserError(f"--images {argument}: {error.strerror}: correct the path") from error
    wrong = files.dangling(argument) or f"{argument}: no such file or folder, correct the path"
    raise UserError(f"--images {wrong}")


def _images_in(folder: str) -> list[str]:
    inside = [p for p in epath.Path(folder).iterdir() if _is_image(p.name)]
    found = [os.fspath(p) for p in inside if files.is_remote(folder) or not os.path.isdir(p)]
    if not found:
        raise UserError(f"--images {folder}: no images in this folder{_nearby(folder)}")
    return sorted(found)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS and not name.startswith(".")


def _nearby(folder: str) -> str:
    """What to do about a folder without images: which of its sub-folders have some."""
    found: list[str] = []
    if not files.is_remote(folder):
        for root, folders, names in itertools.islice(os.walk(folder), _MOST_FOLDERS):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [os.path.join(root, name) for name in names if _is_image(name)]
    if not found:
        return ", name another one"
    first = min(found)
    pattern = os.path.join(glob.escape(folder), "**", f"*{os.path.splitext(first)[1]}")
    return (
        f", but {len(found)} in its sub-folders, such as {first}: name one of those, "
        f"or all with '{pattern}'"
    )


def _matches(pattern: str) -> list[str]:
    if files.is_remote(pattern):
        path = epath.Path(pattern)
        found = [os.fspath(p) for p in path.parent.glob(path.name)]
    else:
        # Whatever is there, but for folders: what cannot be read is told of when it is opened.
        everything = glob.glob(_literal_start(pattern), recursive=True)
        found = [path for path in everything if not os.path.isdir(path)]
    if not found:
        hint = ""
        if "[" in pattern:
            hint = "; [ and ] enclose letters to choose from: write [[] for a bracket itself"
        raise UserError(f"--images {pattern}: no file matches this pattern, correct it{hint}")
    return sorted(found)


def _literal_start(pattern: str) -> str:
    """`pattern` with its first folders escaped, as far as there are folders of just these names."""
    parts = pattern.split(os.sep)
    for count in range(len(parts) - 1, 0, -1):
        start = os.sep.join(parts[:count])
        if glob.has_magic(start) and os.path.isdir(start):
            return os.path.join(glob.escape(start), *parts[count:])
    return pattern


def identity(path: str) -> str:
    """The same for all names of one file."""
    return path if files.is_remote(path) else os.path.realpath(path)
