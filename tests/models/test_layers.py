"""Networks that are the same with rounded kernels, or another attention function."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from torch_oracles import run

from segdiff_jax.models import layers
from segdiff_jax.models.attention import plain
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.parallel.attention_kernels import with_attention

CONFIG = UNetConfig(8, 4, (64,), (True,), 1, 1, (2,), 12, True, 8)


def _network(dtype):
    shapes = nnx.eval_shape(lambda: UNet(CONFIG, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(shapes)
    rng = np.random.default_rng(0)  # all of it: a UNet starts with kernels of zeros
    draw = lambda p: jnp.asarray(0.1 * rng.normal(size=p.shape), jnp.float32)  # noqa: E731
    return graph, jax.tree.map(draw, params)


def test_kernels_rounded_once_are_what_layers_round_to():
    graph, params = _network(jnp.bfloat16)
    once = layers.kernels_as_multiplied(graph, params)
    rng = np.random.default_rng(1)
    sample = jnp.asarray(rng.normal(size=(2, 8, 8, CONFIG.in_channels)), jnp.float32)
    text = jnp.asarray(rng.normal(size=(2, 5, CONFIG.cross_attention_dim)), jnp.float32)

    @jax.jit
    def call(params):
        return nnx.merge(graph, params)(sample, jnp.array([3, 400]), text, None)

    found, expected = call(once), call(params)
    assert np.std(expected) > 0.1
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()

    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (once, params)]
    assert sizes[0] < 0.65 * sizes[1]  # what takes time and the two ends stay in float32
    assert once.conv_in.kernel.dtype == jnp.float32, "this layer multiplies in float32"
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_another_attention_function_takes_the_place_of_the_first_one():
    calls = []

    def watched(query, key, value, mask):
        calls.append((query.shape, key.shape, mask is None))
        return plain(query, key, value, mask)

    unet = nnx.merge(*_network(jnp.float32))
    inputs = jnp.ones((1, 4, 4, CONFIG.in_channels)), jnp.ones(1), jnp.ones((1, 5, 12))
    expected = run(UNet.__call__, unet, *inputs)
    other = with_attention(unet, watched)
    np.testing.assert_array_equal(run(UNet.__call__, other, *inputs), expected)
    # Positions to themselves, then to the text: 4 × 4 of them, 2 heads of 32, in four layers.
    assert calls == [((1, 16, 2, 32), (1, n, 2, 32), True) for n in (16, 5)] * 4
    jax.eval_shape(unet, *inputs)
    assert len(calls) == 2 * 4, "the network itself was changed"
    built = nnx.eval_shape(lambda: UNet(CONFIG, attention=watched, rngs=nnx.Rngs(0)))
    assert nnx.split(built)[0] == nnx.split(other)[0], "the same program, compiled once"
