"""`predict` among other programs: going on, streams, addresses, lines of JSON."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from test_predict import CLASSES, _folder, _names, _photo, _run, place  # noqa: F401

from segdiff_jax import cli, predict
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.weights import workdir


@pytest.fixture
def segmented(monkeypatch):
    """The photos that go through the networks, counted by their shape."""
    seen, stream = [], Segmenter.stream

    def watched(self, images, *arguments, **settings):
        def told():
            for image in images:
                seen.append(image.shape[:2])
                yield image

        return stream(self, told(), *arguments, **settings)

    monkeypatch.setattr(Segmenter, "stream", watched)
    return seen


def test_what_is_done_with_the_same_settings_is_skipped(place, capsys, segmented):  # noqa: F811
    assert _run(place, capsys)[0] == 0
    before, count = _folder(place / "o"), len(segmented)
    code, output = _run(place, capsys)
    assert code == 0 and len(segmented) == count == 2
    assert "0 images segmented, 2 skipped, done before with the same settings" in output.out
    assert _folder(place / "o") == before, "the page too"

    def again(*flags, **options):
        segmented.clear()
        code, output = _run(place, capsys, *flags, **options)
        assert code == 0, output.err
        return len(segmented), output.out

    _photo(place / "in" / "a.png", (20, 28), seed=5)
    count, said = again()
    assert count == 1 and "1 earlier result is made again: the photo changed" in said
    count, said = again("--steps=2", "--format", "masks")
    assert count == 2 and "steps 1 → 2" in said and "format labels" in said
    assert "_labels" not in " ".join(_names(place / "o"))
    assert again("--steps=2", "--format", "masks")[0] == 0
    count, said = again("--steps=2", "--format", "masks", classes="sky; building; road")
    assert count == 2 and "the classes" in said
    (place / "o" / "b_overlay.png").unlink()
    (place / "o" / "a.json").write_text("{")
    assert again("--steps=2", "--format", "masks", classes="sky; building; road")[0] == 2
    _photo(place / "in" / "c.png")
    count, said = again("--steps=2", "--format", "masks", classes="sky; building; road")
    assert count == 1 and "1 image segmented, 2 skipped" in said
    assert (place / "o" / "index.html").read_text().count("<h3>") == 3


def test_other_weights_are_other_settings(place, capsys, segmented, make_segmenter, monkeypatch):  # noqa: F811
    assert _run(place, capsys)[0] == 0
    sums = make_segmenter().networks.checksum()
    assert json.loads((place / "o" / "a.json").read_text())["settings"]["weights"] == sums
    monkeypatch.setattr("segdiff_jax.inference.networks.Networks.checksum", lambda _: "0")
    code, output = _run(place, capsys)
    assert code == 0 and len(segmented) == 4 and f"weights {sums} → 0" in output.out


@pytest.mark.parametrize("key", ["diffusion.beta_end", "data.max_value"])
def test_what_else_shapes_a_mask_is_a_setting_too(place, capsys, segmented, key):  # noqa: F811
    assert _run(place, capsys)[0] == 0
    recorded = json.loads((place / "o" / "a.json").read_text())["settings"]
    assert recorded["logit_adjustment"] == 0 and recorded["image_size"]
    config = workdir.read_config(str(place / "w"))
    group, name = key.split(".")
    setattr(getattr(config, group), name, 1 if name == "max_value" else 0.01)
    workdir.write_config(str(place / "w"), config)
    code, output = _run(place, capsys)
    assert code == 0 and len(segmented) == 4 and f"{name} " in output.out, output


@pytest.mark.parametrize(
    ("key", "value"),
    [("settings", "photo_sha256"), ("classes", None), ("width", "x"), ("other", {}), ("files", [])],
)
def test_a_damaged_description_is_made_again(place, capsys, segmented, key, value):  # noqa: F811
    assert _run(place, capsys)[0] == 0
    before = (place / "o" / "a.json").read_bytes()
    (place / "o" / "a.json").write_text(json.dumps(json.loads(before) | {key: value}))
    code, output = _run(place, capsys)
    assert code == 0 and "1 image segmented, 1 skipped" in output.out, output.err
    assert (place / "o" / "a.json").read_bytes() == before


def test_other_colours_are_other_settings(place, capsys, segmented):  # noqa: F811
    for color in ((255, 0, 0), (0, 0, 255), (0, 0, 255)):
        listed = {"classes": [{"name": "sky", "synonyms": [], "color": color}]}
        (place / "c.json").write_text(json.dumps(listed))
        code, output = _run(place, capsys, "--closed", classes=f"@{place / 'c.json'}")
        assert code == 0, output.err
        assert Image.open(place / "o" / "a_labels.png").getpalette()[:3] == list(color)
        assert f"rgb({color[0]},{color[1]},{color[2]})" in (place / "o" / "index.html").read_text()
    assert len(segmented) == 4


def test_a_photo_done_before_may_be_too_large_now(place, capsys, segmented):  # noqa: F811
    assert _run(place, capsys)[0] == 0
    code, output = _run(place, capsys, "--max-pixels=500")
    assert code == 2 and "a.png: more than 500 pixels" in output.err
    assert "make it smaller; --max-pixels N reads larger ones" in output.err
    code, output = _run(place, capsys, "--max-pixels=500", "--skip-unreadable")
    assert code == 0 and "0 images segmented, 1 skipped" in output.out
    assert "1 unreadable left out" in output.out and len(segmented) == 2


def test_lines_of_json_are_all_that_stdout_gets(place, capsys):  # noqa: F811
    (place / "in" / "x.png").write_bytes(b"")
    flags = ["--json-lines", "--skip-unreadable"]
    for skipped in (False, True):
        code, output = _run(place, capsys, *flags)
        assert code == 0, output.err
        first, second, broken = map(json.loads, output.out.splitlines())
        assert [first["image"][-5:], second["image"][-5:]] == ["a.png", "b.bmp"]
        assert first["skipped"] is skipped and first["output"] == str(place / "o")
        said = json.loads((place / "o" / "a.json").read_text())
        assert said.items() <= first.items() and said["files"]["labels"] == "a_labels.png"
        assert broken["image"].endswith("x.png") and "empty file" in broken["error"]
        assert "3 classes" in output.err and "1 unreadable left out" in output.err


def test_quiet_says_nothing_but_what_is_wrong(place, capsys):  # noqa: F811
    code, output = _run(place, capsys, "--quiet")
    assert code == 0 and output.out == output.err == ""
    (place / "in" / "x.png").write_bytes(b"")
    code, output = _run(place, capsys, "--quiet")
    assert code == 2 and output.out == "" and output.err.count("\n") == 1


def test_a_photo_from_stdin_and_its_labels_to_stdout(place, capsysbinary, monkeypatch):  # noqa: F811
    data = (place / "in" / "a.png").read_bytes()

    def piped(*flags, stdin=data, output="-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        argv = ["--checkpoint", str(place / "w"), "--classes", CLASSES, "--images", "-"]
        with pytest.raises(SystemExit) as caught:
            cli.run(predict.main, [*argv, "--output", output, *flags])
        return caught.value.code, capsysbinary.readouterr()

    code, output = piped()
    assert code == 0 and b"3 classes" in output.err, output.err
    labels = Image.open(io.BytesIO(output.out))
    assert labels.mode == "P" and labels.size == (28, 20)
    code, output = piped("--format", "coco")
    assert code == 0 and json.loads(output.out)["images"][0]["width"] == 28
    code, _ = piped(output=str(place / "o"))
    assert code == 0 and "stdin_labels.png" in _names(place / "o")
    assert (np.asarray(Image.open(place / "o" / "stdin_labels.png")) == np.asarray(labels)).all()
    for flags, stdin, message in (
        ([], b"", b"nothing on stdin"),
        ([], b"hello", b"-: not an image"),
        (["--format", "masks"], data, b"--output -: stdout takes one image in one format (labels"),
        (["--format", "labels", "coco"], data, b"--output -: stdout takes one image"),
        (["--json-lines"], data, b"--json-lines writes there too"),
        (["--images", str(place / "in")], data, b"--output -: stdout takes one image"),
    ):
        code, output = piped(*flags, stdin=stdin)
        assert code == 2 and message in output.err and output.out == b""


def test_equal_names_in_two_folders_keep_their_folders(place, capsys):  # noqa: F811
    for path in ("one/x.png", "two/x.png", "two/deep/x.jpg", "two/y.png"):
        (place / "t" / path).parent.mkdir(parents=True, exist_ok=True)
        _photo(place / "t" / path)
    assert _run(place, capsys, images=("t",))[0] == 0
    kept = [name for name in _names(place / "o") if name.endswith("_labels.png")]
    assert kept == ["one_x_labels.png", "two_x_labels.png", "x.jpg_labels.png", "y_labels.png"]


def test_addresses_that_give_no_photo_are_counted(place, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SEGDIFF_NETWORK_TIMEOUT", "5")
    dead = "http://127.0.0.1:9/x.png"
    monkeypatch.chdir(place)

    def run(*flags):
        argv = ["--checkpoint", "w", "--output", "o", "--classes", CLASSES, *flags]
        with pytest.raises(SystemExit) as caught:
            cli.run(predict.main, [*argv, "--images", dead, "in/a.png"])
        return caught.value.code, capsys.readouterr()

    code, output = run()
    assert code == 2 and f"1 of 2 images cannot be read: {dead}: cannot be fetched" in output.err
    assert output.err.count("\n") == 1 and not (place / "o").exists()
    code, output = run("--skip-unreadable")
    assert code == 0 and "1 image segmented, 1 unreadable left out" in output.out


def test_tiles_are_asked_for_and_recorded(place, capsys):  # noqa: F811
    code, output = _run(place, capsys, "--tiles", "3", images=("in/a.png",))
    assert code == 0, output.err
    assert json.loads((place / "o" / "a.json").read_text())["settings"]["tiles"] == 3
    code, output = _run(place, capsys, "--tiles", "-1")
    assert code == 2 and "--tiles" in output.err
