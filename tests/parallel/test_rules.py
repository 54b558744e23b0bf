"""Placement needs several devices, so what runs on a mesh runs once in a process that forces 8."""

import itertools
import json
import math
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from segdiff_jax.config import MeshConfig
from segdiff_jax.errors import UserError
from segdiff_jax.models.presets import PRESETS
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE
from segdiff_jax.parallel import rules
from segdiff_jax.parallel.mesh import make_mesh
from segdiff_jax.parallel.rules import leaf_path, partition, spread
from segdiff_jax.weights.tensors import shapes_of

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
ATTENTION = "down_blocks/0/attentions/0/transformer_blocks/0/attn1"
RESNET = "up_blocks/3/resnets/2"


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        (f"{ATTENTION}/to_q/kernel", (64, 64), P("fsdp", "tensor")),
        (f"{ATTENTION}/to_out/kernel", (64, 64), P("tensor", "fsdp")),
        (f"{RESNET}/conv1/kernel", (3, 3, 64, 32), P(None, None, "fsdp", "tensor")),
        (f"0/1/mu/{RESNET}/conv2/kernel", (3, 3, 32, 32), P(None, None, "tensor", "fsdp")),
        ("conv_in/kernel", (3, 3, 8, 32), P(None, None, None, ("fsdp", "tensor"))),
        ("conv_out/kernel", (3, 3, 30, 3), P(None, None, "fsdp", None)),
        ("square/kernel", (64, 64), P(None, ("fsdp", "tensor"))),
        (f"{RESNET}/conv1/bias", (32,), P("tensor")),
        (f"{RESNET}/norm1/scale", (32,), P()),
        ("step", (), P()),
        ("odd/kernel", (3, 5), P(None, None)),
    ],
)
def test_rules(path, shape, expected):
    assert partition(path, shape, SIZES) == expected


@pytest.fixture(scope="module")
def model_parameters():
    unet, vae, _ = PRESETS["tiny"]
    models = shapes_of(lambda rngs: nnx.List([UNet(unet, rngs=rngs), VAE(vae, rngs=rngs)]))
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.state(models))
    return {"/".join(leaf_path(path)): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (1, 8), (2, 2), (4, 4)])
def test_rules_cut_the_real_models_to_ninety_percent_of_ideal(model_parameters, fsdp, tensor):
    sizes = {"data": 2, "fsdp": fsdp, "tensor": tensor}

    def on_device(path, shape):
        cuts = [(c,) if isinstance(c, str) else c or () for c in partition(path, shape, sizes)]
        axes = itertools.chain.from_iterable(cuts)
        return math.prod(shape) // math.prod(sizes[a] for a in axes)

    whole = sum(math.prod(shape) for shape in model_parameters.values())
    assert whole / sum(itertools.starmap(on_device, model_parameters.items())) >= (
        0.9 * fsdp * tensor
    )


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        (P(), (3, 3, 8, 32), P(None, None, None, "data")),
        (P(None, "fsdp"), (64, 64), P(None, ("fsdp", "data"))),
        (P("fsdp", "tensor"), (64, 128), P("fsdp", ("tensor", "data"))),
        (P(None, "fsdp"), (64, 6), P(None, "fsdp")),  # would need a second dimension
        (P(), (3, 5), P()),
        (P(), (32,), P()),
    ],
)
def test_training_state_is_cut_over_replicas_too(spec, shape, expected, monkeypatch):
    monkeypatch.setattr(rules, "SMALLEST_SPREAD", 0)
    assert spread(spec, shape, SIZES) == expected
    assert spread(spec, shape, SIZES | {"data": 1}) == spec
    monkeypatch.undo()
    assert spread(spec, shape, SIZES) == spec  # an array so small stays as the rules cut it


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (MeshConfig(data=3), "config.mesh.data"),
        (MeshConfig(data=-1, fsdp=3), "config.mesh.fsdp"),
        (MeshConfig(data=-1, tensor=5), "config.mesh.tensor"),
        (MeshConfig(data=-1, fsdp=-1), "config.mesh.fsdp"),
        (MeshConfig(data=1, fsdp=0), "config.mesh.fsdp"),
        (MeshConfig(data=-2), "config.mesh.data"),
        (MeshConfig(dcn_fsdp=2), "config.mesh.dcn_fsdp"),
        (MeshConfig(dcn_data=2), "config.mesh.dcn_data"),
        (MeshConfig(dcn_data=0), "config.mesh.dcn_data"),
    ],
)
def test_impossible_meshes_name_the_key(config, key):
    with pytest.raises(UserError, match=key) as error:
        make_mesh(config, jax.devices()[:1])
    assert "\n" not in str(error.value)


