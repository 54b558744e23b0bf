"""Training from cached latents: the same batches, losses and order as from pixels."""

import dataclasses
import json
import logging
import pickle
import shutil

import jax
import numpy as np
import pytest
from data.test_pipeline import equal, take
from flax import nnx
from PIL import Image

from segdiff_jax.config import AugmentConfig, CodecConfig, Config, DataConfig, TrainConfig
from segdiff_jax.data import geometry, latent_cache, latents, pipeline
from segdiff_jax.data.images import UnreadableError
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.errors import UserError
from segdiff_jax.text import vocabulary
from segdiff_jax.training import losses

SIZE = (32, 32)


class Pairs:
    """Noise in random rectangles of five classes, with an unannotated corner; class 4 is novel."""

    vocabulary = vocabulary.from_names(["sky", "building", "road", "tree", "car"])
    novel = (4,)

    def __init__(self, length=10, unreadable=()):
        self.length, self.unreadable = length, unreadable

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.unreadable:
            raise UnreadableError(f"{index}.png: truncated")
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        labels = np.kron(rng.integers(0, 5, (2, 3)), np.ones((20, 16))).astype(np.uint8)
        labels[:9, :13] = 255
        return {"image": image, "labels": labels, "name": str(index)}


def make_config(**codec):
    return Config(
        data=DataConfig(image_size=SIZE, cache_latents=True, root="pairs"),
        codec=CodecConfig(**codec),
        train=TrainConfig(batch_size=4),
    )


def mirrored_rows(batch, source):
    """How many rows of a batch of pixels show a pair mirrored."""
    fitted = [geometry.fit(source[i]["image"], SIZE, "pad") for i in range(10)]
    turned = {image[:, ::-1].tobytes() for image in fitted}
    return sum(image.tobytes() in turned for image in batch["image"])


@pytest.fixture(scope="module")
def vae(tiny_networks):
    return tiny_networks[1]


@pytest.fixture(scope="module")
def encode(vae):
    """The latents of a batch of pixels, as the training step makes them."""
    graph, params = nnx.split(vae)
    run = jax.jit(lambda p, batch: losses.latents(nnx.merge(graph, p), batch))
    return lambda batch: run(params, batch)


