"""The Python API, on a small random model: what the result depends on, and what not."""

import dataclasses
import gc
import json
import subprocess
import sys
import textwrap
import warnings
import weakref

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from segdiff_jax.config import CodecConfig
from segdiff_jax.data.images import read_image
from segdiff_jax.errors import UserError
from segdiff_jax.inference import sampling
from segdiff_jax.inference import segmenter as segmenter_lib
from segdiff_jax.inference.result import from_maps
from segdiff_jax.text import vocabulary

CLASSES = ("sky", "building, edifice", "road")


def test_result_has_the_shapes_and_ranges_of_the_contract(model, image):
    found = model(image, CLASSES)
    assert (found.photo == image).all()
    assert found.labels.shape == (40, 56) and found.labels.dtype == np.int32
    assert found.scores.shape == (40, 56, 3) and found.scores.dtype == np.float32
    assert found.scores.min() >= 0 and found.scores.max() <= 1
    assert found.classes == ("sky", "building", "road") and found.uncertainty is None
    assert len(np.unique(found.scores)) > 1000, "a constant map would pass everything below"


def test_seed_decides_everything(model, image):
    first, again = (model(image, CLASSES, seed=3, ensemble=2) for _ in range(2))
    assert first.labels.tobytes() == again.labels.tobytes()
    assert first.scores.tobytes() == again.scores.tobytes()
    assert first.uncertainty.tobytes() == again.uncertainty.tobytes()
    assert np.abs(first.scores - model(image, CLASSES, seed=4, ensemble=2).scores).max() > 1e-3


def test_closed_and_threshold(model, image):
    closed = model(image, CLASSES, closed=True, threshold=1.0)
    assert (closed.labels == closed.scores.argmax(-1)).mean() > 0.999
    cut = float(np.median(closed.scores.max(-1)))
    found = model(image, CLASSES, threshold=cut)
    expected = np.where(found.scores.max(-1) < cut, 255, found.scores.argmax(-1))
    assert (found.labels == expected).mean() > 0.999, (
        "but for scores that are equal to the last bit"
    )
    assert 0.2 < (found.labels == 255).mean() < 0.8
    assert (model(image, CLASSES, threshold=0.0).labels < 3).all()


def _entries(*names):
    return vocabulary.from_names(names).classes


def test_member_is_the_same_whatever_the_ensemble_and_the_chunks(model, image):
    sampler = dataclasses.replace(model.config.sampler, reduce="mean", ensemble=1)
    images, classes = [image, image[::-1]], _entries("sky", "road")

    def maps(ensemble, batch_size):
        changed = dataclasses.replace(sampler, ensemble=ensemble, batch_size=batch_size)
        return model.maps(images, classes, changed, seed=1)[0]

    alone, pair = maps(1, 4), maps(2, 4)
    assert np.abs(alone - pair).max() > 1e-3, "members differ"
    for chunk in (3, 64):
        np.testing.assert_allclose(maps(2, chunk), pair, atol=1e-5)
    # The mean of N members, times N, is a sum: its difference from the first is the second.
    second = 2 * pair - alone
    assert second.min() >= -1 - 1e-4 and second.max() <= 1 + 1e-4


def test_more_steps_use_more_of_the_schedule(model, image):
    one, two = (model(image, CLASSES, steps=n).scores for n in (1, 2))
    assert np.abs(one - two).max() > 1e-3


def test_classes_are_scored_one_by_one_when_alone_in_a_pass(model, image):
    scores = model(image, CLASSES).scores
    turned = model(image, CLASSES[::-1]).scores
    np.testing.assert_allclose(turned[..., ::-1], scores, atol=1e-5)
    np.testing.assert_allclose(model(image, CLASSES[1:2]).scores, scores[..., 1:2], atol=1e-5)