TWO_SLICES = """
    import json
    import numpy as np
    from jax.experimental import topologies
    from segdiff_jax.config import Config, MeshConfig, ModelConfig
    from segdiff_jax.errors import UserError
    from segdiff_jax.models import presets
    from segdiff_jax.aot import make_step
    from segdiff_jax.parallel import rules
    from segdiff_jax.parallel.mesh import make_mesh
    from segdiff_jax.parallel.rules import state_sharding

    found = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:2x2", num_slices=2
    ).devices
    meshes = {}
    for name, config in {
        "data": MeshConfig(),
        "ici": MeshConfig(data=1, fsdp=2, tensor=2),
        "fsdp": MeshConfig(data=2, fsdp=2, dcn_data=1, dcn_fsdp=2),
    }.items():
        mesh = make_mesh(config, found)
        slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
        state = {"params": {"kernel": np.empty((1024, 512))}}
        spec = state_sharding(state, mesh)["params"]["kernel"].spec
        meshes[name] = [dict(mesh.shape), slices.tolist(), "data" in str(spec)]
    awkward = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:4x4", num_slices=2
    ).devices
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1), awkward)
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    meshes["awkward"] = [dict(mesh.shape), slices.tolist()]
    rules.SMALLEST_SPREAD = 0  # the arrays here are small
    presets.PRESETS["micro"] = presets.small((32,), (4, 8), 32)
    programs = {}
    for name, sizes in {"1": (1, 4), "-1": (-1, 4), "within": (2, 2)}.items():
        config = Config(mesh=MeshConfig(*sizes), model=ModelConfig(preset="micro"))
        config.data.image_size = (16, 16)
        mesh = make_mesh(config.mesh, found)
        step = make_step(config, mesh)
        programs[name] = step.function.lower(*step.arguments).as_text()
        constraints = [x for x in programs[name].splitlines() if "sharding_constraint" in x]
        over_replicas = sum('"data"' in line for line in constraints)
        meshes[f"step {name}"] = [dict(mesh.shape), over_replicas]
    meshes["same"] = programs["1"] == programs["-1"]
    try:
        make_mesh(MeshConfig(dcn_data=3), found)
    except UserError as error:
        meshes["error"] = str(error)
    print(json.dumps(meshes))
"""


