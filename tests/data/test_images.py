import struct
import zlib

import numpy as np
import pytest
from etils import epath
from PIL import Image

from segdiff_jax.data.images import UnreadableError, read_image, read_labels, read_photo
from segdiff_jax.errors import UserError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


@pytest.fixture
def save(tmp_path):
    def _save(image, name="photo.png", **options):
        path = tmp_path / name
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
        return path

    return _save


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm"])
def test_rgb_is_read_exactly(save, name):
    image = read_image(save(RGB, name))
    assert image.dtype == np.uint8 and (image == RGB).all()
    assert (read_image(epath.Path(save(RGB, name))) == RGB).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jpg"])
def test_grayscale_becomes_three_equal_channels(save, name):
    image = read_image(save(np.repeat(GRAY[:1], 8, axis=0), name))
    assert image.shape == (8, 9, 3) and (image == image[..., :1]).all()


def test_palette_photo_is_read_as_its_colours(save):
    flat = RGB[:2, :4]
    paletted = Image.fromarray(flat).quantize(8, dither=Image.Dither.NONE)
    assert (read_image(save(paletted)) == np.array(paletted.convert("RGB"))).all()
    one_bit = Image.fromarray(GRAY > 127)
    assert (read_image(save(one_bit)) == 255 * (GRAY > 127)[..., None]).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_gray_is_scaled_not_clipped(save, name):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert read_image(save(values, name))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("white", [255, 1023, 4095, 16383])
