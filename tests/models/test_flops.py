"""The analytic count against the products that JAX traces, and those against counts by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from segdiff_jax.config import SamplerConfig
from segdiff_jax.models import flops, linear_decoder, presets
from segdiff_jax.models.joint_decoder import JointDecoder
from segdiff_jax.models.linear_decoder import LinearDecoder
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE
from segdiff_jax.parallel.attention_kernels import splash
from segdiff_jax.weights.tensors import shapes_of


def traced(function, *arguments):
    return flops.traced(jax.jit(function).trace(*arguments).jaxpr)


def floats(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(scope="module", params=["tiny", pytest.param("sd2", marks=pytest.mark.slow)])
def architecture(request):
    return presets.architecture(request.param)


def test_unet_forward_and_training(architecture):
    config = architecture.unet
    graph, params = nnx.split(shapes_of(functools.partial(UNet, config)))
    run = lambda p, x, t, c: nnx.merge(graph, p)(x, t, c)  # noqa: E731
    context = floats(1, 7, config.cross_attention_dim)
    inputs = floats(1, 16, 24, config.in_channels), floats(1, dtype=jnp.int32), context
    count = flops.unet(config, 16, 24, 7)
    assert count.forward == pytest.approx(traced(run, params, *inputs).run, rel=1e-12)
    # A transposed strided convolution is traced with holes in its input, which the count leaves
    # out: so the trace may be above it, by what the few down-sampling layers add.
    gradient = jax.grad(lambda p, *rest: run(p, *rest).sum())
    assert count.train <= traced(gradient, params, *inputs).run <= 1.04 * count.train


def test_vae(architecture):
    config = architecture.vae
    graph, params = nnx.split(shapes_of(functools.partial(VAE, config)))
    encode = lambda p, x: nnx.merge(graph, p).encode(x)  # noqa: E731
    decode = lambda p, x: nnx.merge(graph, p).decode(x)  # noqa: E731
    image, latent = floats(1, 32, 48, 3), floats(1, 4, 6, config.latent_channels)
    assert flops.vae_encode(config, 32, 48) == traced(encode, params, image).run
    assert flops.vae_decode(config, 32, 48) == traced(decode, params, latent).run


def test_the_linear_decoder():
    linear = LinearDecoder(floats(3, 3, 4, 64), floats(64))
    count = flops.linear_decode(4, 8, 16, 24)
    assert count == traced(linear_decoder.decode, linear, floats(1, 2, 3, 4)).run


@pytest.mark.parametrize(
    ("sampler", "calls", "decoded", "ranked"),
    [
        (SamplerConfig(steps=10, ensemble=3), 150 * 30, 450, 0),
        (SamplerConfig(steps=10, ensemble=3, shortlist=20), 20 * 30 + 150, 60, 150),
        (SamplerConfig(steps=1, ensemble=1, shortlist=150), 150, 150, 0),
    ],
)
def test_the_maps_of_an_image(sampler, calls, decoded, ranked):
    found = flops.maps(1e6, 150, sampler, decode=1e3, rank=1.0)
    assert found == calls * 1e6 + decoded * 1e3 + ranked
    assert flops.unet_calls(150, sampler) == calls


def test_the_joint_decoder():
    size, classes = (64, 96), 5
    decoder = shapes_of(functools.partial(JointDecoder, 7))
    graph, params = nnx.split(decoder)
    see = lambda params, pixels: nnx.merge(graph, params).features(pixels)  # noqa: E731
    seen = traced(see, params, floats(1, *size, 3)).run
    found = flops.sharpening(classes, *size)
    assert found == pytest.approx(seen + 2 * classes * 64 * 96 * 64)  # a product for each pixel


def test_products_and_convolutions_by_hand_and_by_xla():
    product = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)  # noqa: E731
    assert traced(product, floats(2, 3, 4), floats(2, 4, 5)).run == 2 * (2 * 3 * 5) * 4
    layout = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: jax.lax.conv_general_dilated(  # noqa: E731
        x, w, (2, 2), "VALID", dimension_numbers=layout
    )
    given = floats(3, 9, 9, 4), floats(3, 3, 4, 6)
    assert traced(conv, *given).run == 2 * (3 * 4 * 4 * 6) * (3 * 3 * 4)
    program = jax.jit(conv).lower(*given).compile()
    assert traced(conv, *given).run == program.cost_analysis()["flops"]


def test_a_loop_runs_its_body_and_xla_counts_it_once():
    def loop(x, w):
        step = lambda x, _: (x @ w, None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=5)[0] @ w

    found = traced(loop, floats(4, 8), floats(8, 8))
    one = 2 * 4 * 8 * 8
    assert found == (6 * one, 2 * one, 0)


def test_the_part_of_one_device_counts_for_each():
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    wide = mesh.abstract_mesh.update(axis_sizes=(4, 2))
    product = jax.shard_map(jnp.matmul, mesh=wide, in_specs=(P("data"), P()), out_specs=P("data"))
    assert traced(product, floats(8, 3), floats(3, 5)).run == 2 * (2 * 5) * 3 * 8


def test_attention_kernels_are_counted_apart():
    q = k = floats(2, 512, 2, 64, dtype=jnp.bfloat16)  # [B, S, N, D]
    attend = lambda q, k, v: splash(q, k, v)  # noqa: E731
    product = 2 * 2 * 2 * 512 * 512 * 64
    assert traced(attend, q, k, k) == (0, 0, 2 * product)
    gradient = jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))
    assert traced(gradient, q, k, k).kernels == pytest.approx((2 + 5) * product)
