"""Large photos in windows: what is laid out, what comes together, what is asked of the networks."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segdiff_jax.data import geometry
from segdiff_jax.errors import UserError
from segdiff_jax.inference import networks, sampling, tiles, winners

CLASSES = ("sky", "building, edifice", "road")
SIDE = st.integers(1, 300)


@given(st.tuples(SIDE, SIDE), st.integers(2, 7))
@settings(deadline=None, max_examples=60)
def test_windows_cover_the_photo_and_blending_gives_back_what_all_agree_on(native, count):
    plan = tiles.layout(native, (16, 24), count)
    rows, columns = ({corner[axis] for corner in plan.corners} for axis in (0, 1))
    assert len(rows) <= count and len(columns) <= count
    assert all(c <= n for c, n in zip(plan.canvas, native, strict=True)), "never enlarged"
    truth = np.random.default_rng(0).random((2, *plan.canvas), np.float32)
    canvas = np.moveaxis(np.arange(np.prod(plan.canvas)).reshape(1, *plan.canvas), 0, -1)
    flat = truth.reshape(2, -1)

    def maps_of(views):
        assert len(views) <= 5 and all(view.shape[:2] == plan.window for view in views)
        return [flat[:, view[..., 0]] for view in views]

    found = tiles.blended(canvas, plan, truth, maps_of, 5)
    np.testing.assert_allclose(found, truth, atol=1e-5)


@given(
    st.integers(1, 9), st.tuples(SIDE, SIDE), st.tuples(*[st.integers(1, 20)] * 2), st.booleans()
)
@settings(deadline=None, max_examples=60)
def test_winners_are_those_of_all_maps_enlarged(count, size, small, smooth):
    rng = np.random.default_rng(count)
    maps = rng.random((count, *small)).astype(np.float32)
    if smooth:  # few of them are near the top anywhere
        maps = maps * 0.1 + np.arange(count, dtype=np.float32)[:, None, None]
    enlarged = np.stack([geometry.enlarge(one, size) for one in maps])
    best, which = winners.largest(maps, size)
    np.testing.assert_allclose(best, enlarged.max(0), atol=1e-5)
    taken = np.take_along_axis(enlarged, which[None], 0)[0]
    np.testing.assert_allclose(taken, enlarged.max(0), atol=1e-5)
    np.testing.assert_allclose(winners.picked(maps, which), taken, atol=1e-5)


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_maps_lie_on_their_photo_and_tiles_find_what_is_too_small_for_the_whole_view(
    make_segmenter, tiny_config, fit, monkeypatch
):
    """A stand-in for the networks, whose map is the brightness of what they are shown."""
    config = tiny_config()
    config.data.fit = fit
    model = make_segmenter(config)
    monkeypatch.setattr(model.networks, "latents", lambda views: views.astype(np.float32))
    bright = lambda latents, contexts, jobs, *_: latents[jobs[:, 0]].mean(-1) / 127.5 - 1  # noqa: E731
    monkeypatch.setattr(model.networks, "maps", bright)
    photo = np.zeros((48, 160, 3), np.uint8)
    photo[16:, 80:120] = 255
    wrong = model(photo, ["bright"]).mask("bright") != (photo[..., 0] > 127)
    assert wrong[:, 12:68].sum() == 0 and wrong.mean() < 0.06
    photo = np.zeros((200, 320, 3), np.uint8)
    photo[100:, 80:90] = 255  # half a pixel of the view
    whole, tiled = (model(photo, ["bright"], tiles=tiles).mask("bright") for tiles in (0, 8))
    truth = photo[..., 0] > 127
    assert (whole & truth).sum() < 0.2 * truth.sum() < 0.6 * truth.sum() < (tiled & truth).sum()
    assert not (tiled & ~truth)[:, 110:].any() and not (tiled & ~truth)[:80].any()


def test_tiles_of_a_photo_and_their_progress(model, photo):
    told = []
    found = model(photo, CLASSES, tiles=3, ensemble=2, progress=lambda *so_far: told.append(so_far))
    assert found.labels.shape == found.uncertainty.shape == (60, 90) and found.scores.max() <= 1
    assert found.network_scores.shape[:2] == tiles.layout((60, 90), (16, 16), 3).canvas
    windows = len(tiles.layout((60, 90), (16, 16), 3).corners)
    assert told[0] == (0, told[-1][1]) and told[-1] == ((1 + windows) * 6,) * 2
    assert told == sorted(told) and len(told) > windows
    again = model(model.encode(photo), CLASSES, tiles=3, ensemble=2)
    assert again.scores.tobytes() == found.scores.tobytes()
    assert (model(photo, CLASSES, ensemble=2).scores != found.scores).any()


def test_a_shortlist_in_tiles_is_that_of_the_whole(model, photo):
    classes = ("sky", "building", "road", "red tree")
    short = model(photo, classes, shortlist=2, closed=True)
    tiled = model(photo, classes, shortlist=2, tiles=3, closed=True)
    assert set(np.unique(tiled.labels)) == set(np.unique(short.labels)), "two classes"


def test_a_photo_no_larger_than_the_view_is_one_window(model, photo):
    small = np.ascontiguousarray(photo[:12, :16])
    alone, tiled = (model(small, CLASSES, tiles=tiles) for tiles in (0, 4))
    np.testing.assert_allclose(tiled.scores, alone.scores, atol=1e-5)


def test_photos_of_all_sizes_share_what_is_compiled(model, photo, compiled):
    def ask(size, **more):
        model(np.resize(photo, (*size, 3)), CLASSES, steps=4, **more)

    assert any("sample" in line for line in compiled(ask, (60, 90)))
    for size in ((20, 28), (24, 18), (300, 200), (7, 90), (16, 16)):
        assert compiled(ask, size) == []
    ask((60, 90), tiles=3)
    for size in ((300, 200), (70, 90)):
        assert compiled(ask, size, tiles=3) == []


def test_what_does_not_fit_into_memory_is_halved_and_said_once(
    make_segmenter, photo, monkeypatch, caplog
):
    model, sizes = make_segmenter(), []
    classes = [f"class {i}" for i in range(7)]
    expected = model(photo, classes)
    sampler_on = sampling.sampler_on

    def limited(most):
        def on_mesh(mesh):
            def sample(*arguments):
                *_, jobs, _ = arguments
                sizes.append(len(jobs.members))
                if sizes[-1] > most:
                    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
                return sampler_on(mesh)(*arguments)

            return sample

        monkeypatch.setattr(sampling, "sampler_on", on_mesh)

    limited(2)
    with caplog.at_level("WARNING"):
        found = model(photo, classes)
        model(photo, classes)
    assert sizes == [4, *[2] * 8], "the second call knows"
    assert [r.getMessage() for r in caplog.records if r.name == networks.__name__] == [
        "4 passes at once do not fit into memory: going on with 2"
    ]
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    limited(0)
    with pytest.raises(UserError, match="memory does not suffice for one pass"):
        model(photo, classes)


def test_other_errors_of_the_devices_pass(make_segmenter, photo, monkeypatch):
    def broken(mesh):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such device")

    monkeypatch.setattr(sampling, "sampler_on", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        make_segmenter()(photo, CLASSES)


def test_evaluation_maps_are_of_whole_images(model, photo):
    sampler = dataclasses.replace(model.config.sampler, tiles=4)
    classes = model(photo, CLASSES).vocabulary.classes
    assert model.maps([photo], classes, sampler, 0)[0].shape == (1, 3, 16, 16)