def test_gray_of_fewer_bits_in_sixteen_is_read_by_its_range(save, name, white):
    """Cameras and scanners store 10, 12 or 14 bits so."""
    path = save(np.array([[0, white // 2, white]], np.uint16), name)
    assert np.abs(read_image(path)[0, :, 0].astype(int) - [0, 127, 255]).max() <= 1
    assert read_photo(path).guessed_max == white
    in_full = read_photo(path, max_value=65535)
    assert in_full.guessed_max == 0 and in_full.pixels.max() == round(white / 257)


def test_max_value_gives_all_photos_of_a_set_one_range(save):
    dim, bright = (save(np.full((2, 2), v, np.uint16), f"{v}.png") for v in (800, 4000))
    assert read_image(dim, max_value=4095).max() == round(800 / 4095 * 255)
    assert read_image(bright, max_value=4095).max() == round(4000 / 4095 * 255)
    with pytest.raises(UserError, match=r"a pixel of 4000, more than config\.data\.max_value=1023"):
        read_image(bright, max_value=1023)
    assert (read_image(save(RGB, "8bit.png"), max_value=4095) == RGB).all()


def test_a_range_that_the_file_names_is_no_guess(tmp_path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 2 1 4095\n" + bytes([0x03, 0x20, 0x00, 0x00]))
    photo = read_photo(path)
    assert photo.guessed_max == 0 and photo.pixels[0, :, 0].tolist() == [round(800 / 4095 * 255), 0]


def test_sixteen_bit_rgb_keeps_its_high_bytes(tmp_path):
    path = tmp_path / "deep.png"
    path.write_bytes(_png(2, 16, 2, struct.pack(">6H", 0xFFFF, 0x8080, 0, 0x0101, 0x4040, 0xC0C0)))
    assert read_image(path).tolist() == [[[255, 128, 0], [1, 64, 192]]]
    # 12 bits would be read as black
    path.write_bytes(_png(2, 16, 2, struct.pack(">6H", 0x0FFF, 0x0808, 0, 0x0101, 0x0404, 0x0C0C)))
    with pytest.raises(UnreadableError, match=r"deep\.png: 16-bit colour that uses 12 bits or fe"):
        read_image(path)


def _png(width, bits, kind, row):
    """A file of one row such as PIL cannot write; kind 0 is gray, 2 colour."""
    header = struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def test_transparency_is_composited_over_white(save):
    alpha = np.array([[0, 255, 51]], np.uint8)
    rgba = np.dstack([np.full((1, 3, 3), 100, np.uint8), alpha])
    expected = [255, 100, round(100 * 0.2 + 255 * 0.8)]
    for mode in ("RGBA", "LA"):
        image = read_image(save(Image.fromarray(rgba).convert(mode)))
        assert image.shape == (1, 3, 3)
        assert np.abs(image[0, :, 0].astype(int) - expected).max() <= 1, mode
    keyed = save(np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8), transparency=(1, 2, 3))
    assert read_image(keyed).tolist() == [[[255, 255, 255], [9, 9, 9]]]


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_photo_keeps_its_colours(save, name):
    colors = np.array([[[220, 30, 30], [30, 200, 60]], [[20, 40, 230], [250, 250, 250]]])
    blocks = np.kron(colors, np.ones((16, 16, 1))).astype(np.uint8)
    path = save(Image.fromarray(blocks).convert("CMYK"), name)
    assert np.abs(read_image(path).astype(int) - blocks).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(save, orientation):
    """Stored pixels are turned by the inverse of each flag: all eight must come out upright."""
    stored = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[orientation](RGB)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.tif"):
        path = save(np.ascontiguousarray(stored), name, exif=exif)
        assert (read_image(path) == RGB).all()
        assert (read_image(path, exif="ignore") == stored).all()
        mask = save(np.ascontiguousarray(stored[..., 0]), name, exif=exif)
        assert (read_labels(mask) == RGB[..., 0]).all()
        assert (read_labels(mask, exif="ignore") == stored[..., 0]).all()


def test_multi_picture_jpeg_of_a_phone_is_not_animated(save):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (40, 200)]
    path = save(frames[0], "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert np.abs(read_image(path).astype(int) - 40).max() <= 2


@pytest.mark.parametrize("reader", [read_image, read_labels])
def test_broken_files_are_named_with_the_mend(tmp_path, save, reader, bomb):
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole, photo = (save(noise, name).read_bytes() for name in ("whole.png", "whole.jpg"))
    cases = {
        "missing.png": (None, "no such file"),
        "zero.png": (b"", "empty file"),
        "half.png": (whole[: len(whole) // 2], "truncated"),
        "half.jpg": (photo[: len(photo) // 2], "truncated"),
        "header.png": (whole[:20], ""),
        "text.png": (b"hello, I am no image", "not an image"),
        "bomb.png": (bomb, "decompression bomb"),
        ".": (None, "cannot be read"),
    }
    for name, (data, words) in cases.items():
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(UnreadableError) as caught:
            reader(path)
        message = str(caught.value)
        assert message.startswith(str(path)) and words in message and "\n" not in message


@pytest.mark.parametrize("reader", [read_image, read_labels])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        *[(f"a.{kind}", r"animated \(3 frames\)") for kind in ("gif", "png", "webp")],
        ("scan.tif", r"scan\.tif: has 3 pages: save one"),
    ],
)
def test_files_of_several_images_are_refused(save, reader, name, says):
    frames = [Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 120, 255)]
    path = save(frames[0], name, save_all=True, append_images=frames[1:])
    with pytest.raises(UnreadableError, match=says):
        reader(path)


def test_max_pixels_reaches_beyond_the_limit_of_pil(save, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = save(RGB)
    assert read_image(path, max_pixels=RGB.size).shape == RGB.shape
    with pytest.raises(UnreadableError, match=r"more than 53 pixels.*config\.data\.max_pixels"):
        read_image(path, max_pixels=53)


def test_palette_labels_are_indices_not_colours(save):
    ids = np.array([[0, 1, 2], [10, 7, 255]], np.uint8)
    image = Image.fromarray(ids, "P")
    image.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    labels = read_labels(save(image))
    assert labels.dtype == np.uint8 and (labels == ids).all()


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.bmp", "L"), ("a.tif", "L"), *[("a.png", mode) for mode in ("L", "RGB", "RGBA", "LA")]],
)
def test_gray_labels_are_ids_in_colours_too(save, name, mode):
    assert (read_labels(save(Image.fromarray(GRAY).convert(mode), name)) == GRAY).all()


@pytest.mark.parametrize(
    ("data", "ids"),
    [
        (_png(4, 2, 0, b"\x1b"), [0, 1, 2, 3]),
        (_png(4, 4, 0, b"\x01\x7f"), [0, 1, 7, 15]),
        (b"P5 4 1 20\n\x00\x01\x0b\x14", [0, 1, 11, 20]),
        (b"P5 4 1 300\n\0\0\0\1\1\0\1\x2c", [0, 1, 256, 300]),
        (b"P2 3 1 20\n0 1 20\n", [0, 1, 20]),
    ],
)
def test_gray_labels_of_few_bits_are_not_spread(tmp_path, data, ids):
    """PIL shows the largest value of 2 or 4 bits, or the one that a PGM names, as white."""
    (tmp_path / "a.png").write_bytes(data)
    assert read_labels(tmp_path / "a.png").tolist() == [ids]


def test_wide_labels_keep_ids_above_255(save):
    small = np.array([[0, 3, 255]], np.uint16)
    large = np.array([[0, 846, 65535]], np.uint16)
    assert read_labels(save(small)).dtype == np.uint8
    for path in (save(large), save(large.astype(np.int32), "a.tif")):
        labels = read_labels(path)
        assert labels.dtype == np.int32 and (labels == large).all()


def test_images_that_hold_no_ids_are_refused(save):
    for mode in ("RGB", "RGBA"):
        with pytest.raises(UserError, match=f"{mode} colours are not class ids, save a palette"):
            read_labels(save(Image.fromarray(RGB).convert(mode)))
    with pytest.raises(UserError, match="JPEG changes class ids"):
        read_labels(save(GRAY, "a.jpg"))
