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
from results import contents, names, write_photo

from segdiff_jax import cli, files, ownership, predict
from segdiff_jax.errors import UserError
from segdiff_jax.text import vocabulary
from segdiff_jax.weights import loading, workdir


def described(place, name="a"):
    return json.loads((place / "o" / f"{name}.json").read_text("utf-8"))


def test_flags_are_read_before_the_slow_libraries():
    """So that a wrong flag is told, and something is on the screen, within a second."""
    code = "import sys, segdiff_jax.predict; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_files_of_each_image(place, run_predict):
    run_predict("--ensemble=2", "--seed=3", "--threshold=0.48", "--which=best")
    kinds = (".json", "_labels.png", "_overlay.png", "_uncertainty.png")
    assert names(place / "o") == sorted([f"{s}{k}" for s in "ab" for k in kinds] + ["index.html"])
    said = described(place)
    assert (said["width"], said["height"]) == (28, 20)
    assert said["image"] == str(place / "in" / "a.png")
    assert [c["name"] for c in said["classes"]] == ["sky", "building", "road"]
    assert said["classes"][1]["synonyms"] == ["edifice"]
    asked = {"checkpoint_step": 2, "seed": 3, "ensemble": 2, "threshold": 0.48, "closed": False}
    assert asked.items() <= said["settings"].items()
    parts = [*said["classes"], said["other"]]
    assert sum(p["share"] for p in parts) == pytest.approx(1)
    assert sum(p["pixels"] for p in parts) == 20 * 28
    assert 0 < said["other"]["share"] < 1, "the threshold was meant to cut in the middle"

    labels = Image.open(place / "o" / "a_labels.png")
    assert labels.mode == "P" and labels.size == (28, 20)
    ids, counts = np.unique(np.asarray(labels), return_counts=True)
    found = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    assert found == {p["id"]: p["pixels"] for p in parts if p["pixels"]}
    overlay = Image.open(place / "o" / "a_overlay.png")
    assert overlay.width == 28 and overlay.height > 20, "a legend below the photo"
    assert Image.open(place / "o" / "a_uncertainty.png").size == (28, 20)
    page = (place / "o" / "index.html").read_text()
    for name in ("a_overlay.png", "b_uncertainty.png", "a_labels.png", "edifice"):
        assert name in page


def test_a_photo_that_the_page_shows_reduced_opens_in_full(place, run_predict):
    shutil.rmtree(place / "in")
    (place / "in").mkdir()
    photos = ["a 1#?.png", "caf\xe9.jpg", "small.png", "photo.tif"]
    for name in photos:
        write_photo(place / "in" / name, (30, 40) if name == "small.png" else (300, 800))
    run_predict()
    page = (place / "o" / "index.html").read_text("utf-8")
    reduced = "image, here at 640 × 240 of 800 × 300 pixels"
    # No browser but one shows a TIFF, and a small photo is in the page as a whole.
    assert page.count(reduced) == 2 * 3, "as the caption and as the text of the picture"
    linked = re.findall(r'<a href="([^"]*)">.*?</a>\s*<figcaption>([^<]*)<', page, re.DOTALL)
    assert [caption for _, caption in linked] == [reduced] * 2
    opened = [(place / "o" / unquote(address)).resolve() for address, _ in linked]
    assert opened == [place / "in" / name for name in photos[:2]]
    assert page.count('type="checkbox"') == 4 * 3 - 2, "the other pictures open in the page"
    assert "4 skipped" in run_predict().out
    assert (place / "o" / "index.html").read_text("utf-8") == page


def test_only_the_formats_asked_for_are_there(place, run_predict):
    run_predict("--ensemble=2", images=("in/a.png",))
    assert {"a_labels.png", "a_uncertainty.png"} <= set(names(place / "o"))
    flags = ["--format", "scores", "masks", "coco", "--threshold=0.48", "--ensemble=1"]
    run_predict(*flags, images=("in/a.png",))
    said = described(place)
    assert said["uncertainty"] is None and said["files"]["uncertainty"] is None
    masks = [f"a_mask_{i}.png" for i in range(3)]
    assert said["files"]["masks"] == masks
    one_each = [said["files"][kind] for kind in ("scores", "coco", "overlay")]
    assert set(names(place / "o")) == {*masks, *one_each, "a.json", "coco.json", "index.html"}
    pixels = [c["pixels"] for c in said["classes"]]
    assert [np.asarray(Image.open(place / "o" / name)).sum() for name in masks] == pixels
    assert np.load(place / "o" / said["files"]["scores"])["scores"].shape == (3, 20, 28)


