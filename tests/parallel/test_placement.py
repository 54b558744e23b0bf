"""Pre-trained weights on a mesh of 8 devices, in a process that forces them; rows of work."""

import json
import subprocess
import sys
import textwrap

import pytest

from segdiff_jax.parallel.placement import rows_of_call

SETUP = """
    import contextlib, json, math, sys
    from functools import partial
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    import numpy as np
    from flax import nnx
    from segdiff_jax.config import (
        Config, DataConfig, MeshConfig, ModelConfig, PromptsConfig, TrainConfig)
    from segdiff_jax.weights import pretrained, tensors
    from segdiff_jax.models.clip_text import CLIPText
    from segdiff_jax.models.presets import PRESETS
    from segdiff_jax.data.sources.scenes import vocabulary
    from segdiff_jax.text.tokenizer import train_tokenizer
    from segdiff_jax.models.unet import UNet
    from segdiff_jax.models.vae import VAE
    from segdiff_jax.train import train
    from segdiff_jax.training import networks
    from segdiff_jax.training import run as runs
    from segdiff_jax.parallel import placement
    from segdiff_jax.parallel import mesh as meshes
    from segdiff_jax.parallel import rules
    from segdiff_jax.training.step import init_state

    folder, workdir = sys.argv[1:]
    rng = np.random.default_rng(0)
    def filled(make):
        graph, shapes = nnx.split(tensors.shapes_of(make))
        host = jax.tree.map(lambda a: rng.normal(0, 0.1, a.shape).astype(np.float32), shapes)
        return nnx.merge(graph, host), host
    tiny = PRESETS["tiny"]
    written, host = filled(partial(UNet, tiny.unet))
    tokenizer = train_tokenizer(vocabulary().names, 600, 10)
    pretrained.save(pretrained.Pretrained(
        unet=written, vae=filled(partial(VAE, tiny.vae))[0],
        text_encoder=filled(partial(CLIPText, tiny.text_encoder))[0],
        tokenizer=tokenizer, schedule=Config().diffusion), folder)

    def held():  # bytes on the fullest device; a look at the shards would make arrays of them
        totals = dict.fromkeys(jax.devices(), 0)
        for array in jax.live_arrays():
            part = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
            for device in array.sharding.device_set:
                totals[device] += part
        return max(totals.values())

    mesh = meshes.make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    put, peaks = placement.placer(mesh), []
    def place(path, array):
        placed = put(path, array)
        peaks.append(held())
        return placed

    before = held()
    unet = pretrained.load(folder, ("unet",), place=place).unet
    graph, params = nnx.split(unet)
    loaded = held()
    same = all(
        np.array_equal(np.asarray(a), b)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(host), strict=True)
    )
    # What training does with them next.
    config = Config()
    state = jax.eval_shape(lambda p: init_state(p, config), params)
    shardings = rules.state_sharding(state, mesh)
    create = jax.jit(lambda p: init_state(p, config), out_shardings=shardings)
    analysis = create.lower(params).compile().memory_analysis()
    created = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    created += analysis.temp_size_in_bytes
    as_wanted = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim),
                             params, rules.state_sharding(params, mesh))
    # The same through a run, up to where the state is made.
    base, run = held(), {"peak": 0, "arrays": 0}
    def spying(mesh):
        put = placement.placer(mesh)
        def place(path, array):
            placed = put(path, array)
            run["peak"], run["arrays"] = max(run["peak"], held() - run["base"]), run["arrays"] + 1
            return placed
        run["base"] = held()
        return place
    def instead(setup):
        params = setup.state.params
        wanted = rules.state_sharding({"params": params}, setup.run.mesh)["params"]
        run["as_wanted"] = all(jax.tree.leaves(jax.tree.map(
            lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), params, wanted)))
        raise KeyboardInterrupt
    networks.placer, runs.loop = spying, instead
    config = Config(
        prompts=PromptsConfig(("{class}",)), init_from=folder,
        mesh=MeshConfig(data=1, fsdp=8, tensor=1), model=ModelConfig("tiny"),
        train=TrainConfig(batch_size=8, eval_every=0), data=DataConfig(source="scenes"),
    )
    with contextlib.suppress(KeyboardInterrupt):
        train(config, workdir)
    json.dump({
        "run": run,
        "whole": sum(a.nbytes for a in jax.tree.leaves(host)),
        "largest": max(a.nbytes for a in jax.tree.leaves(host)),
        "before": before, "peak": max(peaks), "loaded": loaded, "same": same,
        "creating": created, "arrays": len(peaks), "leaves": len(jax.tree.leaves(host)),
        "as_wanted": all(jax.tree.leaves(as_wanted)),
    }, sys.stdout)
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    root = tmp_path_factory.mktemp("placement")
    command = [sys.executable, "-c", textwrap.dedent(SETUP), str(root / "model"), str(root / "run")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_no_device_ever_holds_the_whole_unet(seen):
    print(seen)
    assert seen["arrays"] == seen["leaves"]
    assert seen["before"] < 0.01 * seen["whole"]
    # An eighth, and the vectors, which are replicated.
    assert seen["peak"] == seen["loaded"] <= seen["whole"] / 8 * 1.1
    # Parameters as read, and the state: parameters, two moments.
    assert seen["creating"] <= 4.4 * seen["whole"] / 8
    assert seen["same"] and seen["as_wanted"]
    run = seen["run"]  # a training reads its starting point in this way
    assert run["arrays"] == seen["leaves"] and run["as_wanted"]
    assert run["peak"] <= seen["whole"] / 8 * 1.1


@pytest.mark.parametrize(("most", "devices"), [(1, 1), (4, 1), (25, 1), (32, 1), (32, 8), (5, 4)])
def test_few_sizes_that_waste_little(most, devices):
    largest = -(-most // devices) * devices
    sizes = {count: rows_of_call(count, most, devices) for count in range(1, 3 * largest)}
    assert len(set(sizes.values())) <= 8 and max(sizes.values()) == largest
    for count, size in sizes.items():
        assert size % devices == 0 and size >= min(count, largest)
        assert size <= max(devices, 1.6 * (count + devices - 1))
        assert (size == largest) or count <= size
    assert list(sizes.values()) == sorted(sizes.values())
