"""The joint decoder against torch's convolutions, and what a new one leaves as it is."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from segdiff_jax.models import joint_decoder
from segdiff_jax.models.joint_decoder import BLOCK, DILATIONS, Head, JointDecoder

B, C, H, W, D = 2, 3, 12, 20, 5


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_new_one_leaves_the_order_of_the_classes():
    decoder = JointDecoder(D, rngs=nnx.Rngs(0))
    maps = drawn(0, B, C, H, W)
    logits = decoder.logits(jnp.tanh(drawn(1, B, H, W, 3)), drawn(2, B, C, D), maps)
    np.testing.assert_allclose(logits, joint_decoder.LOGITS_PER_GRAY * maps, rtol=1e-6)
    sharp = joint_decoder.to_maps(logits)
    np.testing.assert_array_equal(sharp.argmax(1), maps.argmax(1))
    np.testing.assert_allclose((sharp + 1) / 2, 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_what_it_sees_is_what_torch_sees():
    decoder, pixels = JointDecoder(D, rngs=nnx.Rngs(1)), np.tanh(drawn(3, B, H, W, 3))
    to_torch = lambda layer: torch.tensor(np.asarray(layer.kernel[...])).permute(3, 2, 0, 1)  # noqa: E731
    blocks = pixels.reshape(B, H // BLOCK, BLOCK, W // BLOCK, BLOCK, 3).transpose(0, 2, 4, 5, 1, 3)
    x = torch.tensor(blocks.reshape(B, -1, H // BLOCK, W // BLOCK))
    x = torch.nn.functional.conv2d(x, to_torch(decoder.conv_in))  # biases start at 0
    for layer, dilation in zip(decoder.convs, DILATIONS, strict=True):
        normed = torch.nn.functional.group_norm(x, 8)
        kernel = to_torch(layer)
        seen = torch.nn.functional.conv2d(normed, kernel, padding=dilation, dilation=dilation)
        x = x + seen.relu()
    found = decoder.features(jnp.asarray(pixels))
    np.testing.assert_allclose(found, x.permute(0, 2, 3, 1), atol=1e-4)


def test_each_pixel_of_a_block_has_a_query_of_its_own():
    channels = joint_decoder.WIDTH
    head = Head(drawn(4, D, BLOCK**2 * channels), drawn(5, BLOCK**2 * channels), np.float32(2.0))
    features, text = drawn(6, B, H // BLOCK, W // BLOCK, channels), drawn(7, B, C, D)
    maps = drawn(8, B, C, H, W)
    queries = torch.tensor(text @ head.kernel + head.bias).reshape(B, C * BLOCK**2, channels)
    blocks = torch.einsum("bqc,bhwc->bqhw", queries, torch.tensor(features))
    expected = 2.0 * maps + torch.nn.functional.pixel_shuffle(blocks, BLOCK).numpy()
    found = joint_decoder.logits(head, features, text, maps)
    assert isinstance(found, np.ndarray)  # nothing was compiled
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    traced = joint_decoder.logits(head, jnp.asarray(features), text, maps)
    np.testing.assert_allclose(traced, found, rtol=1e-4, atol=1e-3)
