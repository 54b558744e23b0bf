"""`predict` among other programs: going on, streams, addresses, lines of JSON."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from results import contents, names, write_photo

from segdiff_jax import cli, predict
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.weights import workdir

CLASSES = "sky; building, edifice; road"


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


def test_what_is_done_with_the_same_settings_is_skipped(place, run_predict, segmented):
    run_predict()
    before = contents(place / "o")
    said = run_predict().out
    assert "0 images segmented, 2 skipped, done before with the same settings" in said
    assert len(segmented) == 2 and contents(place / "o") == before, "the page too"

    def again(*flags, **options):
        segmented.clear()
        said = run_predict(*flags, **options).out
        return len(segmented), said

    write_photo(place / "in" / "a.png", (20, 28), seed=5)
    count, said = again()
    assert count == 1 and "1 earlier result is made again: the photo changed" in said
    masks = "--steps=2", "--format", "masks"
    count, said = again(*masks)
    assert count == 2 and "steps 1 → 2" in said and "format labels → masks" in said
    assert "_labels" not in " ".join(names(place / "o"))
    other = {"classes": "sky; building; road"}
    count, said = again(*masks, **other)
    assert count == 2 and "the classes" in said
    (place / "o" / "b_overlay.png").unlink()
    (place / "o" / "a.json").write_text("{")
    assert again(*masks, **other)[0] == 2
    write_photo(place / "in" / "c.png")
    count, said = again(*masks, **other)
    assert count == 1 and "1 image segmented, 2 skipped" in said
    assert (place / "o" / "index.html").read_text().count("<h3>") == 3


def test_whatever_else_shapes_a_mask_is_a_setting_too(
    place, run_predict, segmented, make_segmenter, monkeypatch
):
    run_predict()
    recorded = json.loads((place / "o" / "a.json").read_text())["settings"]
    assert recorded["logit_adjustment"] == 0 and recorded["image_size"]
    sums = make_segmenter().networks.checksum()
    assert recorded["weights"] == sums
    monkeypatch.setattr("segdiff_jax.inference.networks.Networks.checksum", lambda _: "0")
    assert f"weights {sums} → 0" in run_predict().out and len(segmented) == 4
    config = workdir.read_config(str(place / "w"))
    config.diffusion.beta_end, config.data.max_value = 0.01, 1
    workdir.write_config(str(place / "w"), config)
    said = run_predict().out
    assert "beta_end 0.012 → 0.01; max_value 0 → 1" in said and len(segmented) == 6


@pytest.mark.parametrize(
    ("key", "value"),
    [("settings", "photo_sha256"), ("classes", None), ("width", "x"), ("other", {}), ("files", [])],
)
def test_a_damaged_description_is_made_again(place, run_predict, key, value):
    run_predict()
    before = (place / "o" / "a.json").read_bytes()
    (place / "o" / "a.json").write_text(json.dumps(json.loads(before) | {key: value}))
    assert "1 image segmented, 1 skipped" in run_predict().out
    assert (place / "o" / "a.json").read_bytes() == before


def test_other_colours_are_other_settings(place, run_predict, segmented):
    for color in ((255, 0, 0), (0, 0, 255), (0, 0, 255)):
        listed = {"classes": [{"name": "sky", "synonyms": [], "color": color}]}
        (place / "c.json").write_text(json.dumps(listed))
        run_predict("--closed", classes=f"@{place / 'c.json'}")
        assert Image.open(place / "o" / "a_labels.png").getpalette()[:3] == list(color)
        assert f"rgb({color[0]},{color[1]},{color[2]})" in (place / "o" / "index.html").read_text()
    assert len(segmented) == 4


def test_a_photo_done_before_may_be_too_large_now(run_predict, refused, segmented):
    run_predict("--max-pixels=560")  # just as many as the larger one has
    error = refused("--max-pixels=559")
    assert "a.png: more than 559 pixels" in error
    assert "make it smaller; --max-pixels N reads larger ones" in error
    said = run_predict("--max-pixels=559", "--skip-unreadable").out
    assert "0 images segmented, 1 skipped" in said
    assert "1 unreadable left out" in said and len(segmented) == 2


def test_lines_of_json_are_all_that_stdout_gets(place, run_predict):
    (place / "in" / "x.png").write_bytes(b"")
    for skipped in (False, True):
        printed = run_predict("--json-lines", "--skip-unreadable")
        first, second, broken = map(json.loads, printed.out.splitlines())
        assert [first["image"][-5:], second["image"][-5:]] == ["a.png", "b.bmp"]
        assert first["skipped"] is skipped and first["output"] == str(place / "o")
        said = json.loads((place / "o" / "a.json").read_text())
        assert said.items() <= first.items() and said["files"]["labels"] == "a_labels.png"
        assert broken["image"].endswith("x.png") and "empty file" in broken["error"]
        assert "3 classes" in printed.err and "1 unreadable left out" in printed.err


def test_quiet_says_nothing_but_what_is_wrong(place, run_predict):
    printed = run_predict("--quiet")
    assert printed.out == printed.err == ""
    (place / "in" / "x.png").write_bytes(b"")
    printed = run_predict("--quiet", code=2)
    assert printed.out == "" and printed.err.count("\n") == 1


def test_a_photo_from_stdin_and_its_labels_to_stdout(place, capsysbinary, monkeypatch):
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
    assert code == 0 and "stdin_labels.png" in names(place / "o")
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


def test_equal_names_in_two_folders_keep_their_folders(place, run_predict):
    for path in ("one/x.png", "two/x.png", "two/deep/x.jpg", "two/y.png"):
        (place / "t" / path).parent.mkdir(parents=True, exist_ok=True)
        write_photo(place / "t" / path)
    run_predict("--tiles=3", images=("t",))
    kept = [name for name in names(place / "o") if name.endswith("_labels.png")]
    assert kept == ["one_x_labels.png", "two_x_labels.png", "x.jpg_labels.png", "y_labels.png"]
    assert json.loads((place / "o" / "y.json").read_text())["settings"]["tiles"] == 3


def test_addresses_that_give_no_photo_are_counted(place, run_predict, refused):
    images = "http://127.0.0.1:9/x.png", "in/a.png"
    error = refused(images=images)
    assert f"1 of 2 images cannot be read: {images[0]}: cannot be fetched" in error
    assert not (place / "o").exists()
    said = run_predict("--skip-unreadable", images=images).out
    assert "1 image segmented, 1 unreadable left out" in said
