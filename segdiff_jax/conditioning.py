"""Class names → CLIP hidden states → the context that the UNet attends to."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segdiff_jax import codec
from segdiff_jax.data.prompts import prompts
from segdiff_jax.data.vocabulary import ClassEntry
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.tokenizer import Tokenizer


class PromptTable(NamedTuple):
    """Text of a vocabulary, encoded once. A pytree."""

    hidden: jax.Array  # [K, L, D] last hidden states, averaged over each class's prompts
    pooled: jax.Array  # [K, D] the hidden state at the end-of-text token, averaged likewise


def encode_prompts(
    text_encoder: CLIPText,
    tokenizer: Tokenizer,
    classes: Iterable[ClassEntry],
    templates: Sequence[str],
    batch_size: int = 64,
) -> PromptTable:
    """Encodes every prompt of every class; synonyms and templates of a class are averaged."""
    sentences, owner = [], []
    for index, entry in enumerate(classes):
        texts = prompts(entry, templates)
        sentences += texts
        owner += [index] * len(texts)
    token_ids = tokenizer(sentences)  # [S, L]
    ends = np.argmax(token_ids == tokenizer.eos_id, axis=1)  # the first: padding may repeat it
    encode = jax.jit(lambda ids: text_encoder(ids))
    hidden = []
    for start in range(0, len(sentences), batch_size):
        rows = token_ids[start : start + batch_size]
        padded = np.pad(rows, ((0, batch_size - len(rows)), (0, 0)), mode="edge")
        hidden.append(np.asarray(encode(padded))[: len(rows)])
    states = np.concatenate(hidden)  # [S, L, D]
    pooled = states[np.arange(len(states)), ends]
    count = np.bincount(owner).astype(np.float32)

    def average(values: np.ndarray) -> jax.Array:
        total = np.zeros((len(count), *values.shape[1:]), np.float32)
        np.add.at(total, owner, values)
        return jnp.asarray(total / count.reshape(-1, *(1,) * (values.ndim - 1)))

    return PromptTable(average(states), average(pooled))


def context(
    table: PromptTable, class_ids: jax.Array, kind: str
) -> tuple[jax.Array, jax.Array | None]:
    """The context of groups of classes: class_ids int [B, G], -1 = empty slot.

    kind "mean": ([B, L, D], None). "bound": ([B, G, D], mask bool [B, G]).
    """
    rows = jnp.maximum(class_ids, 0)
    if kind == "bound":
        return jax.vmap(codec.bound_context)(table.pooled[rows], class_ids)
    if class_ids.shape[1] == 1:  # nothing to average: skip the [B, G, L, D] gather
        return table.hidden[rows[:, 0]], None
    present = (class_ids != codec.PAD).astype(table.hidden.dtype)  # [B, G]
    weights = jax.nn.one_hot(rows, table.hidden.shape[0]) * present[..., None]
    weights = weights.sum(1) / jnp.maximum(1.0, present.sum(1))[:, None]  # [B, K]
    return jnp.einsum("bk,kld->bld", weights, table.hidden), None
