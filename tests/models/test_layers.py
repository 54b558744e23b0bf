"""Linear layers in bfloat16, whose gradients are written out: against the same in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segdiff_jax.models import layers


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