def test_slices_are_told_apart_from_the_devices_within_them():
    """On descriptions of two TPU slices of four chips each."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TWO_SLICES)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    meshes = json.loads(run.stdout.splitlines()[-1])
    # All chips of a slice next to each other: gradients cross the slow network once.
    shape, slices, spread = meshes["data"]
    assert spread
    assert shape == {"data": 8, "fsdp": 1, "tensor": 1}
    assert np.ravel(slices).tolist() == [0] * 4 + [1] * 4
    shape, slices, spread = meshes["ici"]
    assert not spread  # weights do not cross the slow network
    assert shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert slices == [[[0, 0], [0, 0]], [[1, 1], [1, 1]]]
    shape, slices, spread = meshes["fsdp"]
    assert spread
    assert shape == {"data": 2, "fsdp": 4, "tensor": 1}
    assert np.squeeze(slices).tolist() == [[0, 0, 1, 1]] * 2
    # 8 is no product of the 4 × 4 chips' axes: one of these is split.
    shape, slices = meshes["awkward"]
    assert shape == {"data": 4, "fsdp": 8, "tensor": 1}
    assert np.squeeze(slices).tolist() == [[0] * 8] * 2 + [[1] * 8] * 2
    # A slice to each replica, however that is written: gradients stay within it as the state does.
    assert meshes["step 1"] == meshes["step -1"] and meshes["same"]
    assert meshes["step 1"][0] == {"data": 2, "fsdp": 4, "tensor": 1}
    assert meshes["step 1"][1] < meshes["step within"][1]
    assert "config.mesh.dcn_data" in meshes["error"] and "there are 2" in meshes["error"]


EIGHT_DEVICES = """
    import json, sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    import jax.numpy as jnp, numpy as np, optax
    from segdiff_jax.config import MeshConfig, OptimizerConfig
    from segdiff_jax.errors import UserError
    from segdiff_jax.parallel import mesh as meshes
    from segdiff_jax.parallel import placement
    from segdiff_jax.parallel import rules
    from segdiff_jax.training.optimizer import make_optimizer

    rules.SMALLEST_SPREAD = 0  # the arrays here are small
    rng = np.random.default_rng(0)
    def array(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)
    def block(c):
        return {
            "conv1": {"kernel": array(3, 3, c, 2 * c), "bias": array(2 * c)},
            "conv2": {"kernel": array(3, 3, 2 * c, c), "bias": array(c)},
        }
    params = {
        "conv_in": {"kernel": array(3, 3, 3, 16)},
        "resnets": {0: block(16)},
        "to_q": {"kernel": array(16, 32)},
        "to_out": {"kernel": array(32, 16)},
        "odd": {"kernel": array(3, 5)},
    }
    adamw = optax.adamw(1e-2)
    muon = make_optimizer(OptimizerConfig(method="muon", learning_rate=1e-2, warmup_steps=0))
    images, targets = array(16, 6, 6, 3), array(16, 6, 6, 16)

    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    def loss(p, x, y):
        h = conv(x, p["conv_in"]["kernel"])
        for r in p["resnets"].values():
            a = jax.nn.silu(conv(h, r["conv1"]["kernel"]) + r["conv1"]["bias"])
            h = h + conv(a, r["conv2"]["kernel"]) + r["conv2"]["bias"]
        h = h + (h @ p["to_q"]["kernel"]) @ p["to_out"]["kernel"]
        return jnp.mean((h - y) ** 2) + jnp.sum(p["odd"]["kernel"] ** 2) * 1e-3

    def train(config, devices, optimizer=adamw):
        mesh = meshes.make_mesh(config, devices)
        state = {"params": params, "optimizer": optimizer.init(params), "ema": params}
        shardings = rules.state_sharding(jax.eval_shape(lambda: state), mesh)
        state = jax.device_put(state, shardings)
        x, y = jax.device_put((images, targets), meshes.batch_sharding(mesh))
        def step(state, x, y):
            whole = rules.gathered(state["params"], mesh)
            value, grads = jax.value_and_grad(loss)(whole, x, y)
            grads = rules.scattered(grads, mesh)
            updates, opt = optimizer.update(grads, state["optimizer"], state["params"])
            new = optax.apply_updates(state["params"], updates)
            state = {"params": new, "optimizer": opt, "ema": state["ema"]}
            return state, value
        step = jax.jit(step, out_shardings=(shardings, meshes.replicated(mesh)))
        losses = []
        for _ in range(20):
            state, value = step(state, x, y)
            losses.append(float(value))
        held = [sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards
                    if s.device == d) for d in devices]
        return {"losses": losses, "bytes": max(held), "mesh": dict(mesh.shape),
                "rows": x.addressable_shards[0].data.shape[0]}

    runs = {"1": train(MeshConfig(), jax.devices()[:1])}
    for sizes in [(-1, 1, 1), (2, -1, 1), (2, 2, 2), (1, 2, 4)]:
        config = MeshConfig(*sizes)
        runs[",".join(map(str, sizes))] = train(config, jax.devices())
    muon_runs = [train(MeshConfig(), jax.devices()[:1], muon),
                 train(MeshConfig(2, 2, 2), jax.devices(), muon)]
    mesh = meshes.make_mesh(MeshConfig(2, 4, 1))
    try:
        meshes.local_rows(mesh, 12, "config.joint.batch_size")
    except UserError as error:
        refused = str(error)
    mesh_8 = meshes.make_mesh(MeshConfig(-1, 1, 1))
    weight = {"w": jnp.ones((8, 16))}
    cut = jax.device_put(weight, rules.state_sharding({"params": weight}, mesh_8)["params"])
    used = placement.whole(cut, mesh_8)
    shape = lambda tree: list(tree["w"].addressable_shards[0].data.shape)
    again = "untouched" if placement.whole(used, mesh_8)["w"] is used["w"] else "copied"
    whole = [[shape(cut), shape(used)], again]
    json.dump({"runs": runs, "muon": muon_runs, "whole": whole, "refused": refused}, sys.stdout)