def test_a_set_for_import_holds_ids_of_one_list_of_classes(place, run_predict):
    def run(*images, classes):
        run_predict("--closed", "--format", "yolo", "cvat", images=images, classes=classes)
        labels = place / "o" / "cvat" / "SegmentationClass"
        return names(place / "o" / "yolo" / "labels"), names(labels)

    (place / "o" / "yolo" / "labels").mkdir(parents=True)
    (place / "o" / "yolo" / "labels" / "mine.txt").write_text("mine")
    assert run("in/a.png", classes="sky; road") == (["a.txt", "mine.txt"], ["a.png"])
    assert run("in/b.bmp", classes="sky; road")[1] == ["a.png", "b.png"], "sets may grow"
    assert run("in/b.bmp", classes="road; sky") == (["b.txt", "mine.txt"], ["b.png"])
    listed = ownership.owned(place / "o")["prediction"]
    assert "yolo/labels/b.txt" in listed and "yolo/labels/a.txt" not in listed


def test_same_seed_same_bytes_whatever_else_is_predicted(place, run_predict):
    for output, images, seed in (("o1", "in", 1), ("o2", "in", 1), ("o3", "in", 2)):
        run_predict(f"--seed={seed}", images=(images,), output=output)
    run_predict("--seed=1", images=("in/b.bmp",), output="o4")
    assert contents(place / "o1") == contents(place / "o2")
    for name in ("b.json", "b_labels.png", "b_overlay.png"):
        assert (place / "o4" / name).read_bytes() == (place / "o1" / name).read_bytes(), name
    assert (place / "o3" / "b.json").read_bytes() != (place / "o1" / "b.json").read_bytes()


def test_closed_threshold_and_the_config(place, run_predict, tiny_config):
    def other(*flags):
        run_predict(*flags, images=("in/a.png",))
        return described(place)["other"]["share"]

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
        ([], {"classes": "names.txt"}, "@names.txt"),
        ([], {"classes": "sky\nroad"}, "'sky\\nroad' holds the invisible character"),
        ([], {"classes": "s\x1b[31mky; road"}, "s\\x1b[31mky"),
        ([], {"images": ("none.jpg",)}, "none.jpg: no such file"),
        (["--steps=0"], {}, "--steps"),
        (["--steps=1001"], {}, "steps=1001: this model has 1000 steps"),
        (["--ensemble=x"], {}, "--ensemble"),
        (["--tiles=-1"], {}, "--tiles"),
        (["--threshold=2"], {}, "'2' is not a number between 0 and 1"),
        (["--threshold=nan"], {}, "'nan' is not a number between 0 and 1"),
        (["--threshold=0.5", "--closed"], {}, "not allowed with argument"),
        (["--seed=99999999999"], {}, "--seed"),
        (["--which=last"], {}, "'last' is neither newest nor best nor a step"),
        (["--colour"], {}, "unrecognized arguments: --colour"),
    ],
)
def test_bad_flags_are_one_line(place, refused, flags, options, message):
    assert message in refused(*flags, **options)
    assert not (place / "o").exists()


def test_classes_of_one_meaning_stop_before_anything_is_written(place, run_predict):
    said = run_predict(classes="refrigerator door; refrigerator shelf", code=2).err
    last = said.splitlines()[-1]
    assert last.startswith("error: ") and "'refrigerator door' and 'refrigerator shelf'" in last
    assert not (place / "o").exists()


def test_the_class_list_is_printed_as_it_was_understood(place, run_predict):
    (place / "c.txt").write_text("sky, building, road\n")
    for classes, *words in (
        ("sky; building, edifice; road", "3 classes, 1 synonym: sky; building (= edifice); road"),
        ("camvid_11", "11 classes"),
        ("sky, building, road", "1 class (sky = building = road): ", '";"'),
        (f"@{place / 'c.txt'}", "1 class (sky = building = road): ", "line"),
    ):
        said = run_predict(images=("in/a.png",), classes=classes).out
        assert all(word in said for word in words), said


@pytest.mark.parametrize("spelling", [["--classes", "sky,", "road"], ["--classes=sky,", "road"]])
def test_class_names_without_quotes_get_a_hint(place, capsys, spelling):
    rest = [f"--{name}={place / name}" for name in ("checkpoint", "output", "images")]
    with pytest.raises(SystemExit) as caught:
        cli.run(predict.main, [*spelling, *rest] if len(spelling) == 2 else [*rest, *spelling])
    message = capsys.readouterr().err
    assert caught.value.code == 2 and '--classes "sky, road"' in message and "quotes" in message


