"""The CLIP text transformer (arXiv 2103.00020), as far as Stable Diffusion uses it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from segdiff_jax.fields import choice, number
from segdiff_jax.models.attention import AttentionFn, plain
from segdiff_jax.models.layers import Dtype
from segdiff_jax.shapes import Context, Tokens

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class CLIPTextConfig:
    """The fields of transformers' `text_encoder/config.json` that change the network."""

    vocab_size: int = number(49408, 1, 10_000_000)  # tokens
    hidden_size: int = number(1024, 1, 65536)  # channels, a multiple of the heads
    intermediate_size: int = number(4096, 1, 1_000_000)  # channels within a feed-forward
    num_hidden_layers: int = number(23, 1, 1000)  # blocks
    num_attention_heads: int = number(16, 1, 65536)  # a divisor of hidden_size
    max_position_embeddings: int = number(77, 1, 65536)  # tokens of the longest text
    hidden_act: str = choice("gelu", tuple(ACTIVATIONS))  # gelu: ViT-H, SD2; quick_gelu: ViT-L, SD1
    layer_norm_eps: float = number(1e-5, 1e-12, 1.0)  # added to the variance


class EncoderLayer(nnx.Module):
    """Self-attention, then a feed-forward network, each with a norm and a residual."""

    def __init__(self, config: CLIPTextConfig, *, attention: AttentionFn, **kw: Any):
        width = config.hidden_size
        norm = lambda: nnx.LayerNorm(width, epsilon=config.layer_norm_eps, **kw)  # noqa: E731
        self.layer_norm1, self.layer_norm2 = norm(), norm()
        self.q_proj = nnx.Linear(width, width, **kw)
        self.k_proj = nnx.Linear(width, width, **kw)
        self.v_proj = nnx.Linear(width, width, **kw)
        # A new encoder stays random and frozen. With this scale the tokens after a word carry as
        # much of it as the word itself; by default they would stay near copies of the padding.
        mixing = nnx.initializers.variance_scaling(16.0, "fan_in", "normal")
        self.out_proj = nnx.Linear(width, width, kernel_init=mixing, **kw)
        self.fc1 = nnx.Linear(width, config.intermediate_size, **kw)
        self.fc2 = nnx.Linear(config.intermediate_size, width, **kw)
        self.heads, self.activation = config.num_attention_heads, config.hidden_act
        self.attention = attention

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:  # [B, L, D] -> [B, L, D]
        h = self.layer_norm1(x)
        projected = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        query, key, value = (y.reshape(*y.shape[:2], self.heads, -1) for y in projected)
        x = x + self.out_proj(self.attention(query, key, value, mask).reshape(x.shape))
        h = ACTIVATIONS[self.activation](self.fc1(self.layer_norm2(x)))
        return x + self.fc2(h)


class CLIPText(nnx.Module):
    """Causal transformer over token ids; returns the last hidden state after the final norm."""

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        attention: AttentionFn = plain,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width = config.hidden_size
        kw: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        # Without pre-trained weights, unit-variance tokens keep the words apart; with CLIP's own
        # 0.02 the positions would dominate.
        tokens, positions = nnx.initializers.normal(1.0), nnx.initializers.normal(0.3)
        self.config = config
        self.token_embedding = nnx.Embed(config.vocab_size, width, embedding_init=tokens, **kw)
        self.position_embedding = nnx.Embed(
            config.max_position_embeddings, width, embedding_init=positions, **kw
        )
        self.layers = nnx.List(
            EncoderLayer(config, attention=attention, **kw) for _ in range(config.num_hidden_layers)
        )
        self.final_layer_norm = nnx.LayerNorm(width, epsilon=config.layer_norm_eps, **kw)

    def __call__(self, token_ids: Tokens) -> Context:
        """token_ids [B, L] → float32 [B, L, D].

        Raises `ValueError` for more tokens than positions: JAX would not say so by itself.
        """
        length = token_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens, but this encoder has "
                f"{self.config.max_position_embeddings} positions: truncate the prompts"
            )
        x = self.token_embedding(token_ids) + self.position_embedding(jnp.arange(length))
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        for layer in self.layers:
            x = layer(x, causal)
        return self.final_layer_norm(x).astype(jnp.float32)
