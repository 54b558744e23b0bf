"""Which photos or clips --images names, and their bytes: files, folders, patterns, URLs, stdin.

find      arguments → paths and URLs, each once; folders with all that is below them
Photos    a path or URL → its bytes, fetched once, their digest and the decoded photo
checked   every photo or clip decoded once, before anything is loaded or written
"""

import glob
import hashlib
import http.client
import logging
import os
import re
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from etils import epath

from segdiff_jax import __version__, files, ownership, waiting
from segdiff_jax.config import DataConfig
from segdiff_jax.data import images
from segdiff_jax.data.sources.pairing import is_image, listing
from segdiff_jax.errors import UserError
from segdiff_jax.inference.requests import STDIN, is_url
from segdiff_jax.progress import Progress

CLIPS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_MOST_NAMED = 10  # unreadable images in one message
_MOST_BYTES = 256 * 2**20  # of one photo from the network or stdin
_LONGEST_CLIP = 8 * 2**30  # bytes of one clip from the network
_KEPT_BYTES = 256 * 2**20  # of decoded photos between the check and their use


def find(arguments: Sequence[str], flag: str = "--images") -> list[str]:
    """Return files and URLs that `flag` names, each once, by the order of the arguments and name.

    Folders give their images (by extension) and those of all folders below, but for hidden ones,
    and where there are none their clips. Raise `UserError` for an argument that names nothing.
    """
    found: dict[str, str] = {}  # identity -> path as named
    for one in arguments:
        for path in _expand(one, flag):
            found.setdefault(identity(path), path)
    return list(found.values())


def identity(path: str) -> str:
    """Return what is the same for all names of one file."""
    remote = path == STDIN or files.is_remote(path)
    return path if remote else os.path.realpath(path)


def file_name(path: str) -> str:
    """Return the name of a photo's file, as far as it has one."""
    if is_url(path):
        last = PurePosixPath(unquote(urlsplit(path).path)).name
        return re.sub(r"[\x00-\x1f/\\]", "_", last) or urlsplit(path).netloc
    return "stdin" if path == STDIN else os.path.basename(path)


def are_clips(paths: Sequence[str]) -> bool:
    """Return whether `paths` are clips. Raise `UserError` if some are and others are not."""
    found = [path for path in paths if is_clip(path)]
    if found and len(found) < len(paths):
        mend = "predict clips and photos in commands of their own"
        raise UserError(f"--images: {found[0]} is a clip, others are photos: {mend}")
    return bool(found)


def is_clip(path: str) -> bool:
    return os.path.splitext(file_name(path))[1].lower() in CLIPS


