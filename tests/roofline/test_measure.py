import dataclasses
import math

import jax
import pytest
import small_config
from flax import nnx

from segdiff_jax.config import MeshConfig
from segdiff_jax.errors import UserError
from segdiff_jax.roofline import chips, compile, flops, measure, report, steps
from segdiff_jax.training import sharding


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 31, 100])
@pytest.mark.parametrize("start", [1, 4, 8])
def test_search_finds_the_largest_that_fits(limit, start):
    tried = []

    def total(size):
        assert size not in tried
        tried.append(size)
        return 1000 + 300.0 * size if size <= limit else None

    assert measure.largest_that_fits(total, start, 1000 + 300.0 * (limit + 0.5)) == limit
    assert len(tried) <= 9


def test_search_is_right_even_where_memory_jumps():
    total = lambda n: (10.0 if n < 5 else 500.0) if n <= 6 else None  # noqa: E731
    assert measure.largest_that_fits(total, 1, 1000.0) == 6


@pytest.mark.parametrize(
    ("text", "name"), [("v5e:4x4", "v5e:4x4"), ("v5p:2x2", "v5p:2x2x1"), ("v4:2x2x2", "v4:2x2x2")]
)
def test_topologies(text, name):
    assert chips.parse_topology(text) == (chips.CHIPS[text.split(":")[0]], name)


@pytest.mark.parametrize("text", ["v9:2x2", "v5e", "v5e:4", "v5e:2x2x2", "v5e:axb", "v5e:0x4"])
def test_topologies_that_are_none(text):
    with pytest.raises(UserError, match="such as"):
        chips.parse_topology(text)


@pytest.mark.parametrize(
    ("topology", "links"),
    [
        ("v5e:1x1", 4),  # nothing is exchanged
        ("v5e:2x2", 2),
        ("v5e:4x4", 2),
        ("v5e:8x16", 3),
        ("v6e:16x16", 4),
        ("v5p:2x2x1", 2),
        ("v5p:2x2x4", 3),
        ("v4:4x4x4", 6),
    ],
)
def test_links_that_a_slice_of_that_shape_has(topology, links):
    chip = chips.CHIPS[topology.split(":")[0]]
    share = chips.in_slice(chip, topology).ici_bandwidth / chip.ici_bandwidth
    assert share == pytest.approx(links / (2 * chip.dimensions))


def test_roofline_is_the_slowest_of_the_three():
    chip = chips.CHIPS["v5e"]
    figures = {
        "flops": {"total": 0.5 * chip.flops, "model": 0.4 * chip.flops},
        "bytes_accessed": 2.0 * chip.hbm_bandwidth,
        "hbm_traffic": 1.2 * chip.hbm_bandwidth,
        "collectives": [
            {"network": "ici", "moved": chip.ici_bandwidth},
            {"network": "dcn", "moved": 0.5 * chip.dcn_bandwidth},
        ],
    }
    line = report.roofline(figures, chip, 8.0)
    assert (line["compute_seconds"], line["memory_seconds"]) == pytest.approx((0.5, 2.0))
    assert line["network_seconds"] == pytest.approx(1.5)
    assert line["bound"] == "memory"
    assert (line["hbm_seconds"], line["least_seconds"]) == pytest.approx((1.2, 1.5))
    assert line["mfu"] == pytest.approx(0.2)
    assert line["images_per_second"] == pytest.approx(4.0)


def test_bodies_of_loops_are_counted_as_often_as_they_run():
    text = "ENTRY %main (a: f32[1]) -> f32[1] {\n}\n"
    made = compile.Compiled(1, 1, 0, 1, 0, 110.0, 1100.0, text, 1.0)
    decoded = made._replace(flops=10.0, bytes_accessed=100.0)  # and 100 and 1,000 are a step's
    loops = 5, 3, decoded
    figures = report.per_chip(made, chips=4, slices=1, model_flops=0.0, loops=loops)
    assert figures["flops"]["total"] == 5 * 100 + 3 * 10
    assert figures["bytes_accessed"] == 5 * 1000 + 3 * 100


