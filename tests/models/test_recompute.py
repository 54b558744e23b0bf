"""Layers that make again what they do not keep: the same gradients, from less."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segdiff_jax.models import layers, recompute, unet

CHANNELS, SIZE = 64, 16


def _resnet(dtype):
    kw = {"groups": 8, "epsilon": 1e-5, "time_dim": 32, "dtype": dtype}
    block = layers.ResnetBlock(CHANNELS, CHANNELS, rngs=nnx.Rngs(0), **kw)
    return block, lambda block, x, text: block(x, jnp.ones((2, 32)))


def _transformer(dtype):
    config = unet.UNetConfig(norm_groups=8, cross_attention_dim=24)
    kw = {"zero": False, "dtype": dtype}
    block = unet.SpatialTransformer(config, CHANNELS, 2, rngs=nnx.Rngs(0), **kw)
    return block, lambda block, x, text: block(x, text, None)


def _vjp(make, dtype):
    block, call = make(dtype)
    graph, params = nnx.split(block)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, SIZE, SIZE, CHANNELS)), dtype)
    text = jnp.asarray(rng.normal(size=(2, 7, 24)), dtype)
    y, pull = jax.vjp(lambda params, x: call(nnx.merge(graph, params), x, text), params, x)
    return pull, jnp.asarray(rng.normal(size=y.shape), y.dtype)


def _plainly(function, x, *modules, keep=None):
    return function(x, *modules)


def _wide_transformer(dtype):
    """As a transformer is that is too wide for doing products again."""
    block, call = _transformer(dtype)

    def wide(*inputs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recompute, "NARROW", 0)
            return call(*inputs)

    return block, wide


@pytest.mark.parametrize("make", [_resnet, _transformer, _wide_transformer])
def test_gradients_are_those_of_the_layers_themselves(make, monkeypatch):
    pull, cotangent = _vjp(make, jnp.bfloat16)
    recomputed = jax.tree.leaves(pull(cotangent))
    monkeypatch.setattr(recompute, "from_inputs", _plainly)
    pull, cotangent = _vjp(make, jnp.bfloat16)
    for actual, expected in zip(recomputed, jax.tree.leaves(pull(cotangent)), strict=True):
        assert actual.dtype == expected.dtype
        actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
        assert np.linalg.norm(actual - expected) <= 1e-2 * np.linalg.norm(expected) + 1e-9


def _float32_activations(pull):
    """What the backward pass keeps in float32 of the activations' size."""
    kept = [a for a in jax.tree.leaves(pull) if a.dtype == jnp.float32 and a.size >= 2 * SIZE**2]
    return [a.shape for a in kept if a.shape[0] == 2 and CHANNELS in a.shape]


@pytest.mark.parametrize("make", [_resnet, _transformer, _wide_transformer])
def test_no_float32_activations_are_kept(make, monkeypatch):
    assert not _float32_activations(_vjp(make, jnp.bfloat16)[0])
    # Layers by themselves do keep them: without that the line above would say nothing.
    monkeypatch.setattr(recompute, "from_inputs", _plainly)
    assert _float32_activations(_vjp(make, jnp.bfloat16)[0])


def _kept(make):
    """Sizes of what is kept in bfloat16, in activations [2, SIZE, SIZE, CHANNELS]."""
    kept = jax.tree.leaves(_vjp(make, jnp.bfloat16)[0])
    sizes = [a.size / (2 * SIZE**2 * CHANNELS) for a in kept if a.dtype == jnp.bfloat16]
    return sorted(size for size in sizes if size >= 1)


def test_a_wide_transformer_keeps_what_its_products_need_and_no_norms():
    # In front of every norm, and of the last projection; q, k, v and q; what attention gave, twice;
    # both halves of the GEGLU.
    assert _kept(_wide_transformer) == [1] * (5 + 4 + 2) + [8]


def test_a_narrow_transformer_keeps_one_array_per_sum():
    # In front of every norm, and of the last projection; what attention to itself gave.
    assert _kept(_transformer) == [1] * (5 + 1)


def test_what_is_made_again_waits_for_the_gradient():
    """Else XLA makes it while the input is on the chip, and keeps it."""
    pull, cotangent = _vjp(_resnet, jnp.bfloat16)
    text = str(jax.make_jaxpr(pull)(cotangent))
    barriers = re.findall(r"= optimization_barrier (.*)", text)
    assert len(barriers) == 2 and all(len(names.split()) == 2 for names in barriers)


def test_float32_is_left_alone():
    block, call = _resnet(jnp.float32)
    x = jnp.ones((2, SIZE, SIZE, CHANNELS))
    assert "optimization_barrier" not in str(
        jax.make_jaxpr(jax.grad(lambda x: call(block, x, None).sum()))(x)
    )