def test_shortlist_spends_the_full_budget_on_the_most_present(model, image):
    classes = ("sky", "building", "road", "red tree")
    full = model(image, classes, steps=2, ensemble=2, seed=5)
    same = model(image, classes, steps=2, ensemble=2, seed=5, shortlist=4)
    assert (same.scores == full.scores).all() and (same.uncertainty == full.uncertainty).all()
    short = model(image, classes, steps=2, ensemble=2, seed=5, shortlist=2)
    kept = np.flatnonzero(short.network_scores.max((0, 1)) > 0)
    assert len(kept) == 2
    np.testing.assert_allclose(short.scores[..., kept], full.scores[..., kept], atol=1e-5)
    cheap = model(image, classes, steps=1, ensemble=1, seed=5).network_scores
    presence = np.maximum(2 * cheap - 1, 0).mean((0, 1))
    assert set(kept) == set(np.argsort(-presence)[:2])


@pytest.mark.parametrize(("group", "context"), [(0, "mean"), (2, "bound")])
def test_several_classes_per_pass(make_segmenter, tiny_config, image, group, context):
    model = make_segmenter(tiny_config(classes_per_pass=group, context=context))
    found = model(image, CLASSES, ensemble=2)
    assert found.scores.shape == (40, 56, 3) and found.uncertainty.shape == (40, 56)
    assert 0 <= found.uncertainty.min() < found.uncertainty.max() <= 0.5
    sampler = dataclasses.replace(model.config.sampler, ensemble=2)
    gray, _ = model.maps([image], _entries(*CLASSES), sampler, 0)
    assert gray.shape == (1, 1 if group == 0 else 2, 16, 16)
    with pytest.raises(UserError, match="shortlist=1"):
        model(image, CLASSES, shortlist=1)


@pytest.mark.parametrize(
    "classes",
    [
        "road",
        b"road",
        5,
        None,
        {"road": 1},
        {"road"},
        ["sky", 5],
        [None],
        [["sky"]],
        np.array("sky"),
    ]
    + [vocabulary.ClassEntry("road"), np.array([["sky"]])],
)
def test_what_is_no_list_of_classes_is_a_type_error_in_one_line(model, image, classes):
    with pytest.raises(TypeError, match="^classes") as caught:
        model(image, classes)
    assert "\n" not in str(caught.value)


def test_every_ordered_list_of_names_is_one(model, image):
    expected = model(image, CLASSES)
    entries = _entries(*CLASSES)
    for classes in (
        list(CLASSES),
        (name for name in CLASSES),
        np.array(CLASSES),
        [CLASSES[0], entries[1], np.str_(CLASSES[2])],
        entries,
        vocabulary.Vocabulary("mine", entries),
    ):
        found = model(image, classes)
        assert found.classes == expected.classes
        assert found.scores.tobytes() == expected.scores.tobytes()
    with pytest.raises(UserError, match="duplicate class name"):
        model(image, [entries[0], "Sky"])
    with pytest.raises(UserError, match="duplicate class name"):
        model(image, [entries[0], entries[0]])


def test_one_class_of_many_synonyms_is_warned_about(model, image):
    with pytest.warns(UserWarning, match=r"1 class \(sky = building = road\): .*synonyms"):
        model(image, ["sky, building, road"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(image, ["sky, building"])
        model(image, ["sky, building, road", "photo"])
        model(image, [vocabulary.ClassEntry("sky", ("building", "road"))])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda i: i / 255.0, TypeError, "dtype float64"),
        (lambda i: i[..., 0], ValueError, r"shape \[40, 56\]"),
        (lambda i: np.concatenate([i, i[..., :1]], -1), ValueError, r"shape \[40, 56, 4\]"),
        (lambda i: i.transpose(2, 0, 1), ValueError, r"shape \[3, 40, 56\]"),
        (lambda i: i[None], ValueError, r"shape \[1, 40, 56, 3\]"),
        (lambda i: i[:0], ValueError, r"shape \[0, 56, 3\]"),
        (lambda i: i.tolist(), TypeError, "a list is no image"),
        (lambda i: None, TypeError, "NoneType"),
    ],
)
def test_what_is_no_photo_says_what_would_be(model, image, change, error, words):
    for call in (model, lambda i, c: model.maps([i], _entries(*c), model.config.sampler, 0)):
        with pytest.raises(error, match=f"^image: .*{words}") as caught:
            call(change(image), CLASSES)
        assert "\n" not in str(caught.value) and "uint8 [H, W, 3]" in str(caught.value)


