"""`python -m segdiff_jax.export --format stablehlo`, used by a process without this package."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from segdiff_jax import export, ownership
from segdiff_jax.errors import UserError
from segdiff_jax.inference import stablehlo
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.models.unet import UNet
from segdiff_jax.text import conditioning, vocabulary

CLASSES = vocabulary.from_names(["sky", "building, edifice", "road"]).classes

# Runs in an empty folder with only the exported files' paths: it knows nothing of this repository.
STRANGER = """
import json, pathlib, sys
import numpy as np
from jax import export

folder, inputs, outputs = map(pathlib.Path, sys.argv[1:])
about = json.loads((folder / "sampler.json").read_text())
function = export.deserialize(bytearray((folder / about["function"]).read_bytes()))
given = np.load(inputs)
for name in ("image", "key"):
    assert list(given[name].shape) == about["inputs"][name]["shape"]
    assert given[name].dtype == about["inputs"][name]["dtype"]
assert list(function.platforms) == about["platforms"] == ["cpu", "cuda", "tpu"]
inputs = [given[name] for name in ("image", "context", "key")]
if about["weights"]:
    from safetensors.numpy import load_file
    inputs = [load_file(folder / about["weights"]), *inputs]
maps = function.call(*inputs)
assert not [name for name in sys.modules if name.split(".")[0] == "segdiff_jax"]
np.save(outputs, maps)
"""


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def call_elsewhere(folder, tmp_path, image, contexts, seed):
    """The maps of `contexts` [P, L, D]."""
    key = np.array([0, seed], np.uint32)
    np.savez(tmp_path / "in.npz", image=image, key=key, context=contexts)
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    (empty / "stranger.py").write_text(STRANGER)
    arguments = [folder, tmp_path / "in.npz", tmp_path / "out.npy"]
    command = [sys.executable, "-P", "stranger.py", *map(str, arguments)]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    subprocess.run(command, cwd=empty, env=environment, check=True)
    return np.load(tmp_path / "out.npy")


def call_here(folder, *inputs, seed):
    function = jax.export.deserialize(bytearray((folder / stablehlo.FUNCTION).read_bytes()))
    return function.call(*inputs, np.array([0, seed], np.uint32))


def test_a_process_without_this_package_gets_the_same_maps(trained, image, tmp_path, monkeypatch):
    monkeypatch.setattr("segdiff_jax.parallel.runtime.start", lambda: None)
    argv = ["--checkpoint", trained, "--output", str(tmp_path / "m"), "--format", "stablehlo"]
    export.main([*argv, "--steps", "3", "--ensemble", "2"])
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        ownership.MARKER,
        "sampler.json",
        "sampler.stablehlo",
    ]
    model = Segmenter.load(trained)
    sampler = dataclasses.replace(model.config.sampler, steps=3, ensemble=2)
    expected, _ = model.maps([image], CLASSES, sampler, seed=5)
    contexts = np.asarray(model.table(CLASSES).hidden)
    found = call_elsewhere(tmp_path / "m", tmp_path, image, contexts, seed=5)
    assert found.shape == (3, 16, 16)
    assert np.std(found) > 1e-3, "a constant map would pass"
    print(f"StableHLO: {np.abs(found - expected[0]).max():.1e}")
    np.testing.assert_allclose(found, expected[0], atol=1e-5)


def test_context_of_several_classes_per_pass(make_segmenter, tiny_config, image):
    """For "bound" the number of tokens is open: the last group may have fewer classes."""
    model = make_segmenter(tiny_config(classes_per_pass=2, context="bound"))
    sampler = model.config.sampler
    assert stablehlo.describe(model, sampler, "float32")["inputs"]["context"]["shape"][:2] == [
        "P",
        "L",
    ]
    expected, _ = model.maps([image], CLASSES, sampler, seed=1)
    function = partial(stablehlo.sample_with(model, sampler), stablehlo._stored(model, "float32"))
    exported = jax.export.export(jax.jit(function))(*stablehlo._inputs(model))
    groups = np.array([[0, 1], [2, -1]])
    contexts, _ = conditioning.context(model.table(CLASSES), groups, "bound")
    key = jax.random.key_data(jax.random.key(1))
    for group, tokens in enumerate((2, 1)):
        gray = exported.call(image, contexts[group : group + 1, :tokens], key)
        np.testing.assert_allclose(gray[0], expected[0, group], atol=1e-5)


def test_who_follows_the_description_paints_the_same_labels(tiny_networks, tiny_config, image):
    """Classes that were rare in training are raised: known ones, synonyms and unknown ones."""
    config = tiny_config(classes_per_pass=1, closed=True, logit_adjustment=0.75)
    trained = vocabulary.from_names(["sky", "building, edifice", "pole"])
    trained = dataclasses.replace(trained, shares=(0.05, 0.9, 1e-9))
    model, names = Segmenter(*tiny_networks, config, trained=trained), ["Sky", "edifice", "road"]
    about = json.loads(json.dumps(stablehlo.describe(model, config.sampler, "float32")))
    maps, _ = model.maps([image], vocabulary.from_names(names).classes, config.sampler, seed=0)
    scores, rule = (maps[0] + 1) / 2, about["adjustment"]
    assert rule["score"] == "s * f / (s * f + 1 - s)" and about["codec"]["closed"]
    factors = [rule["factors"].get(name.lower(), rule["factor_of_other_names"]) for name in names]
    f = np.array(factors)[:, None, None]
    adjusted = scores * f / (scores * f + 1 - scores)
    found = model(image, names)
    np.testing.assert_allclose(found.scores, np.moveaxis(adjusted, 0, -1), atol=1e-5)
    np.testing.assert_array_equal(found.labels, adjusted.argmax(0))
    assert (found.labels != scores.argmax(0)).any()
    plain = stablehlo.describe(Segmenter(*tiny_networks, tiny_config()), config.sampler, "float32")
    assert plain["adjustment"] is None
    with pytest.raises(UserError, match="set config.codec.logit_adjustment to 0"):
        stablehlo.describe(Segmenter(*tiny_networks, config), config.sampler, "float32")


def test_half_precision_weights_take_half_the_space(make_segmenter, tiny_networks, image, tmp_path):
    model, dtype = make_segmenter(), "bfloat16"
    sampler = model.config.sampler
    stablehlo.write(model, tmp_path / "half", sampler, dtype)
    weights = jax.tree.leaves((model.networks.unet_params, model.networks.vae_params))
    assert (tmp_path / "half" / "sampler.stablehlo").stat().st_size < (
        2 * sum(leaf.size for leaf in weights) + 300_000
    )
    rounded = []
    for network in tiny_networks[:2]:
        graph, params = nnx.split(network)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params)
        rounded.append(nnx.merge(graph, params))
    rounded = Segmenter(*rounded, *tiny_networks[2:], model.config)
    expected, _ = rounded.maps([image], CLASSES, sampler, seed=0)
    gray = call_here(tmp_path / "half", image, model.table(CLASSES).hidden, seed=0)
    np.testing.assert_allclose(gray, expected[0], atol=1e-5)


def test_weights_beyond_the_limit_lie_beside(make_segmenter, image, tmp_path, monkeypatch):
    monkeypatch.setattr(stablehlo, "_LIMIT", 1000)
    model = make_segmenter()
    stablehlo.write(model, tmp_path / "m", model.config.sampler)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "m").iterdir()}
    names = {stablehlo.FUNCTION, stablehlo.DESCRIPTION, stablehlo.WEIGHTS}
    assert set(sizes) == names | {ownership.MARKER}
    assert ownership.owned(tmp_path / "m") == {"stablehlo": names}
    assert sizes[stablehlo.WEIGHTS] >= stablehlo._size(model, "float32")
    weights = load_file(tmp_path / "m" / stablehlo.WEIGHTS)
    found = call_here(tmp_path / "m", weights, image, model.table(CLASSES).hidden, seed=2)
    expected, _ = model.maps([image], CLASSES, model.config.sampler, seed=2)
    assert np.std(found) > 1e-3, "a constant map would pass"
    np.testing.assert_allclose(found, expected[0], atol=1e-5)
    monkeypatch.undo()  # a smaller model over it: no weights of the larger one stay
    stablehlo.write(model, tmp_path / "m", model.config.sampler)
    assert stablehlo.WEIGHTS not in {path.name for path in (tmp_path / "m").iterdir()}


@pytest.mark.slow
def test_more_than_two_gigabytes(tiny_networks, tiny_config, image, tmp_path):
    """Half a billion parameters that cost little: a very wide context. About 8 GB of memory."""
    wide = 270_000
    small, vae, _, tokenizer = tiny_networks
    config = dataclasses.replace(small.config, block_out_channels=(256,), cross_attention_dim=wide)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def fill(leaf):
        values = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(values / max(1, np.prod(leaf.shape[:-1])) ** 0.5)

    unet = nnx.merge(graph, jax.tree.map(fill, shapes))
    text_encoder = SimpleNamespace(config=SimpleNamespace(hidden_size=wide))
    model = Segmenter(unet, vae, text_encoder, tokenizer, tiny_config())
    sampler = model.config.sampler
    stablehlo.write(model, tmp_path / "m", sampler)
    weights = tmp_path / "m" / stablehlo.WEIGHTS
    assert weights.stat().st_size > 2**31
    contexts = rng.standard_normal((2, tokenizer.model_max_length, wide), np.float32)
    found = call_elsewhere(tmp_path / "m", tmp_path, image, contexts, seed=3)
    weights.unlink()
    key = np.array([0, 3], np.uint32)
    function = jax.jit(stablehlo.sample_with(model, sampler))
    expected = function(stablehlo._named_weights(model), image, contexts, key)
    assert np.std(found) > 1e-3, "a constant map would pass"
    assert np.abs(found[0] - found[1]).max() > 1e-3, "the context says something"
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_overflow_is_refused_and_leaves_nothing(tiny_networks, tiny_config, tmp_path):
    unet, *rest = tiny_networks
    big = nnx.clone(unet)
    nnx.update(big, jax.tree.map(lambda a: a + 1e6, nnx.state(unet)))
    big = Segmenter(big, *rest, tiny_config())
    with pytest.raises(UserError, match="--dtype float16: a weight overflows"):
        stablehlo.write(big, tmp_path / "m", big.config.sampler, "float16")
    assert not any(tmp_path.iterdir())
