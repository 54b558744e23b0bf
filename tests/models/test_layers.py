"""Networks that are the same with rounded kernels, or another attention function."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segdiff_jax.models import layers, presets
from segdiff_jax.models.attention import plain
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE, VAEConfig
from segdiff_jax.parallel.attention_kernels import with_attention


def _network(dtype):
    config = presets.PRESETS["tiny"].unet
    graph, params = nnx.split(UNet(config, dtype=dtype, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)  # all of it: a UNet starts with kernels of zeros
    draw = lambda p: jnp.asarray(0.1 * rng.normal(size=p.shape), jnp.float32)  # noqa: E731
    return graph, jax.tree.map(draw, params)


def test_kernels_rounded_once_are_what_layers_round_to():
    graph, params = _network(jnp.bfloat16)
    config = nnx.merge(graph, params).config
    once = layers.kernels_as_multiplied(graph, params)
    rng = np.random.default_rng(1)
    sample = jnp.asarray(rng.normal(size=(2, 8, 8, config.in_channels)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(2, 5, config.cross_attention_dim)), jnp.float32)

    @jax.jit
    def call(params):
        return nnx.merge(graph, params)(sample, jnp.array([3, 400]), text, None)

    found, expected = call(once), call(params)
    assert np.std(expected) > 0.1
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()

    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (once, params)]
    assert sizes[0] < 0.55 * sizes[1]  # all but the time embedding and the two ends
    assert once.conv_in.kernel.dtype == jnp.float32, "this layer multiplies in float32"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_kernels_of_a_float32_network_are_not_copied():
    graph, params = _network(jnp.float32)
    once = layers.kernels_as_multiplied(graph, params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (once, params)), strict=True))


def test_shapes_of_kernels_keep_where_they_are():
    graph, params = _network(jnp.bfloat16)
    chip = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=chip), params)
    found = layers.kernels_as_multiplied(graph, shapes)
    expected = layers.kernels_as_multiplied(graph, params)
    for leaf, like in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (like.shape, like.dtype, chip)


def test_another_attention_function_takes_the_place_of_the_first_one():
    calls = []

    def watched(query, key, value, mask):
        calls.append((query.shape, key.shape, mask is None))
        return plain(query, key, value, mask)

    unet = nnx.merge(*_network(jnp.float32))
    config = unet.config
    inputs = jnp.ones((1, 8, 8, config.in_channels)), jnp.ones(1), jnp.ones((1, 5, 128))
    expected = unet(*inputs)
    other = with_attention(unet, watched)
    np.testing.assert_array_equal(other(*inputs), expected)
    # Positions to themselves, then to the text: 4 × 4 of them, 4 heads of 32, in four layers.
    assert calls == [((1, 16, 4, 32), (1, n, 4, 32), True) for n in (16, 5)] * (len(calls) // 2)
    assert len(calls) == 2 * 4
    unet(*inputs)
    assert len(calls) == 2 * 4, "the network itself was changed"
    built = UNet(config, attention=watched, rngs=nnx.Rngs(0))
    assert nnx.split(built)[0] == nnx.split(other)[0], "the same program, compiled once"


def test_the_vae_attends_once_in_encoder_and_decoder():
    calls = []

    def watched(query, key, value, mask):
        calls.append(query.shape)
        return plain(query, key, value, mask)

    config = VAEConfig(block_out_channels=(4, 8), norm_groups=2)
    vae = VAE(config, attention=watched, rngs=nnx.Rngs(0))
    vae.decode(vae.encode(jnp.ones((1, 8, 8, 3)))[0])
    assert calls == [(1, 16, 1, 8)] * 2
