"""Photos and label maps from bytes on disk (local or gs://), whatever their pixel format."""

import io
import os
import stat
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from segdiff_jax import files
from segdiff_jax.errors import UserError

MAX_PIXELS = 89_478_485  # PIL's own limit for decompression bombs: a 256 MB RGB image
FULL_RANGE = 65_535  # the largest value of 16 bits
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_COLOUR_BITS = 12  # 16-bit colour is read by its high bytes: fewer bits in use would be no picture
_ORIENTATION = 0x0112  # the EXIF tag
# What undoes the turn that each value of the tag asks for.
_UNTURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}

# `_open` refuses such images with a line of its own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableError(UserError):
    """A file that cannot be decoded: while training, some of these may be skipped."""


class TooLargeError(UnreadableError):
    """An image of more pixels than are allowed."""


class Photo(NamedTuple):
    """A photo as it is read, and what its file leaves open."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    orientation: int  # of its EXIF tag, 1…8; 1 without one
    guessed_max: int  # the range by which 16-bit pixels were read where the file names none, or 0

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W)."""
        return self.pixels.shape[0], self.pixels.shape[1]


def read_image(
    path: epath.PathLike,
    max_pixels: int = MAX_PIXELS,
    *,
    exif: str = "apply",
    max_value: int = 0,
) -> np.ndarray:
    """Read a photo as uint8 [H, W, 3], turned upright as its EXIF orientation says.

    Transparency is composited over white, as a page shows it. 16-bit gray is scaled to 8 bits.
    Cameras and scanners store 10, 12 or 14 bits in such files: the range is the smallest of 8, 10,
    12, 14 and 16 bits that holds all pixels, unless the file or `max_value` names it.

    Args:
      max_pixels: larger images are refused before they are decoded.
      exif: "ignore" leaves the pixels as they are stored.
      max_value: what white is in 16-bit gray, 1…65535; 0 = by the range of the pixels.

    Raises:
      UnreadableError: missing, empty, truncated, not an image, animated, or too large.
      UserError: a 16-bit pixel is above `max_value`.
    """
    return read_photo(path, max_pixels, exif=exif, max_value=max_value).pixels


def read_photo(
    path: epath.PathLike,
    max_pixels: int = MAX_PIXELS,
    *,
    exif: str = "apply",
    max_value: int = 0,
    data: bytes | None = None,
) -> Photo:
    """Do what `read_image` does, and return what is not sure about the file.

    data: the file's bytes, if they are at hand.
    """
    image, orientation = _open(path, max_pixels, exif, data)
    pixels, guessed = _eight_bit_rgb(path, image, max_value)
    return Photo(pixels, orientation, guessed)


def from_pil(image: Image.Image, max_value: int = 0) -> np.ndarray:
    """Convert a PIL image to uint8 [H, W, 3], as `read_image` of its file would."""
    return _eight_bit_rgb("image", _upright(image), max_value)[0]


def _eight_bit_rgb(
    path: epath.PathLike, image: Image.Image, max_value: int
) -> tuple[np.ndarray, int]:
    """Return uint8 [H, W, 3], and the range of 16-bit pixels if it was guessed, else 0."""
    if image.mode in _SIXTEEN_BIT:
        gray, guessed = _eight_bits(path, image, max_value)
        return np.repeat(gray[..., None], 3, axis=-1), guessed
    if image.mode == "F":
        raise UnreadableError(f"{path}: floating-point pixels, save it with 8 or 16 bits")
    deep = image.info.get("deep_colour", False)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        foreground = image.convert("RGBA")
        page = Image.new("RGBA", foreground.size, (255, 255, 255, 255))
        image = Image.alpha_composite(page, foreground)
    pixels = np.array(image.convert("RGB"))
    if deep and pixels.max() < 2 ** (_COLOUR_BITS - 8):
        raise UnreadableError(
            f"{path}: 16-bit colour that uses {_COLOUR_BITS} bits or fewer, which would be read "
            "as black: save it with 8 bits"
        )
    return pixels, 0