def test_every_form_of_an_image_is_one(model, image, tmp_path):
    Image.fromarray(image).save(tmp_path / "photo.png")
    clear = Image.fromarray(np.dstack([image, np.full((40, 56), 255, np.uint8)]))
    forms = [str(tmp_path / "photo.png"), tmp_path / "photo.png", Image.fromarray(image), clear]
    expected = model(image, CLASSES, seed=2)
    for form in [*forms, model.encode(image)]:
        found = model(form, CLASSES, seed=2)
        assert found.scores.tobytes() == expected.scores.tobytes()
        assert (found.photo == image).all()
    sixteen = Image.fromarray(image[..., 0].astype(np.uint16) * 16)
    sixteen.save(tmp_path / "deep.png")
    deep = model(sixteen, CLASSES)
    assert (deep.photo == read_image(tmp_path / "deep.png")).all()
    with pytest.raises(UserError, match="none.png: no such file"):
        model(tmp_path / "none.png", CLASSES)


def test_images_of_a_list_are_worked_on_together_and_do_not_see_each_other(model, image, tmp_path):
    Image.fromarray(image[::-1]).save(tmp_path / "b.png")
    found = model([image, tmp_path / "b.png"], CLASSES, ensemble=2)
    for one, alone in zip(found, (image, image[::-1]), strict=True):
        expected = model(alone, CLASSES, ensemble=2)
        np.testing.assert_allclose(one.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(one.uncertainty, expected.uncertainty, atol=1e-5)
    assert model([], CLASSES) == []


def test_an_image_is_encoded_once_for_many_lists(make_segmenter, image, monkeypatch):
    model, calls = make_segmenter(), []
    encode = sampling.encode
    monkeypatch.setattr(sampling, "encode", lambda *a: calls.append(0) or encode(*a))
    encoded = model.encode(image)
    for classes in (CLASSES, CLASSES[:1]):
        found = model(encoded, classes)
        assert found.labels.shape == (40, 56)
    assert len(calls) == 1


def test_a_server_does_not_keep_the_prompts_of_every_visitor(model):
    first = weakref.ref(model.table(_entries("sky", "road")).hidden)
    assert model.table(_entries("sky", "road")).hidden is first(), "encoded once"
    for number in range(9):
        model.table(_entries("sky", f"class {number}"))
    assert first() is None


def test_a_model_that_is_dropped_gives_its_memory_back_at_once(make_segmenter, image):
    model = make_segmenter()
    model(image, CLASSES)
    held = weakref.ref(model)
    gc.collect()
    gc.disable()  # which would come some time later, when another model is loaded already
    try:
        del model
        assert held() is None
    finally:
        gc.enable()


def test_a_stream_is_the_calls_in_order_and_holds_three_images(model, image):
    """Reading is at most two images ahead of the result in use."""
    read, used = [], []

    def photos():
        for shift in range(6):
            read.append(len(used))
            yield np.roll(image, shift, axis=1)

    for shift, found in enumerate(model.stream(photos(), CLASSES, seed=4)):
        used.append(shift)
        expected = model(np.roll(image, shift, axis=1), CLASSES, seed=4)
        assert found.labels.tobytes() == expected.labels.tobytes()
    assert len(used) == 6
    assert all(position - results <= 3 for position, results in enumerate(read))


def test_an_error_of_a_stream_comes_in_its_place(model, image, tmp_path):
    stream = model.stream([image, tmp_path / "none.png", image], CLASSES)
    assert next(stream).labels.shape == (40, 56)
    with pytest.raises(UserError, match="none.png: no such file"):
        next(stream)


@pytest.mark.parametrize(
    "setting",
    [{"steps": 0}, {"steps": 2.5}, {"ensemble": 0}, {"ensemble": "2"}, {"shortlist": -1}]
    + [{"threshold": 2.0}, {"threshold": float("nan")}, {"threshold": "0.5"}, {"step": 3}]
    + [{"closed": "no"}, {"seed": -1}, {"seed": 1.5}, {"seed": None}, {"seed": 2**31}],
)
def test_settings_out_of_range_are_named(model, image, setting):
    with pytest.raises((ValueError, TypeError), match=f"^{next(iter(setting))}[=:]"):
        model(image, CLASSES, **setting)


def test_the_darkest_maps_still_have_an_order():
    """Closed: where all scores are 0 the nearest level wins, not the first."""
    classes, photo = vocabulary.from_names(CLASSES), np.zeros((2, 3, 3), np.uint8)

    def labels(gray, per_pass, closed=True, threshold=0.0):
        codec = CodecConfig(classes_per_pass=per_pass, closed=closed, threshold=threshold)
        maps = np.broadcast_to(np.array(gray, np.float32)[:, None, None], (len(gray), 2, 2))
        found = from_maps(maps, None, photo, classes, codec, "stretch")
        assert found.scores.min() >= 0 and found.scores.max() <= 1
        assert len(np.unique(found.labels)) == 1
        return found.labels[0, 0]

    assert labels([-1.5, -1.2, -1.3], 1) == 1
    assert labels([-1.5, -1.2, -1.1], 1) == 2
    assert labels([1.1, 1.5, 1.2], 1) == 1, "brighter than certain"
    assert labels([-1.0, -1.0, -1.0], 1) == 0, "a tie goes to the first"
    assert labels([-1.5, -1.2, -1.3], 1, closed=False, threshold=0.1) == 255
    assert labels([-0.2, -1.2, -1.3], 1) == 0
    assert labels([-1.4], 0) == 0 and labels([1.3], 0) == 2, "one image: the nearest level"
    assert labels([0.4], 0) == 1 and labels([-0.6], 0) == 0
    assert labels([-1.4, -1.2], 2) == 2, "of two images the brighter one"


@pytest.fixture(scope="module")
def with_vae(tiny_networks, tiny_config):
    """A function of a change of the VAE that makes a Segmenter."""

    def make(change):
        unet, vae, *rest = tiny_networks
        changed = nnx.clone(vae)
        change(changed)
        return segmenter_lib.Segmenter(unet, changed, *rest, tiny_config())

    return make


def _darken(vae):
    vae.decoder.conv_out.bias[...] -= 3.0


@pytest.mark.parametrize("ensemble", [{}, {"ensemble": 3}, {"ensemble": 2, "reduce": "mean"}])
def test_dark_maps_of_the_networks_are_ordered(with_vae, model, image, ensemble):
    """A decoder that is darker by 3 and by 0: the order of the classes is the same everywhere."""
    dark = with_vae(_darken)
    sampler = dataclasses.replace(model.config.sampler, **ensemble)
    entries = _entries(*CLASSES)
    gray, spread = dark.unclipped_maps([image], entries, sampler, 0)
    clipped, _ = dark.maps([image], entries, sampler, 0)
    assert gray.max() < -1 and (clipped == -1).all() and not spread.any()
    bright, _ = model.unclipped_maps(
        [image], entries, dataclasses.replace(sampler, align="none"), 0
    )
    codec = dataclasses.replace(model.config.codec, closed=True)
    photo, classes = np.zeros((16, 16, 3), np.uint8), vocabulary.from_names(CLASSES)
    found = from_maps(gray[0], None, photo, classes, codec, "stretch").labels
    same = (found == bright[0].argmax(0))[(np.abs(bright[0]) < 1).all(0)]
    assert same.size > 100 and same.mean() > (0.99 if not ensemble else 0.9)
    assert len(np.unique(found)) == 3


def test_the_cheap_pass_of_a_shortlist_asks_at_the_first_timestep(
    make_segmenter, tiny_config, image
):
    classes, maps = ("sky", "building", "road", "red tree"), []
    for spacing in ("trailing", "leading"):
        config = tiny_config()
        config.diffusion = dataclasses.replace(config.diffusion, timestep_spacing=spacing)
        model = make_segmenter(config)
        one = model(image, classes, steps=1, seed=5)
        short = model(image, classes, steps=2, seed=5, shortlist=2)
        kept = np.flatnonzero(short.network_scores.max((0, 1)) > 0).tolist()
        maps.append((one.scores.tobytes(), kept))
    assert maps[0] == maps[1]


def test_what_a_shortlist_leaves_out_wins_nowhere(with_vae, image):
    found = with_vae(_darken)(image, ("sky", "building", "road", "photo"), shortlist=2, closed=True)
    assert len(np.unique(found.labels)) == 2


def test_a_list_of_another_order_is_refused_where_levels_stand_for_classes(
    tiny_networks, tiny_config, image, caplog
):
    trained = vocabulary.from_names(CLASSES, "run/classes.json")
    config = tiny_config(classes_per_pass=0)
    model = segmenter_lib.Segmenter(*tiny_networks, config, trained=trained)
    assert model(image, ["Sky", "building", "road"]).classes == ("Sky", "building", "road")
    for classes, words in (
        (("building, edifice", "sky", "road"), "class 0 is 'sky', not 'building'"),
        (CLASSES[:2], "there are 3 classes, not 2"),
        ((*CLASSES, "photo"), "there are 3 classes, not 4"),
        (("sky",), "there are 3 classes, not 1"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            model(image, classes)
        assert "run/classes.json" in str(caught.value)
    with caplog.at_level("WARNING"):
        segmenter_lib.Segmenter(*tiny_networks, config)(image, CLASSES)
    assert "does not say which classes" in caplog.text
    caplog.clear()
    bound = tiny_config(classes_per_pass=2, context="bound")
    for free in (tiny_config(), bound):
        with caplog.at_level("WARNING"):
            open_ = segmenter_lib.Segmenter(*tiny_networks, free, trained=trained)
            assert open_(image, ["road", "photo", "sky"]).classes == ("road", "photo", "sky")
        assert not caplog.records


def test_maps_that_are_not_finite_are_no_answer(model, with_vae, tiny_networks, image):
    unet, *rest = tiny_networks
    scaled = nnx.clone(unet)
    nnx.update(scaled, jax.tree.map(lambda x: x * np.nan, nnx.state(unet)))
    broken = segmenter_lib.Segmenter(scaled, *rest, model.config)
    for settings in ({}, {"ensemble": 2}, {"shortlist": 1}):
        with pytest.raises(UserError, match="^the map of sky is not finite: .*weights of the UNet"):
            broken(image, CLASSES, **settings)
    with pytest.raises(UserError, match="^image 1 of 2: the map of sky is"):
        broken.maps([image, image], _entries(*CLASSES), model.config.sampler, 0)
    huge = with_vae(lambda vae: nnx.update(vae, jax.tree.map(lambda x: x * 1e30, nnx.state(vae))))
    entries = _entries("sky", "road")
    with pytest.raises(UserError, match="b.png: the map of sky .*overflow"):
        huge.unclipped_maps([image, image], entries, model.config.sampler, 0, ["b.png", "c.png"])
    with pytest.raises(UserError, match="VAE decodes is not finite"):
        huge.networks.reconstruct(np.ones((1, 16, 16, 3), np.float32))


def test_no_other_list_and_no_other_number_compiles_anything(model, image, compiled):
    """Once the sizes of a call are there: 1, 2 and 4 (the batch), however many jobs there are."""
    # Of other steps than those of other tests, which may have compiled it already.
    sampler = dataclasses.replace(model.config.sampler, steps=3, batch_size=4)

    def ask(images, classes, ensemble=1, first=0):
        wanted = dataclasses.replace(sampler, ensemble=ensemble)
        listed = vocabulary.from_names([f"class {first + i}" for i in range(classes)])
        photos, entries, decoding = [image] * images, listed.classes, model.config.codec
        for gray, spread in zip(*model.unclipped_maps(photos, entries, wanted, 0), strict=True):
            model.segmentation(gray, spread if ensemble > 1 else None, image, listed, decoding)

    assert any("sample" in line for line in compiled(ask, 1, 3))
    assert compiled(ask, 1, 3, first=3) == [], "another list"
    for images, classes in ((1, 4), (1, 7), (2, 2), (3, 5)):
        assert compiled(ask, images, classes) == [], "other numbers of classes and images"
    for images, classes, ensemble in ((1, 1, 1), (1, 2, 1), (1, 4, 2)):
        ask(images, classes, ensemble)
    for images, classes, ensemble in ((1, 11, 1), (5, 1, 1), (2, 3, 2), (1, 9, 2), (3, 3, 2)):
        assert compiled(ask, images, classes, ensemble) == []


ON_MESHES = """
    import dataclasses, json, sys
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    import numpy as np
    from flax import nnx
    from segdiff_jax.inference import sampling, segmenter
    from segdiff_jax.weights import loading
    from segdiff_jax.config import MeshConfig
    from segdiff_jax.data.sources.source import open_source
    from segdiff_jax.evaluation.evaluator import evaluate
    from segdiff_jax.evaluation.plan import Plan
    from segdiff_jax.parallel import mesh as meshes
    from segdiff_jax.parallel import rules

    (*networks, config), *_ = loading.load_networks(sys.argv[1])
    config.sampler = dataclasses.replace(config.sampler, steps=2, ensemble=2, batch_size=12)
    source = open_source(config.data, config.data.val_split, config.seed)
    sampler_on, parts = sampling.sampler_on, []
    def watched(mesh):
        def sample(*arguments):
            result = sampler_on(mesh)(*arguments)
            parts.append([len(result), [s.data.shape[0] for s in result.addressable_shards]])
            return result
        return sample
    sampling.sampler_on = watched

    found = {}
    for name, sizes, devices in [
        ("1", (1, 1, 1), 1), ("8", (8, 1, 1), 8), ("2,2,2", (2, 2, 2), 8)
    ]:
        mesh = meshes.make_mesh(MeshConfig(*sizes), jax.devices()[:devices])
        unet, *rest = networks
        # As validation gets them: cut up by the rules of training.
        graph, cut = nnx.split(unet)
        cut = {"params": cut}
        cut = jax.device_put(cut, rules.state_sharding(cut, mesh))["params"]
        model = segmenter.Segmenter(nnx.merge(graph, cut), *rest, config, mesh)
        parts.clear()
        result = evaluate(Plan(model, source, limit=2, seed=1, examples=2))
        gray, spread = model.maps([source[0]["image"]], source.vocabulary.classes,
                                  config.sampler, seed=1)
        found[name] = {"confusion": result.confusion.tolist(), "parts": parts[0],
                       "labels": [e.prediction.tolist() for e in result.examples],
                       "gray": gray.tolist(), "spread": spread.tolist()}
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def on_meshes(trained):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ON_MESHES), trained], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_passes_and_members_are_shared_out_over_all_devices(on_meshes):
    assert on_meshes["1"]["parts"] == [12, [12]]
    for mesh in ("8", "2,2,2"):
        assert on_meshes[mesh]["parts"] == [16, [2] * 8]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8", "2,2,2"])
def test_what_is_found_does_not_depend_on_the_devices(on_meshes, mesh):
    alone, shared = on_meshes["1"], on_meshes[mesh]
    for name in ("gray", "spread"):
        np.testing.assert_allclose(shared[name], alone[name], atol=1e-5)
    assert np.std(alone["gray"]) > 0.01 and np.max(alone["spread"]) > 0.01
    # Sums in another order differ in the last bits: only a pixel between two classes may change.
    assert np.mean(np.array(shared["labels"]) != np.array(alone["labels"])) < 0.01
    assert np.abs(np.subtract(shared["confusion"], alone["confusion"])).sum() <= 2 * 0.01 * 512
