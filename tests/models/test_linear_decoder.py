"""The linear decoder against its definition, and on latents that are linear in the mask or not."""

import jax.numpy as jnp
import numpy as np
import pytest

from segdiff_jax.models.linear_decoder import LinearDecoder, decode, fit

C, F = 5, 4


def _decoder(rng):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return LinearDecoder(draw(3, 3, C, F * F), draw(F * F))


def _by_hand(decoder, latents):
    kernel, bias = np.asarray(decoder.kernel, np.float64), np.asarray(decoder.bias, np.float64)
    batch, height, width, _ = latents.shape
    found = np.zeros((batch, height * F, width * F))
    for b, row, column in np.ndindex(batch, height, width):
        rows = np.clip(np.arange(row - 1, row + 2), 0, height - 1)
        columns = np.clip(np.arange(column - 1, column + 2), 0, width - 1)
        block = np.einsum("ijc,ijcp->p", latents[b][np.ix_(rows, columns)], kernel) + bias
        where = np.s_[b, row * F : (row + 1) * F, column * F : (column + 1) * F]
        found[where] = block.reshape(F, F)
    return found


def test_a_block_of_pixels_is_linear_in_the_latents_around_it():
    rng = np.random.default_rng(0)
    decoder, latents = _decoder(rng), rng.normal(size=(2, 3, 5, C))
    np.testing.assert_allclose(decode(decoder, latents), _by_hand(decoder, latents), atol=1e-4)


@pytest.mark.parametrize("sizes", [[8], [3, 5], [1] * 8])
def test_what_is_linear_is_found_whatever_the_batches(sizes):
    rng = np.random.default_rng(1)
    true, latents = _decoder(rng), rng.normal(size=(8, 9, 7, C)).astype(np.float32)
    masks = np.asarray(decode(true, latents))
    ends = np.cumsum(sizes)
    batches = ((latents[e - s : e], masks[e - s : e]) for s, e in zip(sizes, ends, strict=True))
    found = fit(batches, ridge=1e-7)
    for actual, expected in zip(found, true, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-3)


def test_fitting_minimises_the_squared_error_with_its_ridge():
    rng = np.random.default_rng(2)
    latents, masks = rng.normal(size=(4, 6, 6, C)), rng.normal(size=(4, 6 * F, 6 * F)).clip(-1, 1)
    ridge = 0.1
    best = fit([(jnp.asarray(latents), jnp.asarray(masks))], ridge)

    def cost(decoder):
        error = np.asarray(decode(decoder, latents), np.float64) - masks
        shrunk = np.square(np.asarray(decoder.kernel, np.float64)).sum()
        return np.square(error).sum() / (4 * 6 * 6) + ridge * shrunk

    for part in LinearDecoder._fields:
        for seed in range(5):
            change = np.random.default_rng(seed).normal(size=getattr(best, part).shape)
            other = best._replace(**{part: getattr(best, part) + 0.03 * change})
            assert cost(other) > cost(best), part


def test_redundant_latents_do_not_make_it_explode():
    flat = jnp.full((3, 4, 4, C), 0.7)  # the latents of three equal masks
    found = fit([(flat, jnp.full((3, 16, 16), -1.0))])
    np.testing.assert_allclose(decode(found, flat), -1.0, atol=1e-3)
    assert float(jnp.abs(found.kernel).max()) < 10.0


def test_no_masks_are_refused():
    with pytest.raises(ValueError, match="no masks"):
        fit([])
