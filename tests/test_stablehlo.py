"""`python -m segdiff_jax.export --format stablehlo`, used by a process without this package."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segdiff_jax import conditioning, export, files, stablehlo
from segdiff_jax.data import vocabulary
from segdiff_jax.errors import UserError
from segdiff_jax.segmenter import Segmenter

pytestmark = pytest.mark.usefixtures("fast_compile")
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
maps = function.call(given["image"], given["context"], given["key"])
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


def test_a_process_without_this_package_gets_the_same_maps(trained, image, tmp_path, monkeypatch):
    monkeypatch.setattr("segdiff_jax.runtime.start", lambda: None)
    argv = ["--checkpoint", trained, "--output", str(tmp_path / "m"), "--format", "stablehlo"]
    export.main([*argv, "--steps", "3", "--ensemble", "2"])
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
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
    function = stablehlo.sampler_function(model, sampler)
    exported = jax.export.export(jax.jit(function))(*stablehlo._inputs(model))
    groups = np.array([[0, 1], [2, -1]])
    contexts, _ = conditioning.context(model.table(CLASSES), groups, "bound")
    key = jax.random.key_data(jax.random.key(1))
    for group, tokens in enumerate((2, 1)):
        gray = exported.call(image, contexts[group : group + 1, :tokens], key)
        np.testing.assert_allclose(gray[0], expected[0, group], atol=1e-5)


def test_half_precision_weights_take_half_the_space(make_segmenter, image, tmp_path):
    model, dtype = make_segmenter(), "bfloat16"
    sampler = model.config.sampler
    stablehlo.write(model, tmp_path / "half", sampler, dtype)
    weights = jax.tree.leaves((model._unet_params, model._vae_params))
    assert (tmp_path / "half" / "sampler.stablehlo").stat().st_size < (
        2 * sum(leaf.size for leaf in weights) + 300_000
    )
    rounded = make_segmenter()
    round_ = lambda tree: jax.tree.map(  # noqa: E731
        lambda a: a.astype(dtype).astype(jnp.float32), tree
    )
    rounded._unet_params, rounded._vae_params = map(
        round_, (rounded._unet_params, rounded._vae_params)
    )
    expected, _ = rounded.maps([image], CLASSES, sampler, seed=0)
    data = (tmp_path / "half" / "sampler.stablehlo").read_bytes()
    function = jax.export.deserialize(bytearray(data))
    gray = function.call(image, model.table(CLASSES).hidden, np.zeros(2, np.uint32))
    np.testing.assert_allclose(gray, expected[0], atol=1e-5)


def test_what_does_not_fit_is_refused_and_leaves_nothing(
    make_segmenter, tmp_path, monkeypatch, capsys
):
    model = make_segmenter()
    sampler = model.config.sampler
    monkeypatch.setattr(stablehlo, "_LIMIT", 1000)
    with pytest.raises(UserError, match="do not fit into one StableHLO file.*--dtype bfloat16"):
        stablehlo.write(model, tmp_path / "m", sampler)
    monkeypatch.undo()
    big = model.with_params(jax.tree.map(lambda a: a + 1e6, model._unet_params))
    with pytest.raises(UserError, match="--dtype float16: a weight overflows"):
        stablehlo.write(big, tmp_path / "m", sampler, "float16")
    assert not any(tmp_path.iterdir())


def test_an_earlier_export_stays_until_the_new_one_is_whole(make_segmenter, tmp_path, monkeypatch):
    model = make_segmenter()
    folder = tmp_path / "m"
    folder.mkdir()
    for name in (stablehlo.FUNCTION, stablehlo.DESCRIPTION):
        (folder / name).write_text("earlier")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_sync", full_disk)
    with pytest.raises(UserError, match="the disk is full"):
        stablehlo.write(model, folder, model.config.sampler)
    assert {p.read_text() for p in folder.iterdir()} == {"earlier"}
    monkeypatch.undo()
    stablehlo.write(model, folder, model.config.sampler)
    assert json.loads((folder / stablehlo.DESCRIPTION).read_text())["sampler"]["steps"] == 1
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="thesis.tex: is no part of an export"):
        stablehlo.write(model, folder, model.config.sampler)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