def test_one_gray_image_takes_the_list_of_its_training_only(
    place, run_predict, refused, tiny_config
):
    workdir.write_config(str(place / "w"), tiny_config(classes_per_pass=0))
    many = "; ".join(f"class {i}" for i in range(256))
    assert "256 classes do not fit" in refused(classes=many)
    assert "shortlist=2" in refused("--shortlist=2")
    workdir.settle_classes(str(place / "w"), vocabulary.from_names(["sky", "road"]), write=True)
    error = run_predict(images=("in/a.png",), classes="road; sky", code=2).err
    assert "class 0 is 'sky', not 'road'" in error and str(place / "w" / "classes.json") in error
    assert not (place / "o").exists()
    for classes in ("Sky; road", f"@{place / 'w' / 'classes.json'}"):
        run_predict(images=("in/a.png",), classes=classes)


def test_a_disk_that_fills_up_leaves_whole_sets(place, run_predict, monkeypatch):
    write, budget = files.write_bytes, [6]

    def limited(path, data):
        budget[0] -= 1
        if budget[0] < 0:
            raise UserError(f"cannot write {path}: the disk is full")
        write(path, data)

    monkeypatch.setattr(files, "write_bytes", limited)
    # The list of files, then three an image: the second image's third fails.
    assert "the disk is full" in run_predict(code=2).err
    assert names(place / "o") == ["a.json", "a_labels.png", "a_overlay.png"]


def test_a_stopped_run_is_gone_on_with(place, run_predict, monkeypatch):
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
        run_predict(code=9)
    assert names(place / "o"), "it had begun"
    (place / "o" / "notes.txt").write_text("mine")
    run_predict()
    assert (place / "o" / "notes.txt").read_text() == "mine"


def test_a_checkpoint_that_is_none_or_damaged_leaves_the_output_alone(
    place, run_predict, refused, monkeypatch
):
    def damaged(path, which):
        raise UserError(f"{path}: every checkpoint is damaged")

    monkeypatch.setattr(loading, "load_networks", damaged)
    assert "every checkpoint is damaged" in run_predict(code=2).err
    (place / "w" / "config.json").unlink()
    assert "neither a training workdir" in refused()
    assert not (place / "o").exists()


def test_a_guessed_range_of_photos_is_said_once(place, run_predict, tiny_config):
    for name, value in (("dim", 300), ("bright", 4000)):
        Image.fromarray(np.full((16, 16), value, np.uint16)).save(place / "in" / f"{name}.png")
    said = run_predict().err
    assert said.count("2 of 4 photos have 16-bit files") == 1
    assert "range 0…1023 and 0…4095" in said and "config.data.max_value=4095" in said
    config = tiny_config()
    config.data.max_value = 4095
    workdir.write_config(str(place / "w"), config)
    assert "16-bit" not in run_predict().err


def test_results_beside_the_photos_are_not_taken_for_photos(place, run_predict, refused):
    photos = contents(place / "in")
    assert "left out" not in run_predict(output="in").out
    first = contents(place / "in").keys()
    for images in (("in",), ("in/*",), ("in/a.png", "in/b.bmp", "in/a_labels.png")):
        said = run_predict(output="in", images=images).out
        assert "left out: " in said and "of an earlier run" in said and "2 skipped" in said
    assert contents(place / "in").keys() == first
    assert photos.items() <= contents(place / "in").items()
    assert "only results of an earlier run" in refused(images=("in/a_labels.png",))
    assert not (place / "o").exists()


def test_output_inside_the_photos_that_a_pattern_finds(run_predict):
    for words in ("2 images segmented", "left out: 4 results"):
        assert words in run_predict(output="in/out", images=("in/**/*.png", "in/b.bmp")).out
    assert "0 images segmented, 2 skipped" in run_predict(output="in/out").out


def test_what_others_wrote_is_not_replaced(place, refused, run_predict):
    output = place / "o"
    output.write_text("mine")
    assert f"cannot write {output}" in refused()
    output.unlink()
    for name in ("index.html", "b_uncertainty.png"):
        output.mkdir()
        (output / name).write_text("mine")
        assert f"{output / name}: would be replaced" in refused()
        assert contents(output) == {name: b"mine"}
        shutil.rmtree(output)
    with ownership.claimed(output, "evaluation", ["index.html"]):
        (output / "index.html").write_text("scores")
    assert "index.html: is part of the evaluation here" in refused()
    assert (output / "index.html").read_text() == "scores"
    write_photo(place / "in" / "a_labels.png")
    before = contents(place / "in")
    assert "would overwrite" in refused(output="in")
    assert contents(place / "in") == before


