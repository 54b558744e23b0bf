"""`python -m segdiff_jax.predict`: its files, their bytes, and what it says of bad input."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from segdiff_jax import cli, files, ownership, predict
from segdiff_jax.errors import UserError
from segdiff_jax.text import vocabulary
from segdiff_jax.weights import loading, workdir
from segdiff_jax.weights.mask_decoders import Decoders

CLASSES = "sky; building, edifice; road"


@pytest.fixture
def place(tmp_path, tiny_networks, tiny_config, monkeypatch):
    """A workdir with the tiny networks, and two photos."""
    workdir.write_config(str(tmp_path / "w"), tiny_config())
    monkeypatch.setattr(
        loading,
        "load_networks",
        lambda path, which: (
            (*tiny_networks, workdir.read_config(path)),
            Decoders(),
            {"newest": 6, "best": 2}[which],
        ),
    )
    monkeypatch.setattr("segdiff_jax.parallel.runtime.start", lambda: None)
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name, size in (("a.png", (20, 28)), ("b.bmp", (24, 18))):
        photo = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(photo).save(tmp_path / "in" / name)
    return tmp_path


def _run(place, capsys, *more, images=("in",), classes=CLASSES, output="o"):
    argv = ["--checkpoint", str(place / "w"), "--output", str(place / output), *more]
    argv += ["--classes", classes, "--images", *(str(place / i) for i in images)]
    with pytest.raises(SystemExit) as caught:
        cli.run(predict.main, argv)
    return caught.value.code, capsys.readouterr()


def _names(folder):
    """What is in a folder, but for the list of what was written there."""
    inside = folder.iterdir() if folder.exists() else []
    return sorted(p.name for p in inside if p.name != ownership.MARKER)


def test_files_of_each_image(place, capsys):
    code, output = _run(
        place, capsys, "--ensemble=2", "--seed=3", "--threshold=0.48", "--which=best"
    )
    assert code == 0, output.err
    kinds = (".json", "_labels.png", "_overlay.png", "_uncertainty.png")
    assert _names(place / "o") == sorted([f"{s}{k}" for s in "ab" for k in kinds] + ["index.html"])
    said = json.loads((place / "o" / "a.json").read_text())
    assert (said["width"], said["height"]) == (28, 20)
    assert said["image"] == str(place / "in" / "a.png")
    assert [c["name"] for c in said["classes"]] == ["sky", "building", "road"]
    assert said["classes"][1]["synonyms"] == ["edifice"]
    assert said["settings"]["checkpoint_step"] == 2
    assert said["settings"]["seed"] == 3 and said["settings"]["ensemble"] == 2
    assert said["settings"]["threshold"] == 0.48 and said["settings"]["closed"] is False
    parts = [*said["classes"], said["other"]]
    assert sum(p["share"] for p in parts) == pytest.approx(1)
    assert sum(p["pixels"] for p in parts) == 20 * 28

    labels = Image.open(place / "o" / "a_labels.png")
    assert labels.mode == "P" and labels.size == (28, 20)
    ids, counts = np.unique(np.asarray(labels), return_counts=True)
    found = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    assert found == {p["id"]: p["pixels"] for p in parts if p["pixels"]}
    assert labels.getpalette()[:6] != [0] * 6 and labels.getpalette()[-3:] == [0, 0, 0]
    assert 0 < said["other"]["share"] < 1, "the threshold was meant to cut in the middle"
    overlay = Image.open(place / "o" / "a_overlay.png")
    assert overlay.width == 28 and overlay.height > 20, "a legend below the photo"
    assert Image.open(place / "o" / "a_uncertainty.png").size == (28, 20)
    page = (place / "o" / "index.html").read_text()
    for name in ("a_overlay.png", "b_uncertainty.png", "a_labels.png", "edifice"):
        assert name in page


def _page_links(page):
    """The address and the caption of each picture of a page that opens another file."""
    found = re.findall(r'<a href="([^"]*)">.*?</a>\s*<figcaption>([^<]*)<', page, re.DOTALL)
    return [(unquote(address), caption) for address, caption in found]


def test_a_photo_that_the_page_shows_reduced_opens_in_full(place, capsys):
    for photo in (place / "in").iterdir():
        photo.unlink()
    names = ["a 1#?.png", "caf\xe9.jpg", "small.png", "photo.tif"]
    for name in names:
        _photo(place / "in" / name, (30, 40) if name == "small.png" else (300, 800))
    code, output = _run(place, capsys)
    assert code == 0, output.err
    page = (place / "o" / "index.html").read_text("utf-8")
    reduced = "image, here at 640 × 240 of 800 × 300 pixels"
    # No browser but one shows a TIFF, and a small photo is in the page as a whole.
    assert page.count(reduced) == 2 * 3, "as the caption and as the text of the picture"
    linked = _page_links(page)
    assert [caption for _, caption in linked] == [reduced] * 2
    opened = [(place / "o" / address).resolve() for address, _ in linked]
    assert opened == [place / "in" / name for name in names[:2]]
    assert page.count('type="checkbox"') == 4 * 3 - 2, "the other pictures open in the page"
    code, output = _run(place, capsys)
    assert code == 0 and "4 skipped" in output.out
    assert (place / "o" / "index.html").read_text("utf-8") == page


def test_every_format_is_read_back(place, capsys):
    flags = ["--format", "scores", "masks", "coco", "--threshold=0.48"]
    assert _run(place, capsys, "--ensemble=2", images=("in/a.png",))[0] == 0
    labels = np.asarray(Image.open(place / "o" / "a_labels.png"))
    code, output = _run(place, capsys, *flags, "--ensemble=1", images=("in/a.png",))
    assert code == 0, output.err
    earlier = {"a_labels.png", "a_uncertainty.png"}
    assert not earlier & set(_names(place / "o")), "not asked for, and of an earlier run"
    said = json.loads((place / "o" / "a.json").read_text())
    assert said["uncertainty"] is None and said["files"]["uncertainty"] is None
    assert said["files"]["masks"] == [f"a_mask_{i}.png" for i in range(3)]
    masks = [np.asarray(Image.open(place / "o" / name)) for name in said["files"]["masks"]]
    assert [int(mask.sum()) for mask in masks] == [c["pixels"] for c in said["classes"]]
    assert (np.sum(masks, 0) <= 1).all() and masks[0].shape == labels.shape
    stored = np.load(place / "o" / said["files"]["scores"])
    assert stored["scores"].shape == (3, 20, 28)
    assert stored["classes"].tolist() == ["sky", "building", "road"]
    coco = json.loads((place / "o" / said["files"]["coco"]).read_text())
    areas = {a["category_id"]: a["area"] for a in coco["annotations"]}
    assert areas == {c["id"]: c["pixels"] for c in said["classes"] if c["pixels"]}


def test_a_set_for_import_holds_ids_of_one_list_of_classes(place, capsys):
    def run(*images, classes):
        flags = ["--closed", "--format", "yolo", "cvat"]
        assert _run(place, capsys, *flags, images=images, classes=classes)[0] == 0
        labels = place / "o" / "cvat" / "SegmentationClass"
        return _names(place / "o" / "yolo" / "labels"), _names(labels)

    (place / "o" / "yolo" / "labels").mkdir(parents=True)
    (place / "o" / "yolo" / "labels" / "mine.txt").write_text("mine")
    assert run("in/a.png", classes="sky; road") == (["a.txt", "mine.txt"], ["a.png"])
    assert run("in/b.bmp", classes="sky; road")[1] == ["a.png", "b.png"], "sets may grow"
    assert run("in/b.bmp", classes="road; sky") == (["b.txt", "mine.txt"], ["b.png"])
    listed = ownership.owned(place / "o")["prediction"]
    assert "yolo/labels/b.txt" in listed and "yolo/labels/a.txt" not in listed


def test_same_seed_same_bytes_whatever_else_is_predicted(place, capsys):
    for output, images, seed in (("o1", ("in",), "1"), ("o2", ("in",), "1"), ("o3", ("in",), "2")):
        assert _run(place, capsys, "--seed", seed, images=images, output=output)[0] == 0
    assert _run(place, capsys, "--seed", "1", images=("in/b.bmp",), output="o4")[0] == 0
    assert _names(place / "o1") == _names(place / "o2")
    for name in _names(place / "o1"):
        assert (place / "o1" / name).read_bytes() == (place / "o2" / name).read_bytes(), name
    for name in ("b.json", "b_labels.png", "b_overlay.png"):
        assert (place / "o4" / name).read_bytes() == (place / "o1" / name).read_bytes(), name
    assert (place / "o3" / "b.json").read_bytes() != (place / "o1" / "b.json").read_bytes()


def test_closed_threshold_and_the_config(place, capsys, tiny_config):
    def other(*flags):
        code, output = _run(place, capsys, *flags, images=("in/a.png",))
        assert code == 0, output.err
        return json.loads((place / "o" / "a.json").read_text())["other"]["share"]

    assert other("--threshold", "1") == 1 and other("--threshold", "0") == 0
    assert other("--closed") == 0
    workdir.write_config(str(place / "w"), tiny_config(closed=True, threshold=1.0))
    assert other() == 0
    assert other("--threshold", "1") == 1, "a threshold asks for *other*"
    workdir.write_config(str(place / "w"), tiny_config(threshold=1.0))
    assert other() == 1


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        ([], {"classes": " ; "}, "--classes: empty class list"),
        ([], {"classes": "sky; Sky"}, "--classes: duplicate class name"),
        ([], {"classes": "sky; , heaven"}, "--classes: a class has an empty name"),
        ([], {"classes": "@/no/such.txt"}, "/no/such.txt"),
        ([], {"images": ("none.jpg",)}, "none.jpg: no such file"),
        (["--steps=0"], {}, "--steps"),
        (["--steps=1001"], {}, "steps=1001: this model has 1000 steps"),
        (["--ensemble=x"], {}, "--ensemble"),
        (["--threshold=2"], {}, "'2' is not a number between 0 and 1"),
        (["--threshold=nan"], {}, "'nan' is not a number between 0 and 1"),
        (["--threshold=0.5", "--closed"], {}, "not allowed with argument"),
        (["--seed=99999999999"], {}, "--seed"),
        (["--which=last"], {}, "'last' is neither newest nor best nor a step"),
    ],
)
def test_bad_flags_are_one_line(place, capsys, flags, options, message):
    code, output = _run(place, capsys, *flags, **options)
    assert code == 2 and message in output.err and output.err.count("\n") == 1
    assert not (place / "o").exists()


def test_the_class_list_is_printed_as_it_was_understood(place, capsys):
    code, output = _run(place, capsys, images=("in/a.png",))
    assert code == 0 and "3 classes, 1 synonym: sky; building (= edifice); road" in output.out
    code, output = _run(place, capsys, images=("in/a.png",), classes="camvid_11")
    assert code == 0 and "11 classes" in output.out
    code, output = _run(place, capsys, images=("in/a.png",), classes="sky, building, road")
    assert code == 0 and "1 class (sky = building = road): " in output.out and '";"' in output.out
    (place / "c.txt").write_text("sky, building, road\n")
    code, output = _run(place, capsys, images=("in/a.png",), classes=f"@{place / 'c.txt'}")
    assert code == 0 and "1 class (sky = building = road): " in output.out and "line" in output.out


@pytest.mark.parametrize("spelling", [["--classes", "sky,", "road"], ["--classes=sky,", "road"]])
def test_class_names_without_quotes_get_a_hint(place, capsys, spelling):
    rest = ["--checkpoint", str(place / "w"), "--output", str(place / "o")]
    rest += ["--images", str(place / "in")]
    first = len(spelling) == 2
    with pytest.raises(SystemExit) as caught:
        cli.run(predict.main, [*spelling, *rest] if first else [*rest, *spelling])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and '--classes "sky, road"' in message and "quotes" in message
    with pytest.raises(SystemExit):
        cli.run(predict.main, [*rest, "--classes", "sky", "--colour"])
    assert "unrecognized arguments: --colour" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("sky\nroad", "'sky\\nroad' holds the invisible character"),
        ("s\x1b[31mky; road", "s\\x1b[31mky"),
        ("names.txt", "@names.txt"),
        ("refrigerator door; refrigerator shelf", "'refrigerator door' and 'refrigerator shelf'"),
    ],
)
def test_classes_that_cannot_work_stop_before_anything_is_written(place, capsys, classes, message):
    code, output = _run(place, capsys, classes=classes)
    assert code == 2 and message in output.err and output.err.splitlines()[-1].startswith("error: ")
    assert "\x1b" not in output.err and not (place / "o").exists()


def test_one_gray_image_takes_the_list_of_its_training_only(place, capsys, tiny_config):
    workdir.write_config(str(place / "w"), tiny_config(classes_per_pass=0))
    workdir.settle_classes(str(place / "w"), vocabulary.from_names(["sky", "road"]), write=True)
    code, output = _run(place, capsys, images=("in/a.png",), classes="road; sky")
    assert code == 2 and "class 0 is 'sky', not 'road'" in output.err
    assert str(place / "w" / "classes.json") in output.err and not (place / "o").exists()
    stored = f"@{place / 'w' / 'classes.json'}"
    for classes in ("Sky; road", stored):
        code, output = _run(place, capsys, images=("in/a.png",), classes=classes)
        assert code == 0, output.err


def test_what_one_gray_image_cannot_hold(place, capsys, tiny_config):
    workdir.write_config(str(place / "w"), tiny_config(classes_per_pass=0))
    code, output = _run(place, capsys, classes="; ".join(f"class {i}" for i in range(256)))
    assert code == 2 and "256 classes do not fit" in output.err
    code, output = _run(place, capsys, "--shortlist=2")
    assert code == 2 and "shortlist=2" in output.err
    assert not (place / "o").exists()


def test_results_never_overwrite_a_photo(place, capsys):
    Image.new("RGB", (20, 20)).save(place / "in" / "a_labels.png")
    before = (place / "in" / "a_labels.png").read_bytes()
    code, output = _run(place, capsys, output="in")
    assert code == 2 and "would overwrite" in output.err
    assert (place / "in" / "a_labels.png").read_bytes() == before


def test_a_disk_that_fills_up_leaves_whole_sets(place, capsys, monkeypatch):
    write, budget = files.write_bytes, [6]

    def limited(path, data):
        budget[0] -= 1
        if budget[0] < 0:
            raise UserError(f"cannot write {path}: the disk is full")
        write(path, data)

    monkeypatch.setattr(files, "write_bytes", limited)
    # The list of files, then three an image: the second image's third fails.
    code, output = _run(place, capsys)
    assert code == 2 and "the disk is full" in output.err
    assert _names(place / "o") == ["a.json", "a_labels.png", "a_overlay.png"]


def test_output_that_is_a_file_and_checkpoint_that_is_none(place, capsys):
    (place / "o").write_text("mine")
    code, output = _run(place, capsys)
    assert code == 2 and f"cannot write {place / 'o'}" in output.err
    (place / "w" / "config.json").unlink()
    code, output = _run(place, capsys)
    assert code == 2 and "neither a training workdir" in output.err


def test_a_guessed_range_of_photos_is_said_once(place, capsys, tiny_config):
    for name in ("dim", "bright"):
        values = np.full((16, 16), 300 if name == "dim" else 4000, np.uint16)
        Image.fromarray(values).save(place / "in" / f"{name}.png")
    code, output = _run(place, capsys)
    assert code == 0 and output.err.count("2 of 4 photos have 16-bit files") == 1
    assert "range 0…1023 and 0…4095" in output.err and "config.data.max_value=4095" in output.err
    config = tiny_config()
    config.data.max_value = 4095
    workdir.write_config(str(place / "w"), config)
    code, output = _run(place, capsys)
    assert code == 0 and "16-bit" not in output.err


def _photo(path, size=(20, 20), seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def _folder(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_results_beside_the_photos_are_not_taken_for_photos(place, capsys):
    photos = {"a.png", "b.bmp"}
    code, output = _run(place, capsys, output="in")
    assert code == 0 and "left out" not in output.out
    first = _folder(place / "in")
    for images in (("in",), ("in/*",), ("in/a.png", "in/b.bmp", "in/a_labels.png")):
        code, output = _run(place, capsys, output="in", images=images)
        assert code == 0, output.err
        assert "left out: " in output.out and "of an earlier run" in output.out
        assert "2 skipped" in output.out
    assert _folder(place / "in").keys() == first.keys()
    assert all(_folder(place / "in")[name] == first[name] for name in photos)
    code, output = _run(place, capsys, output="o", images=("in/a_labels.png",))
    assert code == 2 and "only results of an earlier run" in output.err
    assert not (place / "o").exists()


def test_output_inside_the_photos_that_a_pattern_finds(place, capsys):
    for words in ("2 images segmented", "left out: 4 results"):
        code, output = _run(place, capsys, output="in/out", images=("in/**/*.png", "in/b.bmp"))
        assert code == 0 and words in output.out, output.err
    code, output = _run(place, capsys, output="in/out")
    assert code == 0 and "0 images segmented, 2 skipped" in output.out, output.err


def test_photos_that_are_named_like_results(place, capsys):
    """Nothing says that they are results: somebody's masks, or another program's."""
    for name in ("x_labels.png", "x_overlay.png"):
        _photo(place / "in" / name)
    code, output = _run(place, capsys, output="o")
    assert code == 0 and "4 images segmented" in output.out
    assert "x_labels_labels.png" in _names(place / "o")


@pytest.mark.parametrize("name", ["index.html", "b_uncertainty.png"])
def test_a_file_that_predict_did_not_write_is_not_replaced(place, capsys, name):
    (place / "o").mkdir()
    (place / "o" / name).write_text("mine")
    code, output = _run(place, capsys)
    assert code == 2 and f"{place / 'o' / name}: would be replaced" in output.err
    assert output.err.count("\n") == 1 and _folder(place / "o") == {name: b"mine"}


def test_what_an_evaluation_wrote_is_not_replaced(place, capsys):
    with ownership.claimed(place / "o", "evaluation", ["index.html"]):
        (place / "o" / "index.html").write_text("scores")
    code, output = _run(place, capsys)
    assert code == 2 and "index.html: is part of the evaluation here" in output.err
    assert (place / "o" / "index.html").read_text() == "scores"


def test_a_stopped_run_is_gone_on_with(place, capsys, monkeypatch):
    """Whenever it is killed, the list names all that may be there."""
    write, seen = files.write_bytes, []

    def dying(path, data):
        seen.append(path)
        if len(seen) == 6:
            raise SystemExit(9)  # nothing can be done about a kill: nothing is cleaned up
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", dying)
        patch.setattr(ownership, "release_unwritten", lambda *_: None)
        assert _run(place, capsys)[0] == 9
    assert _names(place / "o"), "it had begun"
    (place / "o" / "notes.txt").write_text("mine")
    code, output = _run(place, capsys)
    assert code == 0, output.err
    assert (place / "o" / "notes.txt").read_text() == "mine"


def test_a_link_as_output_is_followed(place, capsys):
    (place / "disk").mkdir()
    (place / "o").symlink_to("disk")
    assert _run(place, capsys)[0] == 0
    assert (place / "o").is_symlink() and "index.html" in _names(place / "disk")


def test_equal_stems_keep_their_extensions(place, capsys):
    _photo(place / "in" / "a.jpg")
    assert _run(place, capsys)[0] == 0
    found = _names(place / "o")
    assert {"a.jpg_labels.png", "a.png.json", "b_overlay.png"} <= set(found)
    assert "a_labels.png" not in found
    said = json.loads((place / "o" / "a.jpg.json").read_text())
    assert said["image"].endswith("in/a.jpg") and said["files"]["labels"] == "a.jpg_labels.png"


def test_photos_that_are_named_like_files_of_coco(place, capsys):
    for name in ("coco.png", "a_coco.jpg"):
        _photo(place / "in" / name)
    shutil.copy(place / "in" / "coco.png", place / "in" / "coco")
    for words in ("5 images segmented", "5 skipped"):
        code, output = _run(place, capsys, "--format", "coco", images=("in", "in/coco"))
        assert code == 0 and words in output.out, output
    found = _names(place / "o")
    assert {"a.json", "a_coco.json", "a_coco.jpg.json", "coco.png.json", "coco_.json"} <= set(found)
    assert len(json.loads((place / "o" / "coco.json").read_text())["images"]) == 5


def test_a_name_that_is_no_utf8(place, capsys):
    os.rename(place / "in" / "a.png", os.fsencode(place / "in") + b"/caf\xe9.png")
    code, output = _run(place, capsys, "--ensemble", "2")
    assert code == 0, output.err
    said = json.loads((place / "o" / "caf\\xe9.json").read_text("utf-8"))
    assert said["image"].endswith("in/caf\\xe9.png")
    assert (place / "o" / said["files"]["labels"]).exists()
    page = (place / "o" / "index.html").read_text("utf-8")
    assert "in/caf\\xe9.png" in page
    links = [unquote(link) for link in re.findall(r'src="([^":]*)"', page)]
    assert len(links) == 6 and all((place / "o" / link).exists() for link in links)


def test_only_files_are_opened(place, capsys):
    os.mkfifo(place / "in" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(place / "in" / "s.png"))
    (place / "in" / "folder.png").mkdir()  # is no image of its parent
    code, output = _run(place, capsys)
    assert code == 2 and "2 of 4 images cannot be read" in output.err
    assert "pipe.png: cannot be read, it is a pipe" in output.err
    assert "s.png: cannot be read, it is a socket" in output.err
    for path, kind in (("/dev/zero", "a device"), (str(place / "in" / "pipe.png"), "a pipe")):
        code, output = _run(place, capsys, images=(path,))
        assert code == 2 and f"{path}: cannot be read, it is {kind}" in output.err
    assert not (place / "o").exists()


def test_all_unreadable_photos_are_named(place, capsys, bomb):
    whole = (place / "in" / "a.png").read_bytes()
    for i in range(12):
        data = {0: bomb, 1: whole[: len(whole) // 2], 2: b"hello"}.get(i, b"")
        (place / "in" / f"x{i:02}.png").write_bytes(data)
    (place / "in" / "gone.png").symlink_to("nowhere")
    code, output = _run(place, capsys)
    assert code == 2 and "13 of 15 images cannot be read: " in output.err
    assert "gone.png: a link to nowhere, which does not exist" in output.err
    for words in ("decompression bomb", "x01.png: truncated", "x02.png: not an image"):
        assert words in output.err
    assert "x08.png: empty file" in output.err and "x09" not in output.err
    assert "; and 3 more; " in output.err and "--skip-unreadable leaves them out" in output.err
    assert output.err.count("\n") == 1 and not (place / "o").exists()
    code, output = _run(place, capsys, "--skip-unreadable")
    assert code == 0 and "2 images segmented, 13 unreadable left out" in output.out
    page = (place / "o" / "index.html").read_text()
    assert "x11.png: empty file" in page and page.count("<h3>") == 2
    code, output = _run(place, capsys, "--skip-unreadable", images=("in/x*",), output="p")
    assert code == 2 and "12 of 12 images cannot be read" in output.err
    assert not (place / "p").exists()


def test_pixels_are_limited_as_asked(place, capsys):
    code, output = _run(place, capsys, "--max-pixels=500")
    assert code == 2 and "a.png: more than 500 pixels" in output.err
    assert "--max-pixels N reads larger ones" in output.err
    assert _run(place, capsys, "--max-pixels=560")[0] == 0


def test_an_output_is_not_touched_before_the_checkpoint_is_known_to_load(
    place, capsys, monkeypatch
):
    def damaged(path, which):
        raise UserError(f"{path}: every checkpoint is damaged")

    monkeypatch.setattr(loading, "load_networks", damaged)
    assert _run(place, capsys)[0] == 2
    assert not (place / "o").exists()


@pytest.mark.parametrize("flag", ["--images", "--output", "--checkpoint"])
def test_a_link_to_nothing_is_named(place, capsys, flag):
    (place / "link").symlink_to("unmounted")
    for value in ("link", "link/below"):
        code, output = _run(place, capsys, flag, str(place / value))
        assert code == 2 and output.err.count("\n") == 1 and flag in output.err
        assert f"{place}/link: a link to unmounted, which does not exist" in output.err
    assert not (place / "o").exists() and not (place / "unmounted").exists()


def test_flags_are_read_before_the_slow_libraries():
    """So that a wrong flag is told, and something is on the screen, within a second."""
    code = "import sys, segdiff_jax.predict; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