def read_labels(
    path: epath.PathLike, max_pixels: int = MAX_PIXELS, *, exif: str = "apply"
) -> np.ndarray:
    """Read class ids [H, W]: uint8, or int32 when an id is above 255.

    The indices of a palette image are the ids, not its colours; colours that are all gray are ids
    too. Raises `UnreadableError` as `read_image` does, and `UserError` for images that hold no ids
    (other colours, JPEG).
    """
    image, _ = _open(path, max_pixels, exif)
    if image.format in ("JPEG", "MPO"):
        raise UserError(f"{path}: JPEG changes class ids, save labels as PNG")
    if largest := image.info.get("spread_max", 0):
        white = FULL_RANGE if image.mode in _SIXTEEN_BIT else 255
        image = Image.fromarray(np.round(np.asarray(image) * (largest / white)).astype(np.int32))
    if image.mode in _SIXTEEN_BIT:
        labels = np.asarray(image).astype(np.int32)
        return labels.astype(np.uint8) if 0 <= labels.min() <= labels.max() <= 255 else labels
    if image.mode in ("P", "L", "1"):
        return np.array(image).astype(np.uint8)
    if image.mode in ("LA", "RGB", "RGBA"):
        bands = np.asarray(image)
        colours = bands[..., :1] if image.mode == "LA" else bands[..., :3]
        if (colours == colours[..., :1]).all():
            return np.ascontiguousarray(colours[..., 0])
    raise UserError(
        f"{path}: {image.mode} colours are not class ids, save a palette or grayscale PNG whose "
        "values are the ids"
    )


class Header(NamedTuple):
    """What can be said of a photo without decoding it, where it has 8 bits."""

    size: tuple[int, int]  # (H, W) as it is read
    orientation: int  # as of `Photo`
    guessed_max: int  # as of `Photo`


def look_at(
    path: epath.PathLike, max_pixels: int = MAX_PIXELS, *, exif: str = "apply", max_value: int = 0
) -> Header:
    """Return size and doubts of a photo. Raise as `read_image` does, but find less damage."""
    image = _opened(path, max_pixels)
    orientation = _orientation(image)
    size = stored = (image.height, image.width)
    if orientation >= 5:
        upright_already = image.format == "TIFF"  # PIL turns these itself
        turned = (image.width, image.height)
        size, stored = (size, turned) if upright_already else (turned, stored)
    guessed = 0
    if image.mode in _SIXTEEN_BIT and not max_value:
        guessed = read_photo(path, max_pixels, exif=exif).guessed_max
    return Header(size if exif == "apply" else stored, orientation, guessed)


def guessed_range(guessed: Mapping[int, int], photos: int) -> str:
    """Word a warning about photos of 16 bits; `guessed`: how many were read by which range."""
    ranges = " and ".join(f"0…{white}" for white in sorted(guessed))
    return (
        f"{sum(guessed.values())} of {photos} photos have 16-bit files whose pixels use less, and "
        f"are read by the range {ranges}: to give all photos one, set "
        f"config.data.max_value={max(guessed)}, or {FULL_RANGE} for 16 bits in full"
    )


def _eight_bits(path: epath.PathLike, image: Image.Image, max_value: int) -> tuple[np.ndarray, int]:
    """Return gray uint8 [H, W] of 16-bit pixels, and the range if it was guessed, else 0."""
    values = np.asarray(image).astype(np.int64)
    highest = int(values.max())
    if values.min() < 0 or highest > FULL_RANGE:
        raise UnreadableError(f"{path}: more than 16 bits a pixel, save it with 8 or 16")
    if max_value and highest > max_value:
        raise UserError(
            f"{path}: a pixel of {highest}, more than config.data.max_value={max_value}: raise it"
        )
    declared = max_value or image.info.get("declared_max", 0)
    white = declared or next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if highest < 2**bits)
    gray = np.round(values * (255 / white)).astype(np.uint8)
    return gray, 0 if declared or white == FULL_RANGE else white


