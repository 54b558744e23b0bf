"""A small generated clip: read, segmented with one noise, written, and read back."""

import json
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from test_predict import _names, _run, place  # noqa: F401

from segdiff_jax.data.images import UnreadableError
from segdiff_jax.errors import UserError
from segdiff_jax.inference import clips


def _pictures(count, size=(26, 35), speed=3):
    """A bright square that moves over a slope of gray."""
    across = np.linspace(0, 120, size[1], dtype=np.uint8)
    for number in range(count):
        picture = np.repeat(np.tile(across, (size[0], 1))[..., None], 3, axis=-1)
        picture[8:16, 2 + number * speed : 10 + number * speed] = (250, 220, 40)
        yield picture


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "walk.mp4"
    with clips.writer(path, Fraction(12)) as append:
        for picture in _pictures(5):
            append(picture)
    return str(path)


def test_what_is_written_is_read_back(clip):
    assert clips.only([clip]) and clips.look(clip) == (Fraction(12), 5)
    for frame, picture in zip(clips.frames(clip), _pictures(5), strict=True):
        assert frame.shape == (26, 36, 3), "of even sides"
        difference = np.abs(frame[:, :35].astype(int) - picture)
        assert difference.mean() < 12 and np.median(difference) < 6


def test_what_is_no_clip_is_one_line(tmp_path, clip, monkeypatch):
    data = Path(clip).read_bytes()
    for name, content in (("a.mp4", b""), ("b.mp4", b"hello"), ("c.mp4", data[: len(data) // 3])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableError, match=name) as caught:
            clips.look(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'segdiff_jax\[video\]'"):
        clips.look(clip)


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


def test_predict_of_a_clip(place, capsys, clip):  # noqa: F811
    code, output = _run(place, capsys, "--closed", images=(clip,))
    assert code == 0, output.err
    assert _names(place / "o") == ["walk.json", "walk_overlay.mp4"]
    said = json.loads((place / "o" / "walk.json").read_text())
    assert (said["frames"], said["frames_per_second"]) == (5, 12.0)
    assert (said["width"], said["height"]) == (36, 26) and 0 <= said["flicker"] <= 1
    assert sum(one["share"] for one in said["classes"]) == pytest.approx(1)
    rate, count = clips.look(str(place / "o" / "walk_overlay.mp4"))
    assert (rate, count) == (12, 5)
    pictures = list(clips.frames(str(place / "o" / "walk_overlay.mp4")))
    assert pictures[0].shape[0] > 26, "a legend below, of the same height in all frames"
    code, output = _run(place, capsys, "--closed", images=(clip,))
    assert code == 0 and "1 skipped" in output.out
    code, output = _run(place, capsys, "--closed", "--frames", images=(clip,))
    assert code == 0, output.err
    assert {"walk_000001_labels.png", "walk_000005.json"} <= set(_names(place / "o"))
    code, output = _run(place, capsys, images=("in/a.png", clip))
    assert code == 2 and "is a clip, others are photos" in output.err