@pytest.fixture(scope="module")
def cache(vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "latents"
    return latent_cache.open_or_build(Pairs(), vae, make_config(), str(folder)), folder


@pytest.fixture
def copy(cache, tmp_path):
    """A folder with the cache of `Pairs` that may be changed."""
    return shutil.copytree(cache[1], tmp_path / "latents")


@pytest.mark.parametrize(
    ("codec", "augment"),
    [
        ({"negatives": 0.4}, None),
        ({"negatives": 1.0}, None),
        ({"classes_per_pass": 0}, None),
        ({"negatives": 0.4}, AugmentConfig(max_scale=2.0, color_jitter=0.4, views=3)),
    ],
)
def test_batches_hold_what_the_step_would_have_encoded(
    vae, encode, cache, tmp_path, codec, augment
):
    config, source, folder = make_config(**codec), Pairs(), tmp_path / "latents"
    stored, f, config.seed = cache[0], vae.config.downsampling, 7
    if augment or "classes_per_pass" in codec:
        config.data.augment = augment or config.data.augment
        stored = latent_cache.open_or_build(source, vae, config, str(folder))
    from_pixels = take(pipeline.train_batches(source, config, 7), 12 if augment else 6)
    from_cache = take(latents.train_batches(stored, config, 7), len(from_pixels))
    for pixels, cached in zip(from_pixels, from_cache, strict=True):
        assert (pixels["class_ids"] == cached["class_ids"]).all()
        assert cached["class_ids"].dtype == np.int32 and cached["valid"].dtype == bool
        image_latents, mask_latents = encode(pixels)
        np.testing.assert_allclose(cached["image_latents"], image_latents, atol=1e-5)
        np.testing.assert_allclose(cached["mask_latents"], mask_latents, atol=1e-5)
        for balance in (0.0, 0.5):
            weights = losses.latent_weights(pixels, f, balance)
            assert (losses.latent_weights(cached, f, balance) == weights).all()
        assert 0 < cached["valid"].mean() < 1
    if augment:
        images = {image.tobytes() for pixels in from_pixels for image in pixels["image"]}
        assert 20 < len(images) <= 30, "three views of each of ten pairs"
        config.seed = 1
        reason = latent_cache._outdated(str(folder), latent_cache.fingerprint(source, vae, config))
        assert "seed" in reason, "another seed has other views"
    else:
        mirrored = sum(mirrored_rows(batch, source) for batch in from_pixels)
        assert 4 < mirrored < 20, "both views must be among the 24 examples"


def test_processes_together_hold_the_same_global_batch(cache):
    config = make_config()
    whole = take(latents.train_batches(cache[0], config, 0, 3), 2)
    for rows in ([0, 2], [1, 3]):
        part = take(latents.train_batches(cache[0], config, 0, 3, rows), 2)
        for mine, batch in zip(part, whole, strict=True):
            assert equal(mine, {key: batch[key][rows] for key in batch})


def test_shards_of_several_processes_make_the_same_cache(vae, cache, tmp_path):
    whole, folder = cache
    for process in range(3):
        latent_cache._write_shard(Pairs(), vae, make_config(), tmp_path, process, 3)
    description = json.loads((folder / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps(description | {"shards": 3}))
    parts = latents.Latents(str(tmp_path), Pairs())
    pairs = [take(latents.train_batches(stored, make_config(), 0), 4) for stored in (whole, parts)]
    for a, b in zip(*pairs, strict=True):
        assert all(np.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_an_open_cache_travels_to_worker_processes(cache):
    sent = pickle.loads(pickle.dumps(cache[0]))
    batches = [next(latents.train_batches(one, make_config(), 0)) for one in (cache[0], sent)]
    assert equal(*batches)


def test_a_cache_that_fits_is_used_and_a_stale_one_is_built_again(vae, cache, monkeypatch, caplog):
    built = []
    monkeypatch.setattr(latent_cache, "build", lambda *args: built.append(args))

    def opened(source=None, vae=vae, config=None, **data):
        built.clear()
        config = config or make_config()
        config.data = dataclasses.replace(config.data, **data)
        with caplog.at_level(logging.INFO):
            latent_cache.open_or_build(source or Pairs(), vae, config, str(cache[1]))
        return bool(built)

    assert not opened()
    config = make_config(negatives=0.9)  # decided when batches are made
    config.train.steps, config.seed = 7, 5
    assert not opened(config=config, workers=1)

    assert opened(source=Pairs(11)) and "another pairs" in caplog.text
    other, scaled = nnx.clone(vae), nnx.clone(vae)
    kernel = other.encoder.conv_in.kernel
    kernel[...] = kernel[...].at[0, 0, 0, 0].add(1e-6)
    assert opened(vae=other) and "another vae" in caplog.text
    scaled.config = dataclasses.replace(vae.config, scaling_factor=0.5)
    assert opened(vae=scaled)
    assert opened(image_size=(32, 36)) and opened(fit="stretch") and opened(root="b")
    assert opened(augment=AugmentConfig(flip=False))
    assert opened(config=make_config(classes_per_pass=0)) and "all_in_one_image" in caplog.text


def test_a_corrected_mask_makes_the_cache_stale(vae, tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    config = make_config()
    config.data.root = str(tmp_path)
    Image.new("RGB", SIZE, (9, 99, 200)).save(tmp_path / "images/a.png")

    def shown(class_id):
        Image.new("L", SIZE, class_id).save(tmp_path / "masks/a.png")
        source = open_source(config.data, "train", 0)
        stored = latent_cache.open_or_build(source, vae, config, str(tmp_path / "latents"))
        return stored.classes(0, 0).tolist()

    assert shown(0) == [0]
    assert shown(1) == [1]
    Image.new("RGB", (99, 99)).save(tmp_path / "images/b.png")
    Image.new("L", (99, 99)).save(tmp_path / "masks/b.png")
    for limit, readable in ((9800, 1), (9801, 2)):  # what its message advises must help
        config.data.max_pixels, config.data.max_unreadable = limit, 0.5
        source = open_source(config.data, "train", 0)
        stored = latent_cache.open_or_build(source, vae, config, str(tmp_path / "latents"))
        assert sum(not isinstance(pair, str) for pair in stored._contents) == readable


def test_a_damaged_cache_is_built_again(vae, copy):
    shard = copy / "latents-00000.array_record"
    content = shard.read_bytes()

    def opened():
        return latent_cache.open_or_build(Pairs(), vae, make_config(), str(copy))

    good = opened().image(3, 1)[0]
    for damaged in (content[:70_000], b""):
        shard.write_bytes(damaged)
        again = opened()
        assert (again.image(3, 1)[0] == good).all()
    shard.write_bytes(b"x" * len(content))  # while training reads it
    with pytest.raises(UserError, match=r"latents: damaged .* remove it"):
        take(latents.train_batches(again, make_config(), 0), 9)
    (copy / "cache.json").write_text("{")
    assert len(opened()) == 10


class Interrupted(Pairs):
    def __getitem__(self, index):
        if index == 7:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_a_file_of_the_user_among_the_latents_is_not_removed(vae, copy):
    (copy / "notes.txt").write_text("mine")
    before = sorted(path.name for path in copy.iterdir())
    with pytest.raises(UserError, match="notes.txt: is no part of a latent cache"):
        latent_cache.open_or_build(Pairs(5), vae, make_config(), str(copy))
    assert sorted(path.name for path in copy.iterdir()) == before
    (copy / "notes.txt").unlink()
    assert len(latent_cache.open_or_build(Pairs(5), vae, make_config(), str(copy))) == 5


def test_an_interrupted_build_leaves_nothing(vae, tmp_path):
    folder = str(tmp_path / "latents")
    with pytest.raises(KeyboardInterrupt):
        latent_cache.open_or_build(Interrupted(), vae, make_config(), folder)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_build_left_is_no_cache_and_goes_away(vae, tmp_path):
    left = tmp_path / ".latents.partial"
    left.mkdir()
    latent_cache._write_shard(Pairs(3), vae, make_config(), left, 0, 1)
    stored = latent_cache.open_or_build(Pairs(), vae, make_config(), str(tmp_path / "latents"))
    assert len(stored) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_a_full_disk_is_one_clear_line(vae, tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            pass

        def write(self, data):
            raise RuntimeError("write() failed: No space left on device; writing /x; at byte 0")

        def close(self):
            pass

    monkeypatch.setattr(latent_cache, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=r"latents: .*No space left on device: free") as caught:
        latent_cache.open_or_build(Pairs(), vae, make_config(), str(tmp_path / "latents"))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_unreadable_pairs_are_replaced_as_when_training_from_pixels(vae, encode, tmp_path):
    config, source = make_config(), Pairs(10, unreadable=(2, 3))
    config.data.max_unreadable = 0.2
    stored = latent_cache.open_or_build(source, vae, config, str(tmp_path / "latents"))
    from_pixels = pipeline.train_batches(source, config, 0)
    from_cache = latents.train_batches(stored, config, 0)
    for pixels, cached in zip(take(from_pixels, 5), take(from_cache, 5), strict=True):
        np.testing.assert_allclose(cached["image_latents"], encode(pixels)[0], atol=1e-5)
    assert from_cache.unreadable == from_pixels.unreadable
    assert set(from_cache.unreadable) == {2, 3}

    config.data.max_unreadable = 0.1
    with pytest.raises(UserError, match=r"png: truncated \(2 of 10 pairs unreadable"):
        latent_cache.open_or_build(source, vae, config, str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("classes_per_pass", [0, 1])
def test_a_cache_of_nothing_readable_is_one_clear_line(vae, tmp_path, classes_per_pass):
    config, source = make_config(classes_per_pass=classes_per_pass), Pairs(3, range(3))
    config.data.max_unreadable = 1.0
    stored = latent_cache.open_or_build(source, vae, config, str(tmp_path / "latents"))
    with pytest.raises(UserError, match=r"png: truncated \(3 of 3 pairs unreadable"):
        next(latents.train_batches(stored, config, 0))