"""


@pytest.fixture(scope="module")
def eight():
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EIGHT_DEVICES)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_losses_do_not_depend_on_the_mesh(eight):
    expected = eight["runs"]["1"]["losses"]
    assert expected[-1] < 0.8 * expected[0]  # something was learnt
    for name, run in eight["runs"].items():
        assert run["losses"] == pytest.approx(expected, rel=1e-5), name


def test_muon_orthogonalises_whole_matrices_whatever_the_mesh(eight):
    one, cut = eight["muon"]
    assert one["losses"][-1] < 0.8 * one["losses"][0]
    assert cut["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert cut["bytes"] < 0.3 * one["bytes"]  # moments in eight parts, the rest in four


def test_what_each_device_holds(eight):
    assert eight["runs"]["2,-1,1"]["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    rows = {name: run["rows"] for name, run in eight["runs"].items()}
    assert rows == {"1": 16, "-1,1,1": 2, "2,-1,1": 2, "2,2,2": 4, "1,2,4": 8}
    held = {name: run["bytes"] for name, run in eight["runs"].items()}
    for mesh, factor in (("2,-1,1", 4), ("2,2,2", 4), ("1,2,4", 8)):
        assert held["1"] / held[mesh] >= 0.9 * factor
    # Replicas have an eighth of the state each, but for vectors and what does not divide.
    assert held["-1,1,1"] / held["1"] == pytest.approx(1 / 8, rel=0.1)
    shapes, again = eight["whole"]
    assert shapes == [[8, 2], [8, 16]]  # as part of a training state, and for use
    assert again == "untouched"
    assert "a batch of 12" in eight["refused"] and "8 devices" in eight["refused"]
    assert "correct config.joint.batch_size or" in eight["refused"]


REAL_UNET = """
    import sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    import jax.numpy as jnp, numpy as np
    from flax import nnx
    from segdiff_jax.config import MeshConfig
    from segdiff_jax.models.presets import PRESETS
    from segdiff_jax.models.unet import UNet
    from segdiff_jax.parallel import mesh as meshes
    from segdiff_jax.parallel import rules

    config = PRESETS["tiny"].unet
    dtype = jnp.dtype(sys.argv[1])
    graph, state = nnx.split(UNet(config, dtype=dtype, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)
    batch = (array(8, 16, 16, config.in_channels), jnp.arange(8) * 100,
             array(8, 7, config.cross_attention_dim), array(8, 16, 16, config.out_channels))

    def loss(state, sample, timesteps, context, target):
        return jnp.mean((nnx.merge(graph, state)(sample, timesteps, context) - target) ** 2)
    def step(state, *batch):
        value, grads = jax.value_and_grad(loss)(rules.gathered(state, mesh), *batch)
        grads = rules.scattered(grads, mesh)
        return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), value

    rules.SMALLEST_SPREAD = 0
    for sizes, count in [((1, 1, 1), 1), ((2, 2, 2), 8), ((8, 1, 1), 8), ((2, 4, 1), 8)]:
        mesh = meshes.make_mesh(MeshConfig(*sizes), jax.devices()[:count])
        placed = rules.state_sharding({"params": state}, mesh)["params"]
        run = jax.jit(step, out_shardings=(placed, meshes.replicated(mesh)))
        current = jax.device_put(state, placed)
        inputs = jax.device_put(batch, meshes.batch_sharding(mesh))
        losses = []
        for _ in range(4):
            current, value = run(current, *inputs)
            losses.append(float(value))
        print(losses)
"""


# In bfloat16 gradients are exchanged in it: eight partial sums, each rounded to 8 bits.
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_the_real_unet_learns_the_same_on_a_mesh_of_all_axes(dtype, tolerance):
    """Small stand-ins do not show it when the partitioner goes wrong; dozens of layers do."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REAL_UNET), dtype], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    alone, *on_meshes = map(json.loads, run.stdout.splitlines())
    assert alone[-1] < alone[0] and len(on_meshes) == 3
    for found in on_meshes:
        assert found == pytest.approx(alone, rel=tolerance)
