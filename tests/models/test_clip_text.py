"""The CLIP text encoder against transformers, on random weights that transformers wrote."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_oracles import relative_error, run, text_encoder, write

from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.weights import pretrained

# name, width, inner width, layers, heads, activation, positions, epsilon, [B, L]
_CASES: list[tuple] = [
    ("sd1_quick_gelu", 32, 48, 3, 4, "quick_gelu", 77, 1e-5, (2, 77)),
    ("sd2_gelu", 32, 48, 2, 2, "gelu", 77, 1e-5, (3, 77)),
    ("odd_width_short", 21, 30, 1, 3, "quick_gelu", 16, 1e-3, (1, 9)),
    ("as_many_heads_as_channels", 6, 12, 1, 6, "quick_gelu", 77, 1e-5, (2, 5)),
    ("two_tokens", 15, 15, 1, 5, "quick_gelu", 8, 1e-5, (5, 2)),
    ("odd_everything", 35, 49, 2, 7, "gelu", 13, 1e-5, (3, 13)),
]
_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NAMES += ("hidden_act", "max_position_embeddings", "layer_norm_eps")
CASES = {  # name: (options of transformers, [B, L])
    name: (dict(zip(_NAMES, values, strict=True)), size) for name, *values, size in _CASES
}
FLOAT32 = [(name, jnp.float32, 1e-4) for name in CASES]
BFLOAT16 = [(name, jnp.bfloat16, 2e-2) for name in list(CASES)[:3]]


def _ids(size: tuple[int, int]) -> np.ndarray:
    """Start, words, end and padding by the end token, as a tokenizer makes them."""
    ids = np.random.default_rng(0).integers(0, 97, size).astype(np.int32)
    ids[:, 0], ids[:, size[1] // 2 :] = 97, 98
    return ids


@pytest.mark.parametrize(("name", "dtype", "limit"), FLOAT32 + BFLOAT16)
def test_equals_transformers(name, dtype, limit, tmp_path):
    options, size = CASES[name]
    oracle = text_encoder(**options)
    folder = write(tmp_path, text_encoder=oracle)
    ours = pretrained.load(folder, ("text_encoder",), dtype=dtype).text_encoder
    ids = _ids(size)
    with torch.no_grad():
        expected = oracle(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    actual = run(CLIPText.__call__, ours, ids)
    error = relative_error(actual, expected)
    print(f"{name} {dtype.__name__}: {error:.1e}")
    assert actual.dtype == jnp.float32
    assert error <= limit


def test_more_tokens_than_positions_are_refused(tmp_path):
    folder = write(tmp_path, text_encoder=text_encoder(max_position_embeddings=16))
    ours = pretrained.load(folder, ("text_encoder",)).text_encoder
    assert run(CLIPText.__call__, ours, _ids((1, 16))).shape[1] == 16
    with pytest.raises(ValueError, match="17 tokens, but this encoder has 16 positions"):
        ours(_ids((1, 17)))
