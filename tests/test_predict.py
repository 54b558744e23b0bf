"""`python -m segdiff_jax.predict`: its files, their bytes, and what it says of bad input."""

import json
import time

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from segdiff_jax import cli, files, predict, workdir
from segdiff_jax.data import vocabulary
from segdiff_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("fast_compile")
CLASSES = "sky; building, edifice; road"


@pytest.fixture
def place(tmp_path, tiny_networks, tiny_config, monkeypatch):
    """A workdir with the tiny networks, and two photos."""
    workdir.write_config(str(tmp_path / "w"), tiny_config())
    monkeypatch.setattr(
        workdir, "load_networks", lambda path: (*tiny_networks, workdir.read_config(path))
    )
    monkeypatch.setattr("segdiff_jax.runtime.start", lambda: None)
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
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_files_of_each_image(place, capsys):
    code, output = _run(place, capsys, "--ensemble", "2", "--seed", "3", "--threshold", "0.48")
    assert code == 0, output.err
    kinds = (".json", "_labels.png", "_overlay.png", "_uncertainty.png")
    assert _names(place / "o") == sorted([f"{s}{k}" for s in "ab" for k in kinds] + ["index.html"])
    said = json.loads((place / "o" / "a.json").read_text())
    assert (said["width"], said["height"]) == (28, 20)
    assert said["image"] == str(place / "in" / "a.png")
    assert [c["name"] for c in said["classes"]] == ["sky", "building", "road"]
    assert said["classes"][1]["synonyms"] == ["edifice"]
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


def test_one_sample_has_no_uncertainty_and_leaves_no_old_one(place, capsys):
    assert _run(place, capsys, "--ensemble", "2", images=("in/a.png",))[0] == 0
    assert "a_uncertainty.png" in _names(place / "o")
    assert _run(place, capsys, images=("in/a.png",))[0] == 0
    assert _names(place / "o") == ["a.json", "a_labels.png", "a_overlay.png", "index.html"]
    said = json.loads((place / "o" / "a.json").read_text())
    assert said["uncertainty"] is None and said["files"]["uncertainty"] is None


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


def test_more_classes_than_eight_bits(place, capsys):
    classes = "; ".join(f"class {i}" for i in range(258))
    code, output = _run(place, capsys, "--threshold=1", images=("in/a.png",), classes=classes)
    assert code == 0, output.err
    labels = np.asarray(Image.open(place / "o" / "a_labels.png"))
    said = json.loads((place / "o" / "a.json").read_text())
    assert said["other"] == {"id": 65535, "pixels": 560, "share": 1.0}
    assert (labels == 65535).all()


def _broken(place, kind):
    path = place / "in" / "b.bmp"
    data = path.read_bytes()
    if kind == "zero bytes":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "not an image":
        path.write_text("hello")
    elif kind == "animated":
        frames = [Image.new("L", (20, 20), value) for value in (0, 200)]
        path.unlink()
        path = path.with_suffix(".gif")
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "bomb":
        path.unlink()
        path = path.with_suffix(".png")
        Image.new("1", (30_000, 30_000)).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("zero bytes", "empty file"),
        ("truncated", "truncated or damaged"),
        ("not an image", "not an image"),
        ("animated", "animated (2 frames)"),
        ("bomb", "decompression bomb"),
    ],
)
def test_a_broken_image_stops_before_anything_is_written(place, capsys, kind, message):
    path = _broken(place, kind)
    code, output = _run(place, capsys)
    assert code == 2 and message in output.err and str(path) in output.err
    assert output.err.count("\n") == 1 and not (place / "o").exists()


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        ([], {"classes": " ; "}, "--classes: empty class list"),
        ([], {"classes": "sky; Sky"}, "--classes: duplicate class name"),
        ([], {"images": ("none.jpg",)}, "none.jpg: no such file"),
        (["--steps=0"], {}, "--steps"),
        (["--steps=1001"], {}, "--steps 1001: this model has 1000 steps"),
        (["--ensemble=x"], {}, "--ensemble"),
        (["--threshold=2"], {}, "'2' is not a number between 0 and 1"),
        (["--threshold=nan"], {}, "'nan' is not a number between 0 and 1"),
        (["--threshold=0.5", "--closed"], {}, "not allowed with argument"),
        (["--seed=99999999999"], {}, "--seed"),
    ],
)
def test_bad_flags_are_one_line(place, capsys, flags, options, message):
    code, output = _run(place, capsys, *flags, **options)
    assert code == 2 and message in output.err and output.err.count("\n") == 1
    assert not (place / "o").exists()


