"""Pictures and pages, read back by other code: Pillow, an HTML parser, CIELAB by hand."""

import base64
import io
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from segdiff_jax.inference import overview, pictures
from segdiff_jax.inference import page as page_lib

PALETTE = np.array([[255, 0, 0], [0, 200, 0], [10, 20, 250]], np.uint8)
COLORS = {"sky": (255, 0, 0), "road": (0, 200, 0), "car": (10, 20, 250)}
LABELS = np.array([[0, 0, 1], [1, 255, 0]])


def _random(shape, high, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape)


def test_overlay_mixes_and_leaves_other_alone():
    photo = _random((2, 3, 3), 256).astype(np.uint8)
    got = np.asarray(pictures.overlay(photo, LABELS, PALETTE, alpha=0.25))
    expected = photo.astype(float)
    known = LABELS != 255
    expected[known] = 0.75 * expected[known] + 0.25 * PALETTE[LABELS[known]]
    np.testing.assert_allclose(got, expected, atol=1)
    plain = pictures.overlay(photo, LABELS, PALETTE, 0.0)
    np.testing.assert_array_equal(np.asarray(plain), photo)


@pytest.mark.parametrize("size", [(24, 32), (96, 128), (480, 640)])
def test_a_legend_names_each_colour_below_the_picture(size):
    bare = Image.new("RGB", size[::-1], (128, 128, 128))
    long = "a very long class name that fits no small picture at all"
    picture = pictures.with_legend(bare, {"sky": COLORS["sky"], long: COLORS["car"]})
    assert picture.mode == "RGB" and picture.width == size[1] and picture.height > size[0]
    np.testing.assert_array_equal(np.asarray(picture)[: size[0]], np.asarray(bare))
    below = np.asarray(picture)[size[0] :].reshape(-1, 3)
    drawn = [bool((below == color).all(axis=1).sum() > 20) for color in PALETTE]
    assert drawn == [True, False, True]
    assert pictures.with_legend(bare, {}) is bare


def test_legend_of_many_classes_foreign_names_and_equal_beginnings():
    small = Image.new("RGB", (64, 64))
    palette = _random((150, 3), 256).tolist()
    picture = pictures.with_legend(small, {f"{i} 建物 ☃\nх": c for i, c in enumerate(palette)})
    assert picture.width == 64 and picture.height > 64 + 150 * 10
    names = ("striped yellow triangle", "striped yellow ring", "striped green ring")
    drawn = [pictures.with_legend(small, {name: (200, 10, 10)}).tobytes() for name in names]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("letters", [3, 50, 1_000_000])
def test_a_name_too_long_for_the_legend_is_cut_at_once(letters):
    start = time.perf_counter()
    picture = pictures.with_legend(Image.new("RGB", (160, 40)), {"x" * letters: (200, 10, 10)})
    assert time.perf_counter() - start < 2
    drawn = (np.asarray(picture)[40:, 18:] < 128).all(-1)  # the dark pixels of the text
    columns = np.flatnonzero(drawn.any(0))
    assert columns.size and columns.max() + 18 < 160
    if letters >= 50:
        assert columns.max() + 18 > 140, "as much as fits"


def _lightness(rgb):
    """CIELAB L* of sRGB, from the standard's definition."""
    linear = rgb / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > (6 / 29) ** 3, 116 * np.cbrt(y) - 16, y * (29 / 3) ** 3)


def test_uncertainty_colors_are_perceptually_even():
    ramp = np.linspace(0, 1, 256)[None]  # [1, 256]
    colors = pictures.uncertainty_map(ramp)
    assert colors.shape == (1, 256, 3) and colors.dtype == np.uint8
    light = _lightness(colors[0].astype(float))
    assert light[0] < 5 and light[-1] > 95
    assert (np.diff(light) >= 0).all()
    # magma is even in CAM02-UCS, whose lightness is up to 6 away from L*
    np.testing.assert_allclose(light, np.linspace(0, 98, 256), atol=6.5)


def test_uncertainty_scale():
    values = np.array([[0.0, 0.1, 0.2]])
    np.testing.assert_array_equal(
        pictures.uncertainty_map(values), pictures.uncertainty_map(9 * values)
    )
    certain = pictures.uncertainty_map(np.zeros((4, 5)))
    assert certain.shape == (4, 5, 3) and (certain == certain[0, 0]).all()


@pytest.mark.parametrize("count", [1, 3, 255])
def test_label_png_holds_ids_and_palette(count):
    palette = _random((count, 3), 256).astype(np.uint8)
    labels = _random((20, 30), count)
    labels[0] = 255
    data = pictures.label_png(labels, palette)
    picture = Image.open(io.BytesIO(data))
    assert picture.mode == "P" and picture.format == "PNG"
    np.testing.assert_array_equal(np.asarray(picture), labels)
    shown = np.append(palette, np.zeros((256 - count, 3), np.uint8), axis=0)[labels]
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), shown)
    assert pictures.label_png(labels, palette) == data


def test_label_png_of_a_large_vocabulary():
    labels = _random((20, 30), 847)
    labels[0], labels[1] = -1, 846
    picture = Image.open(io.BytesIO(pictures.label_png(labels, np.zeros((847, 3), np.uint8))))
    np.testing.assert_array_equal(np.asarray(picture), np.where(labels < 0, 65535, labels))


