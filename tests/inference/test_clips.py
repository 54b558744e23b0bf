"""A small generated clip: read, segmented with one noise, written, and read back."""

import json
import shutil
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from results import names, write_photo

from segdiff_jax.config import DataConfig
from segdiff_jax.data.images import UnreadableError
from segdiff_jax.errors import UserError
from segdiff_jax.inference import clips, photos

READ = photos.Photos(DataConfig(), None, "")


def _pictures(count, size=(26, 35), speed=3):
    """A bright square that moves over a slope of gray."""
    across = np.linspace(0, 120, size[1], dtype=np.uint8)
    for number in range(count):
        picture = np.repeat(np.tile(across, (size[0], 1))[..., None], 3, axis=-1)
        picture[8:16, 2 + number * speed : 10 + number * speed] = (250, 220, 40)
        yield picture


def write_clip(path, count):
    with clips.writer(path, Fraction(12)) as append:
        for picture in _pictures(count):
            append(picture)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "walk.mp4"
    write_clip(path, 5)
    return str(path)


def test_what_is_written_is_read_back(clip):
    assert photos.are_clips([clip]) and clips.look(clip, READ) == (12, 5)
    for frame, picture in zip(clips.frames(clip, READ), _pictures(5), strict=True):
        assert frame.shape == (26, 36, 3), "of even sides"
        difference = np.abs(frame[:, :35].astype(int) - picture)
        assert difference.mean() < 12 and np.median(difference) < 6


def test_what_is_no_clip_is_one_line(tmp_path, clip, monkeypatch):
    data = Path(clip).read_bytes()
    for name, content in (("a.mp4", b""), ("b.mp4", b"hello"), ("c.mp4", data[: len(data) // 3])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableError, match=name) as caught:
            clips.look(str(tmp_path / name), READ)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'segdiff_jax\[video\]'"):
        clips.look(clip, READ)


def test_one_noise_for_all_frames_flickers_less(make_segmenter):
    """The frames are all but the same: what changes beside them is the noise."""
    model, rng = make_segmenter(), np.random.default_rng(0)
    still = next(_pictures(1)).astype(int)
    frames = [(still + rng.integers(-1, 2, still.shape)).clip(0, 255).astype(np.uint8)] * 2
    frames += [(still + rng.integers(-1, 2, still.shape)).clip(0, 255).astype(np.uint8)] * 2
    classes = ["sky", "building", "road"]

    def flicker(results):
        summary = clips.Summary(found.vocabulary)
        for one in results:
            summary.add(one)
        return summary.figures()["flicker"]

    found = model(frames[0], classes, closed=True)
    same = flicker(model.stream(frames, classes, closed=True))
    other = flicker(model(f, classes, closed=True, seed=i) for i, f in enumerate(frames))
    assert flicker([found, found]) == 0
    assert same < 0.5 * other and other > 0.05, (same, other)


def test_predict_of_a_clip(place, run_predict, clip):
    said = run_predict("--closed", images=(clip,)).out
    assert f"1 clip segmented: {place / 'o'}/\n" in said
    assert names(place / "o") == ["walk.json", "walk_overlay.mp4"]
    said = json.loads((place / "o" / "walk.json").read_text())
    assert (said["frames"], said["frames_per_second"]) == (5, 12.0)
    assert (said["width"], said["height"]) == (36, 26) and 0 <= said["flicker"] <= 1
    assert sum(one["share"] for one in said["classes"]) == pytest.approx(1)
    overlay = str(place / "o" / "walk_overlay.mp4")
    assert clips.look(overlay, READ) == (12, 5)
    first = next(clips.frames(overlay, READ))
    assert first.shape[0] > 26, "a legend below, of the same height in all frames"
    assert "1 skipped" in run_predict("--closed", images=(clip,)).out


def test_frames_of_a_clip_are_a_set_of_photos(place, run_predict, refused, clip):
    def run(*flags, clip=clip):
        said = run_predict("--closed", *flags, images=(clip,)).out
        return said, names(place / "o")

    folder = place / "o"
    write_photo(place / "in" / "walk_000009.png")
    run_predict(images=("in/walk_000009.png",))
    mine = {"walk_000009.json", "walk_000009_labels.png", "walk_000009_overlay.png"}
    _, found = run("--frames")
    assert {"walk_000001_labels.png", "walk_000005.json", *mine} <= set(found)
    out, found = run("--frames", "--format", "coco", "yolo", "cvat")
    assert "1 earlier result is made again: format labels → coco cvat yolo" in out
    assert "walk_000001_labels.png" not in found
    assert len(json.loads((folder / "coco.json").read_text())["images"]) == 5
    assert (folder / "yolo" / "data.yaml").exists() and "cvat.zip" in found
    shutil.copy(clip, place / "walk_000001.mp4")
    error = run_predict("--frames", images=(clip, "walk_000001.mp4"), code=2).err
    assert "two of --images would give walk_000001.json: use two" in error
    write_clip(place / "walk.mp4", 2)
    _, found = run("--frames", clip="walk.mp4")
    labels = [f"walk_00000{number}_labels.png" for number in (1, 2, 9)]
    assert [name for name in found if name.endswith("_labels.png")] == labels
    assert "coco.json" not in found and "walk_000003.json" not in found
    out, found = run(clip="walk.mp4")
    assert "format labels → none" in out
    assert set(found) - {"cvat", "yolo"} == {"index.html", "walk.json", "walk_overlay.mp4", *mine}
    assert not [path for path in (folder / "yolo").rglob("*") if path.is_file()]


def test_a_clip_that_cannot_be_read_is_left_out(place, run_predict, refused, clip):
    (place / "in" / "bad.mp4").write_bytes(b"hello" * 100)
    error = refused(images=(clip, "in/bad.mp4"))
    assert "1 of 2 images cannot be read: " in error and "--skip" in error
    said = run_predict("--skip-unreadable", images=(clip, "in/bad.mp4")).out
    assert "1 clip segmented, 1 unreadable left out: " in said
    error = refused("--max-pixels=100", images=(clip,))
    assert "walk.mp4: more than 100 pixels" in error
    assert "--max-pixels N reads larger ones" in error


@pytest.mark.parametrize(
    ("flags", "images", "message"),
    [
        ([], ("in/a.png", "x.mp4"), "is a clip, others are photos"),
        (["--format", "coco"], ("x.mp4",), "--format coco: of a clip, formats are those of its"),
        (["--frames"], ("in/a.png",), "--frames: none of --images is a clip"),
        (["--output", "-"], ("x.mp4",), "--output -: the results of a clip are several files"),
    ],
)
def test_flags_that_do_nothing_for_clips(place, refused, flags, images, message):
    (place / "x.mp4").write_bytes(b"")
    assert message in refused(*flags, images=images)


def test_a_clip_at_an_address_is_fetched_once(place, run_predict, clip, server):
    server.files["/walk.mp4?width=1"] = "application/octet-stream", Path(clip).read_bytes()
    url = f"{server.url}/walk.mp4?width=1"
    run_predict(images=(url,))
    assert server.served == ["/walk.mp4?width=1"] and "walk.json" in names(place / "o")
    with pytest.raises(UnreadableError, match="the server answers 404"):
        clips.look(f"{server.url}/gone.mp4", READ)


def test_the_digest_of_a_clip_needs_little_memory(tmp_path):
    with (tmp_path / "long.mp4").open("wb") as file:
        file.truncate(64 * 2**20)
    tracemalloc.start()
    READ.digest(str(tmp_path / "long.mp4"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