def _open(
    path: epath.PathLike, max_pixels: int, exif: str, data: bytes | None = None
) -> tuple[Image.Image, int]:
    """Return the decoded image, upright unless exif = "ignore", and its EXIF orientation.

    `format` survives; `info` says what the header does of the range: "declared_max" of gray,
    "deep_colour", and "spread_max", the largest value in a file that PIL shows as white.
    """
    image = _opened(path, max_pixels, data)
    said, orientation = _said_of_range(image), _orientation(image)  # PIL decodes a PNG for its tags
    try:
        # Phones write MPO: a JPEG with a preview behind it, whose first frame is the photo.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames == 1:
            image.load()
    except Exception as error:
        raise UnreadableError(f"{path}: truncated or damaged, replace or remove it") from error
    if frames > 1 and image.format == "TIFF":
        raise UnreadableError(f"{path}: has {frames} pages: save one of them as a file of its own")
    if frames > 1:
        raise UnreadableError(f"{path}: animated ({frames} frames), save one frame as PNG or JPEG")
    turned = _upright(image) if exif == "apply" else _as_stored(image, orientation)
    turned.format = image.format
    turned.info.update(said)
    return turned, orientation


def read_bytes(path: epath.PathLike) -> bytes:
    """Read a file. Raises `UnreadableError` for what is none, without waiting for it."""
    try:
        with files.reading(path):
            # A pipe would be waited for, a device such as /dev/zero never ends.
            if not files.is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
                raise UnreadableError(
                    f"{path}: cannot be read, it is {_kind_of(path)}, not a file: check the path"
                )
            return epath.Path(path).read_bytes()
    except FileNotFoundError as error:
        broken = files.dangling(path)
        raise UnreadableError(broken or f"{path}: no such file, check the path") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UnreadableError(f"{path}: cannot be read ({reason}), check the path") from error


def _opened(path: epath.PathLike, max_pixels: int, data: bytes | None = None) -> Image.Image:
    """The image, its header read and its pixels not yet."""
    if data is None:
        data = read_bytes(path)
    if not data:
        raise UnreadableError(f"{path}: empty file, replace or remove it")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # PIL would refuse what the user has asked for
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise TooLargeError(_too_large(path, max_pixels)) from error
    except Exception as error:  # PIL's plugins raise anything on damaged headers
        raise UnreadableError(f"{path}: not an image, replace or remove it") from error
    if image.width * image.height > max_pixels:
        raise TooLargeError(_too_large(path, max_pixels))
    return image


def _kind_of(path: epath.PathLike) -> str:
    mode = os.stat(path).st_mode
    kinds = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((kind for kind, holds in kinds.items() if holds(mode)), "a device")


def _too_large(path: epath.PathLike, max_pixels: int) -> str:
    return (
        f"{path}: more than {max_pixels:,} pixels (decompression bomb?): make it smaller, or raise "
        "the limit (config.data.max_pixels)"
    )


def _said_of_range(image: Image.Image) -> dict[str, object]:
    """Return what the header says of 16-bit pixels, as far as PIL tells before they are decoded."""
    tiles = getattr(image, "tile", [])
    codec, *_, arguments = tiles[0] if tiles else ("", "")
    mode, *more = (arguments,) if isinstance(arguments, str) else arguments or ("",)
    if image.format == "PPM" and codec != "raw":  # PIL spreads these over 8 or 16 bits
        return {"declared_max": FULL_RANGE, "spread_max": more[0] if more else 0}
    said: dict[str, object] = {"spread_max": {"L;2": 3, "L;4": 15}.get(mode, 0)}
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(258, ())
        if len(bits) == 1 and 8 < bits[0] < 16:
            return said | {"declared_max": 2 ** bits[0] - 1}
        return said | {"deep_colour": len(bits) > 2 and min(bits) == 16}
    return said | {"deep_colour": image.format == "PNG" and mode.endswith(";16B")}


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata says nothing about the pixels
        return 1
    return value if value in _UNTURN else 1


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata says nothing about the pixels
        return image


def _as_stored(image: Image.Image, orientation: int) -> Image.Image:
    if image.format != "TIFF" or orientation == 1:
        return image
    return image.transpose(_UNTURN[orientation])  # PIL has turned it while decoding