class _Reader(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.text, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.sources.append(dict(attrs)["src"])
        if tag not in ("img", "meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(data.strip())


def _page(tmp_path, **arguments) -> _Reader:
    page_lib.page(tmp_path / "out" / "index.html", **arguments)
    reader = _Reader((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert reader.open == []  # every tag is closed
    return reader


def test_pictures_of_a_row_are_shown_in_the_shape_of_its_photo(tmp_path):
    images = {"image": b"", "overlay": "a_overlay.png"}
    rows = [page_lib.Row("a", images, shape=(4, 3)), page_lib.Row("b", images)]
    page_lib.page(tmp_path / "index.html", title="t", rows=rows)
    assert (tmp_path / "index.html").read_text().count('style="--shape:4/3"') == 1


def test_page_is_complete_and_self_contained(tmp_path):
    photo = _random((8, 12, 3), 256).astype(np.uint8)
    labels = np.arange(96).reshape(8, 12) // 40  # most of the first class
    row = page_lib.comparison("img 1", photo, labels, COLORS, labels, np.zeros((8, 12)))
    table = page_lib.class_table({"sky": 0.5, "road": 1.0, "car": None}, COLORS)
    page = _page(
        tmp_path,
        title="Results",
        figures={"mIoU": 0.12345, "images": 101, "novel": None},
        tables=[table],
        rows=[row],
    )
    assert list(row.images) == ["image", "truth", "prediction", "uncertainty"]
    assert len(page.sources) == 4
    for source, data in zip(page.sources, row.images.values(), strict=True):
        header, _, body = source.partition(",")
        assert header in ("data:image/png;base64", "data:image/jpeg;base64")
        assert base64.b64decode(body) == data
        assert Image.open(io.BytesIO(data)).size == (12, 8)
    assert {"0.123", "101", "–", "0.500", "1.000", "Results"} <= set(page.text)
    bars = [a["style"] for tag, a in page.tags if tag == "i" and "width" in a.get("style", "")]
    assert bars == ["width:50.0%", "width:100.0%"]
    colors = [a["style"] for tag, a in page.tags if a.get("class") == "swatch"]
    assert colors == 2 * [f"background:rgb({r},{g},{b})" for r, g, b in PALETTE]
    assert page.text.count("road") == 2, "in the row's legend and in the table"
    opened = [a for tag, a in page.tags if tag == "input"]
    assert opened == [{"type": "checkbox"}] * 4, "each picture opens at full size"
    addresses = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href")]
    assert all(value.startswith("data:") for value in addresses)


def test_page_escapes_what_users_name(tmp_path):
    evil = '<script>alert("1")</script>&\'"><img src=x>'
    page = _page(
        tmp_path,
        title=evil,
        note=evil,
        figures={evil: evil},
        tables=[page_lib.Table(evil, [evil], [[evil]])],
        rows=[
            page_lib.Row(evil, {evil: "a b#?<\"'.png"}),
            page_lib.Row("", {"image": "small.png"}, originals={"image": evil}),
        ],
    )
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags and page.sources[0] == "a%20b%23%3F%3C%22%27.png"
    assert [a["href"] for tag, a in page.tags if tag == "a"] == [evil]
    assert page.text.count(evil) == 10  # two titles, note, figure, table, row
    assert [a["alt"] for tag, a in page.tags if tag == "img"][0] == f"{evil} of {evil}"


def test_page_with_a_split(tmp_path):
    groups = {"sky": "trained", "car": "novel"}
    table = page_lib.class_table({"sky": 1.5, "car": 0.0}, None, groups)
    page = _page(tmp_path, title="t", tables=[table])
    assert {"trained", "novel", "split"} <= set(page.text)
    bars = [a["style"] for tag, a in page.tags if tag == "i"]
    assert bars == ["width:100.0%", "width:0.0%"]


def test_contact_sheet_shows_every_image_at_the_same_height():
    image = np.zeros((8, 16, 3), np.uint8)
    labels = np.ones((8, 16), np.uint8)
    colors = {"a": (10, 20, 30), "b": (200, 100, 50)}
    row = page_lib.comparison("a", image, labels, colors, truth=labels)
    assert list(row.legend) == ["b"], "the classes that are shown"
    ignored = np.where(np.arange(16) < 4, 255, labels).astype(np.uint8)
    partly = page_lib.comparison("a", image, labels, colors, truth=ignored)
    assert partly.legend == {"b": (200, 100, 50), "no class": (0, 0, 0)}
    sheet = np.asarray(page_lib.contact_sheet([row, row], height=16))
    assert sheet.shape == (20 + 2 * (6 + 16), 3 * 32 + 2 * 6, 3)
    names, sheet = sheet[:20], sheet[26:]
    assert all((names[:, left : left + 32] == 0).any() for left in (0, 38, 76)), "one above each"
    assert (sheet[:16, 32:38] == 255).all() and (sheet[16:22] == 255).all()
    assert (sheet[2:14, 40:68] == (200, 100, 50)).all()


def test_the_note_leaves_out_what_is_switched_off():
    settings = {"steps": 4, "ensemble": 1, "shortlist": 0, "tiles": 0, "seed": 0, "threshold": 0.5}
    said = overview.note("runs/a", settings | {"closed": False})
    assert said == "runs/a: steps 4, ensemble 1, seed 0, threshold 0.5"
    said = overview.note("demo", settings | {"tiles": 3, "closed": True})
    assert "tiles 3, seed 0" in said and "every pixel has a class" in said and "0.5" not in said
