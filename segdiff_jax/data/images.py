"""Photos and label maps from bytes on disk (local or gs://), whatever their pixel format."""

import io
import os
import stat
import warnings

import numpy as np
from etils import epath
from PIL import Image, ImageOps

from segdiff_jax import files
from segdiff_jax.errors import UserError

MAX_PIXELS = 89_478_485  # PIL's own limit for decompression bombs: a 256 MB RGB image
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")

# `_open` refuses such images with a line of its own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableError(UserError):
    """A file that cannot be decoded: while training, some of these may be skipped."""


class TooLargeError(UnreadableError):
    """An image of more pixels than are allowed."""


def read_image(path: epath.PathLike, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 [H, W, 3], sRGB, turned upright as its EXIF orientation says.

    16-bit gray is scaled to 8 bits; transparency is composited over white, as a page shows it.
    Raises `UnreadableError` when missing, empty, truncated, not an image, animated, or larger
    than `max_pixels`.
    """
    image = _open(path, max_pixels)
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableError(f"{path}: more than 16 bits a pixel, save it with 8 or 16")
        gray = np.round(values / 257).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1)
    if image.mode == "F":
        raise UnreadableError(f"{path}: floating-point pixels, save it with 8 or 16 bits")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        foreground = image.convert("RGBA")
        page = Image.new("RGBA", foreground.size, (255, 255, 255, 255))
        image = Image.alpha_composite(page, foreground)
    return np.array(image.convert("RGB"))


def read_labels(path: epath.PathLike, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Class ids [H, W]: uint8, or int32 when an id is above 255.

    The indices of a palette image are the ids, not its colours. Raises `UnreadableError` as
    `read_image` does, and `UserError` for images that hold no ids (RGB, JPEG).
    """
    image = _open(path, max_pixels)
    if image.format in ("JPEG", "MPO"):
        raise UserError(f"{path}: JPEG changes class ids, save labels as PNG")
    if image.mode in _SIXTEEN_BIT:
        labels = np.asarray(image).astype(np.int32)
        return labels.astype(np.uint8) if 0 <= labels.min() <= labels.max() <= 255 else labels
    if image.mode not in ("P", "L", "1"):
        raise UserError(
            f"{path}: {image.mode} colours are not class ids, save a palette or grayscale PNG"
        )
    return np.array(image).astype(np.uint8)


def _open(path: epath.PathLike, max_pixels: int) -> Image.Image:
    """The decoded image, upright. `format` survives."""
    try:
        with files.reading(path):
            # A pipe would be waited for, a device such as /dev/zero never ends.
            if not files.is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
                raise UnreadableError(
                    f"{path}: cannot be read, it is {_kind_of(path)}, not a file: check the path"
                )
            data = epath.Path(path).read_bytes()
    except FileNotFoundError as error:
        broken = files.dangling(path)
        raise UnreadableError(broken or f"{path}: no such file, check the path") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UnreadableError(f"{path}: cannot be read ({reason}), check the path") from error
    if not data:
        raise UnreadableError(f"{path}: empty file, replace or remove it")
    if Image.MAX_IMAGE_PIXELS is not None:  # PIL has a limit of its own, for the whole process
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise TooLargeError(_too_large(path, max_pixels)) from error
    except Exception as error:  # PIL's plugins raise anything on damaged headers
        raise UnreadableError(f"{path}: not an image, replace or remove it") from error
    if image.width * image.height > max_pixels:
        raise TooLargeError(_too_large(path, max_pixels))
    try:
        # Phones write MPO: a JPEG with a preview behind it, whose first frame is the photo.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames == 1:
            image.load()
    except Exception as error:
        raise UnreadableError(f"{path}: truncated or damaged, replace or remove it") from error
    if frames > 1:
        raise UnreadableError(f"{path}: animated ({frames} frames), save one frame as PNG or JPEG")
    return _upright(image)


def _kind_of(path: epath.PathLike) -> str:
    mode = os.stat(path).st_mode
    kinds = {"a folder": stat.S_ISDIR, "a pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    return next((kind for kind, holds in kinds.items() if holds(mode)), "a device")


def _too_large(path: epath.PathLike, max_pixels: int) -> str:
    return f"{path}: more than {max_pixels:,} pixels (decompression bomb?), make it smaller"


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata says nothing about the pixels
        return image
    turned.format = image.format
    return turned
