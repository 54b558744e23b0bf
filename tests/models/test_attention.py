"""Plain attention against its definition in float64, and against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segdiff_jax.models.attention import plain


def _inputs(length, others, heads=3, batch=2, width=8):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(batch, n, heads, width)) for n in (length, others, others)]


def _exact(query, key, value, mask):
    logits = np.einsum("bsnd,blnd->bnsl", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits) * mask
    return np.einsum("bnsl,blnd->bsnd", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize(("kind", "others"), [("no", 7), ("no", 9), ("keys", 7), ("causal", 7)])
def test_plain_attention_is_what_its_definition_says(kind, others):
    query, key, value = _inputs(7, others)
    used = np.arange(7) < np.array([3, 6])[:, None]  # [B, L]
    causal = np.tril(np.ones((7, 7), bool))
    mask = {"no": None, "keys": used[:, None, None], "causal": causal[None, None]}[kind]
    exact = _exact(query, key, value, 1.0 if mask is None else mask)
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    found = plain(*arrays, None if mask is None else jnp.asarray(mask))
    np.testing.assert_allclose(found, exact, atol=1e-6)
    theirs = jax.nn.dot_product_attention(*arrays, mask=mask)
    np.testing.assert_allclose(found, theirs, atol=1e-6)