def test_the_sampler_needs_no_network_and_knows_no_classes_or_images():
    config = small_config.get_config()
    config.sampler = dataclasses.replace(config.sampler, steps=2, ensemble=3)
    target = measure.Target("v5e:2x2", step="sample", classes=4)
    made = measure.measure(config, target)
    assert made["fits"] and made["batch_per_chip"] == 3  # 4 passes of 3 members on 4 chips
    figures = made["per_chip"]
    assert figures["collectives"] == []
    assert figures["flops"]["total"] > figures["flops"]["model"]
    # Of classes and images it gets what is gathered for each of the 12: their number is no shape.
    _, _, mesh = measure._mesh(config, target)
    *_, contexts, mask, latents, members, _ = steps.sample_step(config, mesh, 1, 4).arguments
    assert mask is None and members.shape == (12,)
    assert contexts.shape[0] == latents.shape[0] == 12


def test_the_decoder_counted_apart_is_a_part_of_the_sampler():
    # Left to the partitioner it was another program, which accessed more than the whole sampler.
    config = small_config.get_config()
    config.data = dataclasses.replace(config.data, image_size=(64, 64))
    sampler = measure._make(config, measure.Target("v5e:2x2", step="evaluate"))
    assert sampler.loops is not None
    whole, part = map(compile.compile_step, (sampler, sampler.loops.body))
    assert 0 < part.bytes_accessed < whole.bytes_accessed
    assert 0 < part.flops < whole.flops
    inside = sampler.loops.body.function.trace(*sampler.loops.body.arguments).jaxpr
    assert [equation.primitive.name for equation in inside.eqns] == ["shard_map"]


def test_tensor_peers_do_not_encode_the_same_images():
    config = small_config.get_config()
    config.data = dataclasses.replace(config.data, cache_latents=False, image_size=(64, 64))
    config.train.batch_size = 4
    made = {}
    for tensor in (1, 2):
        config.mesh = MeshConfig(data=1, fsdp=-1, tensor=tensor)
        made[tensor] = measure.measure(config, measure.Target("v5e:2x2"))["per_chip"]
    encoded = 2 * flops.vae_encode(steps.networks(config).vae.config, 64, 64)  # a photo, a mask
    more = made[2]["flops"]["total"] - made[1]["flops"]["total"]
    print(more / encoded, made[2]["collectives"])
    assert more < 0.3 * encoded, "half of what is not cut by channel, in the UNet alone"


def test_gradients_are_scattered_where_16_chips_have_two_axes(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPREAD", 2**10)
    config = small_config.get_config()
    config.train.batch_size, config.mesh = 16, MeshConfig(data=4, fsdp=4)
    made = measure.measure(config, measure.Target("v5e:4x4"))
    kinds = {exchange["kind"]: exchange["count"] for exchange in made["per_chip"]["collectives"]}
    assert kinds.get("reduce-scatter", 0) >= 10, "none: sums were whole on every chip"


def test_training_from_pixels_moves_weights_between_chips_and_no_activations():
    # Photos and masks were encoded as [all photos; all masks], whose rows moved; from there on XLA
    # cut activations by channel and exchanged whole batches of them in every layer.
    config = small_config.get_config()
    config.data = dataclasses.replace(config.data, cache_latents=False, image_size=(32, 32))
    config.model = dataclasses.replace(config.model, remat=True)
    config.mesh = dataclasses.replace(config.mesh, data=1, fsdp=-1)
    target = measure.Target("v5e:2x2")
    loops = measure._make(config, target).loops
    assert loops is not None and loops.times == 4  # two photos and two masks a chip, in a loop
    made = measure.measure(config, target)
    encoders = 16 * flops.vae_encode(steps.networks(config).vae.config, 32, 32)
    assert loops.body.model_flops == encoders / loops.times
    assert made["per_chip"]["flops"]["total"] > made["per_chip"]["flops"]["model"]
    exchanges = made["per_chip"]["collectives"]
    print(exchanges)
    weights = sum(
        2 * math.prod(leaf.shape)  # in bfloat16
        for leaf in jax.tree.leaves(nnx.state(steps.networks(config).unet))
    )
    # Gathered forward, again, and for the gradient, which is scattered: XLA may add some.
    assert sum(exchange["payload"] for exchange in exchanges) < 6 * weights


def test_a_whole_run_costs_its_steps_on_all_chips():
    line = {"least_seconds": 0.36, "step_seconds": 0.72}
    run = report.whole_run(line, chips.CHIPS["v5e"], chips=16, steps=10_000)
    assert run["hours"] == pytest.approx([1.0, 2.0])
    assert run["dollars"] == pytest.approx([1.2 * 16, 2 * 1.2 * 16])
