"""Linear layers in bfloat16, whose gradients are written out: against the same in float64.

And kernels that are rounded once, for sampling.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segdiff_jax.models import layers, presets
from segdiff_jax.models.unet import UNet


@pytest.mark.parametrize("shape", [(3, 24), (3, 10, 24), (3, 4, 5, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_bfloat16_linear_layer(shape, bias):
    rng = np.random.default_rng(0)
    layer = layers.linear(24, 16, bias=bias, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    x = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    call = lambda params, x: nnx.merge(graph, params).unrounded(x)  # noqa: E731
    y, pull = jax.vjp(call, params, x)
    cotangent = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    found, to_x = pull(cotangent)

    rows, sent = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, cotangent))
    kernel = np.asarray(params.kernel[...].astype(jnp.bfloat16), np.float64)
    assert y.dtype == jnp.float32 and to_x.dtype == jnp.bfloat16
    _close(y.reshape(-1, 16), rows @ kernel + (params.bias[...] if bias else 0))
    _close(to_x.reshape(-1, 24), sent @ kernel.T)
    _close(found.kernel[...], rows.T @ sent)
    if bias:
        _close(found.bias[...], sent.sum(0))


def _close(actual, expected, tolerance=1e-2):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    assert np.linalg.norm(actual - expected) < tolerance * np.linalg.norm(expected)


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
    assert sizes[0] < 0.52 * sizes[1]
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