def without_results(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part `paths` into photos and the files that an earlier command wrote beside them.

    The latter are those that the marker of their folder lists (`ownership`), nothing else.
    """
    listed: dict[str, set[str]] = {}

    def is_ours(path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set().union(*ownership.owned(folder or ".").values())
        return name in listed[folder]

    elsewhere = {path for path in paths if path == STDIN or is_url(path)}
    ours = [p for p in paths if p not in elsewhere and (is_ours(p) or is_ours(identity(p)))]
    return [path for path in paths if path not in set(ours)], ours


class Photos:
    """Reads photos by the names that `find` gave.

    max_pixels: of a photo; None: as `data` says. folder: of files for what the network sends.
    digests: path → SHA-256 of the photos whose bytes were read.
    """

    def __init__(self, data: DataConfig, max_pixels: int | None, folder: str):
        self.max_pixels = max_pixels or data.max_pixels
        self._max_value, self._folder = data.max_value, Path(folder)
        self._fetched: dict[str, Path] = {}
        self._decoded: dict[str, images.Photo] = {}
        self.digests: dict[str, str] = {}

    def read(self, path: str) -> images.Photo:
        """Return the decoded photo. Raise as `images.read_photo` does."""
        return self._decoded.pop(path, None) or self._decode(path, self._bytes(path))

    def digest(self, path: str) -> str:
        """Return the SHA-256 of the photo's bytes. Raise `UnreadableError` if it has none."""
        if path not in self.digests:
            with open(self.local(path), "rb") as file:  # a clip is larger than memory
                self.digests[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return self.digests[path]

    def check(self, path: str) -> images.Photo:
        """Decode a photo and compute its digest; keep it for `read`, as long as 256 MB hold all."""
        data = self._bytes(path)
        self.digests[path] = hashlib.sha256(data).hexdigest()
        photo = self._decode(path, data)
        if sum(one.pixels.nbytes for one in self._decoded.values()) < _KEPT_BYTES:
            self._decoded[path] = photo
        return photo

    def local(self, path: str) -> str:
        """Return a file of this machine with the bytes at `path`, fetched here but once.

        Raise `UnreadableError` for what is no file.
        """
        if path != STDIN and not files.is_remote(path):
            if not (os.path.isfile(path) and os.access(path, os.R_OK)):
                images.read_bytes(path)  # which says what is wrong
            return path
        if path not in self._fetched:
            place = self._folder / str(len(self._fetched))
            if path == STDIN:
                place.write_bytes(_from_stdin())
            elif is_url(path):
                _download(path, place)
            else:
                place.write_bytes(images.read_bytes(path))
            self._fetched[path] = place
        return os.fspath(self._fetched[path])

    def too_large(self, path: str) -> images.TooLargeError:
        return images.TooLargeError(
            f"{path}: more than {self.max_pixels:,} pixels (decompression bomb?): make it smaller"
        )

    def _decode(self, path: str, data: bytes) -> images.Photo:
        try:
            return images.read_photo(path, self.max_pixels, max_value=self._max_value, data=data)
        except images.TooLargeError as error:
            raise self.too_large(path) from error

    def _bytes(self, path: str) -> bytes:
        elsewhere = path == STDIN or is_url(path)
        return Path(self.local(path)).read_bytes() if elsewhere else images.read_bytes(path)


def _from_stdin() -> bytes:
    data = sys.stdin.buffer.read(_MOST_BYTES + 1)
    if not data:
        raise images.UnreadableError("-: nothing on stdin: send one photo, such as < photo.jpg")
    if len(data) > _MOST_BYTES:
        raise images.TooLargeError(f"-: more than {_MOST_BYTES >> 20} MB on stdin: send one photo")
    return data


def _download(url: str, place: Path) -> None:
    """Fetch what is at an address. Raise `UnreadableError`, of one line, if that is no photo."""
    most = _LONGEST_CLIP if is_clip(url) else _MOST_BYTES
    wait = waiting.Wait(urlsplit(url).netloc, waiting.NETWORK, "check the address and the network")

    def fetch() -> None:
        request = urllib.request.Request(url, headers={"User-Agent": f"segdiff_jax/{__version__}"})
        seconds = waiting.limit(waiting.NETWORK)
        with urllib.request.urlopen(request, timeout=seconds) as answer, place.open("wb") as file:
            if answer.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
                raise images.UnreadableError(
                    f"{url}: a web page, not an image: give the address of the image itself"
                )
            while part := answer.read(1 << 20):
                wait.heard()
                file.write(part)
                if file.tell() > most:
                    raise images.TooLargeError(f"{url}: more than {most >> 20} MB: make it smaller")

    try:
        return waiting.bounded(fetch, wait)
    except urllib.error.HTTPError as error:
        why = f"the server answers {error.code} {error.reason}"
    except waiting.NoAnswer as error:
        raise images.UnreadableError(str(error)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = " ".join(str(getattr(error, "reason", None) or error).split()) or repr(error)
    raise images.UnreadableError(f"{url}: cannot be fetched ({why}): check the address")


def checked(
    look: Callable[[str], int],
    paths: Sequence[str],
    skip: bool,
    progress: Progress,
) -> dict[str, str]:
    """Decode every photo once, before anything is loaded or written; return path → what is wrong.

    look: decodes what is at a path, where that is needed, and returns `guessed_max` of a photo.
    Raise `UserError`, which names all bad ones, unless they are to be skipped and others are left.
    """
    found: dict[str, images.UnreadableError] = {}
    guessed: Counter[int] = Counter()
    for count, path in enumerate(paths, 1):
        try:
            guessed[look(path)] += 1
        except images.UnreadableError as error:
            found[path] = error
        if not found or skip:
            progress(count, len(paths))
    if found and not (skip and len(found) < len(paths)):
        raise _all_unreadable(found, len(paths))
    del guessed[0]  # nothing to guess
    if guessed:
        logging.warning("%s", images.guessed_range(guessed, len(paths)))
    return {path: str(error) for path, error in found.items()}


def _all_unreadable(found: Mapping[str, images.UnreadableError], total: int) -> UserError:
    shown = "; ".join(str(error) for error in list(found.values())[:_MOST_NAMED])
    more = f"; and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    mends = []
    if any(isinstance(error, images.TooLargeError) for error in found.values()):
        mends.append("--max-pixels N reads larger ones")
    if len(found) < total:
        mends.append("--skip-unreadable leaves them out")
    counted = f"{len(found)} of {total} images cannot be read: " if total > 1 else ""
    return UserError("".join((counted, shown, more, *(f"; {mend}" for mend in mends))))


def _expand(argument: str, flag: str) -> list[str]:
    if argument == STDIN or is_url(argument):
        return [argument]
    if not argument:
        raise UserError(f"{flag}: an empty name, name a file, a folder or a pattern")
    files.check_scheme(argument)
    path = epath.Path(argument)
    try:
        with files.reading(argument):
            if path.is_dir():
                return _images_in(argument, flag)
            if path.exists():
                return [argument]
            if glob.has_magic(argument):
                return _matches(argument, flag)
    except OSError as error:
        raise UserError(f"{flag} {argument}: {error.strerror}: correct the path") from error
    wrong = files.dangling(argument) or f"{argument}: no such file or folder, correct the path"
    raise UserError(f"{flag} {wrong}")


def _images_in(folder: str, flag: str) -> list[str]:
    names = sorted(listing(epath.Path(folder)))
    found = list(filter(is_image, names)) or list(filter(is_clip, names))
    if not found:
        raise UserError(f"{flag} {folder}: no images in this folder, name another one")
    return [os.fspath(epath.Path(folder) / name) for name in found]


def _matches(pattern: str, flag: str) -> list[str]:
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
        raise UserError(f"{flag} {pattern}: no file matches this pattern, correct it{hint}")
    return sorted(found)


def _literal_start(pattern: str) -> str:
    """Return `pattern` with its first folders escaped, as far as folders have just these names."""
    parts = pattern.split(os.sep)
    for count in range(len(parts) - 1, 0, -1):
        start = os.sep.join(parts[:count])
        if glob.has_magic(start) and os.path.isdir(start):
            return os.path.join(glob.escape(start), *parts[count:])
    return pattern