def test_names_of_results(place, run_predict):
    """A photo may be called as another one, as a result of another program, or as COCO's files."""
    for name in ("a.jpg", "x_labels.png", "x_overlay.png", "coco.png", "b_coco.jpg"):
        write_photo(place / "in" / name)
    shutil.copy(place / "in" / "coco.png", place / "in" / "coco")
    for words in ("8 images segmented", "8 skipped"):
        said = run_predict("--format", "coco", "labels", images=("in", "in/coco")).out
        assert words in said
    found = set(names(place / "o"))
    assert {"a.jpg_labels.png", "a.png.json", "b_overlay.png", "x_labels_labels.png"} <= found
    assert {"b_coco.json", "b_coco.jpg.json", "coco.png.json", "coco_.json"} <= found
    assert not {"a_labels.png", "a.json"} & found
    said = described(place, "a.jpg")
    assert said["image"].endswith("in/a.jpg") and said["files"]["labels"] == "a.jpg_labels.png"
    assert len(json.loads((place / "o" / "coco.json").read_text())["images"]) == 8


def test_a_name_that_is_no_utf8(place, run_predict):
    os.rename(place / "in" / "a.png", os.fsencode(place / "in") + b"/caf\xe9.png")
    run_predict("--ensemble", "2")
    said = described(place, "caf\\xe9")
    assert said["image"].endswith("in/caf\\xe9.png")
    assert (place / "o" / said["files"]["labels"]).exists()
    page = (place / "o" / "index.html").read_text("utf-8")
    assert "in/caf\\xe9.png" in page
    links = [unquote(link) for link in re.findall(r'src="([^":]*)"', page)]
    assert len(links) == 6 and all((place / "o" / link).exists() for link in links)


def test_only_files_are_opened(place, refused):
    os.mkfifo(place / "in" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(place / "in" / "s.png"))
    (place / "in" / "folder.png").mkdir()  # is no image of its parent
    error = refused()
    assert "2 of 4 images cannot be read" in error
    assert "pipe.png: cannot be read, it is a pipe" in error
    assert "s.png: cannot be read, it is a socket" in error
    assert "/dev/zero: cannot be read, it is a device" in refused(images=("/dev/zero",))
    assert not (place / "o").exists()


def test_all_unreadable_photos_are_named(place, run_predict, refused, bomb):
    whole = (place / "in" / "a.png").read_bytes()
    for i in range(12):
        data = {0: bomb, 1: whole[: len(whole) // 2], 2: b"hello"}.get(i, b"")
        (place / "in" / f"x{i:02}.png").write_bytes(data)
    (place / "in" / "gone.png").symlink_to("nowhere")
    error = refused()
    for words in (
        "13 of 15 images cannot be read: ",
        "gone.png: a link to nowhere, which does not exist",
        "decompression bomb",
        "x01.png: truncated",
        "x02.png: not an image",
        "x08.png: empty file",
        "; and 3 more; ",
        "--skip-unreadable leaves them out",
    ):
        assert words in error
    assert "x09" not in error and not (place / "o").exists()
    said = run_predict("--skip-unreadable").out
    assert "2 images segmented, 13 unreadable left out" in said
    page = (place / "o" / "index.html").read_text()
    assert "x11.png: empty file" in page and page.count("<h3>") == 2
    error = run_predict("--skip-unreadable", images=("in/x*",), output="p", code=2).err
    assert "12 of 12 images cannot be read" in error and not (place / "p").exists()


def test_links_are_followed_but_not_to_nothing(place, run_predict, refused):
    (place / "link").symlink_to("unmounted")
    for flag in ("--images", "--output", "--checkpoint"):
        for value in ("link", "link/below"):
            error = refused(flag, str(place / value))
            assert flag in error
            assert f"{place}/link: a link to unmounted, which does not exist" in error
    assert not (place / "o").exists() and not (place / "unmounted").exists()
    (place / "disk").mkdir()
    (place / "o").symlink_to("disk")
    run_predict()
    assert (place / "o").is_symlink() and "index.html" in names(place / "disk")