def test_the_class_list_is_printed_as_it_was_understood(place, capsys):
    code, output = _run(place, capsys, images=("in/a.png",))
    assert code == 0 and "3 classes, 1 synonym: sky; building (= edifice); road" in output.out
    code, output = _run(place, capsys, images=("in/a.png",), classes="sky, building, road")
    assert code == 0 and "1 class (sky = building = road): " in output.out and '";"' in output.out
    (place / "c.txt").write_text("sky, building, road\n")
    code, output = _run(place, capsys, images=("in/a.png",), classes=f"@{place / 'c.txt'}")
    assert code == 0 and "1 class (sky = building = road): " in output.out and "line" in output.out


@pytest.mark.parametrize("spelling", [["--classes", "sky,", "road"], ["--classes=sky,", "road"]])
@pytest.mark.parametrize("first", [True, False])
def test_class_names_without_quotes_get_a_hint(place, capsys, spelling, first):
    rest = ["--checkpoint", str(place / "w"), "--output", str(place / "o")]
    rest += ["--images", str(place / "in")]
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


def test_a_name_of_ten_thousand_letters_takes_no_time(place, capsys):
    start = time.perf_counter()
    code, output = _run(place, capsys, images=("in/a.png",), classes="sky; " + "x" * 10_000)
    assert code == 0, output.err
    assert time.perf_counter() - start < 20 and len(output.out) < 500


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


def test_maps_that_are_not_finite_stop_with_image_class_and_reason(
    place, capsys, tiny_networks, monkeypatch
):
    unet, *rest = tiny_networks
    broken = nnx.clone(unet)
    nnx.update(broken, jax.tree.map(lambda x: x * np.nan, nnx.state(unet)))
    monkeypatch.setattr(
        workdir, "load_networks", lambda path: (broken, *rest, workdir.read_config(path))
    )
    for more in ([], ["--ensemble", "2"]):
        code, output = _run(place, capsys, *more)
        assert code == 2 and "Traceback" not in output.err
        said = output.err.splitlines()[-1]
        for word in (
            str(place / "in" / "a.png"),
            "map of sky",
            "not finite",
            "weights of the UNet",
        ):
            assert word in said
        assert not _names(place / "o")


def test_what_one_gray_image_cannot_hold(place, capsys, tiny_config):
    workdir.write_config(str(place / "w"), tiny_config(classes_per_pass=0))
    code, output = _run(place, capsys, classes="; ".join(f"class {i}" for i in range(256)))
    assert code == 2 and "256 classes do not fit" in output.err
    code, output = _run(place, capsys, "--shortlist=2")
    assert code == 2 and "--shortlist 2" in output.err
    assert not (place / "o").exists()


def test_results_never_overwrite_each_other_or_a_photo(place, capsys):
    (place / "more").mkdir()
    Image.new("RGB", (20, 20)).save(place / "more" / "a.jpg")
    code, output = _run(place, capsys, images=("in", "more"))
    assert code == 2 and "in/a.png" in output.err and "more/a.jpg" in output.err
    Image.new("RGB", (20, 20)).save(place / "in" / "a_labels.png")
    before = (place / "in" / "a_labels.png").read_bytes()
    code, output = _run(place, capsys, output="in")
    assert code == 2 and "would overwrite" in output.err
    assert (place / "in" / "a_labels.png").read_bytes() == before


def test_a_disk_that_fills_up_leaves_whole_sets(place, capsys, monkeypatch):
    write, budget = files.write_bytes, [5]

    def limited(path, data):
        budget[0] -= 1
        if budget[0] < 0:
            raise UserError(f"cannot write {path}: the disk is full")
        write(path, data)

    monkeypatch.setattr(files, "write_bytes", limited)
    code, output = _run(place, capsys)  # three files an image: the second image's third fails
    assert code == 2 and "the disk is full" in output.err
    assert _names(place / "o") == ["a.json", "a_labels.png", "a_overlay.png"]


def test_output_that_is_a_file_and_checkpoint_that_is_none(place, capsys):
    (place / "o").write_text("mine")
    code, output = _run(place, capsys)
    assert code == 2 and f"cannot write {place / 'o'}" in output.err
    (place / "w" / "config.json").unlink()
    code, output = _run(place, capsys)
    assert code == 2 and "neither a training workdir" in output.err


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        cli.run(predict.main, ["--help"])
    text = capsys.readouterr().out
    for flag in ("--images", "--classes", "--steps", "--ensemble", "--seed", "--threshold"):
        assert flag in text
