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


def _plainly(function, x, *modules):
    return function(x, *modules)


@pytest.mark.parametrize("make", [_resnet, _transformer])
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


@pytest.mark.parametrize("make", [_resnet, _transformer])
def test_no_float32_activations_are_kept(make, monkeypatch):
    assert not _float32_activations(_vjp(make, jnp.bfloat16)[0])
    # Layers by themselves do keep them: without that the line above would say nothing.
    monkeypatch.setattr(recompute, "from_inputs", _plainly)
    assert _float32_activations(_vjp(make, jnp.bfloat16)[0])


def test_a_transformer_keeps_what_its_products_need_and_no_norms():
    kept = jax.tree.leaves(_vjp(_transformer, jnp.bfloat16)[0])
    sizes = [a.size for a in kept if a.dtype == jnp.bfloat16]
    one = 2 * SIZE**2 * CHANNELS
    # In front of every norm, and of the last projection; q, k, v and q; what attention gave, twice.
    assert sizes.count(one) == 5 + 4 + 2
    assert [size for size in sizes if size > one] == [8 * one]  # both halves of the GEGLU


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
