"""Class names → CLIP hidden states → the context that the UNet attends to."""

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segdiff_jax import codec
from segdiff_jax.errors import UserError
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.text.prompts import PLACEHOLDER, asked, prompts
from segdiff_jax.text.tokenizer import Tokenizer
from segdiff_jax.text.vocabulary import ClassEntry, visible

log = logging.getLogger(__name__)


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
    """Encodes every prompt of every class; synonyms and templates of a class are averaged.

    Raises `UserError` as `prompt_ids` does, and for a text encoder whose weights are not finite.
    """
    found = encode_on_host(text_encoder, tokenizer, classes, templates, batch_size)
    return jax.tree.map(jnp.asarray, found)


def encode_on_host(
    text_encoder: CLIPText,
    tokenizer: Tokenizer,
    classes: Iterable[ClassEntry],
    templates: Sequence[str],
    batch_size: int = 64,
) -> PromptTable:
    """`encode_prompts` as numpy arrays, which compiles nothing for a new number of classes."""
    token_ids, owner = prompt_ids(tokenizer, tuple(classes), templates)  # [S, L], [S]
    ends = np.argmax(token_ids == tokenizer.eos_id, axis=1)  # the first: padding may repeat it
    graph, params = nnx.split(text_encoder)
    hidden = []
    for start in range(0, len(token_ids), batch_size):
        rows = token_ids[start : start + batch_size]
        padded = np.pad(rows, ((0, batch_size - len(rows)), (0, 0)), mode="edge")
        hidden.append(np.asarray(_encode(graph, params, padded))[: len(rows)])
    states = np.concatenate(hidden)  # [S, L, D]
    if not np.isfinite(states).all():
        raise UserError(
            "the text encoder gives numbers that are not finite: its weights are damaged, "
            "restore the folder they come from"
        )
    pooled = states[np.arange(len(states)), ends]
    count = np.bincount(owner).astype(np.float32)

    def average(values: np.ndarray) -> Any:
        total = np.zeros((len(count), *values.shape[1:]), np.float32)
        np.add.at(total, owner, values)
        return total / count.reshape(-1, *(1,) * (values.ndim - 1))

    return PromptTable(average(states), average(pooled))


@functools.partial(jax.jit, static_argnums=0)
def _encode(graph: nnx.GraphDef, params: Any, token_ids: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(token_ids)


def prompt_ids(
    tokenizer: Tokenizer, classes: Sequence[ClassEntry], templates: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [S, L] of every prompt of every class, and the class [S] that each belongs to.

    What a prompt loses, because the text encoder reads no more than L tokens, is told in one
    warning. Raises `UserError` where nothing of a class name is left, and for two classes whose
    prompts are the same to the text encoder: the second would never get a pixel.
    """
    sentences: list[str] = []
    owner: list[int] = []
    cut: dict[int, str] = {}  # class -> the first of its prompts that loses something
    lost: list[tuple[str, str]] = []  # (prompt, its lost end)
    for index, entry in enumerate(classes):
        texts = prompts(entry, templates)
        for text, (name, template) in zip(texts, asked(entry, templates), strict=True):
            kept = tokenizer.kept(text)
            if kept < len(text):
                _check_left(kept, name, template, tokenizer.model_max_length)
                lost.append((text, text[kept:]))
                cut.setdefault(index, text[kept:])
        sentences += texts
        owner += [index] * len(texts)
    token_ids, owners = tokenizer(sentences), np.asarray(owner)
    _check_distinct(token_ids, owners, classes, cut, tokenizer.model_max_length)
    if lost and jax.process_index() == 0:
        text, end = max(lost, key=lambda pair: len(pair[1]))
        log.warning(
            "%d of %d prompts are longer than the %d tokens that the text encoder reads and lose "
            "their end, such as '%s' of '%s': shorten the class names or config.prompts.templates",
            *(len(lost), len(sentences), tokenizer.model_max_length),
            *(visible(end), visible(text)),
        )
    return token_ids, owners


def _check_left(kept: int, name: str, template: str, length: int) -> None:
    """Raises `UserError` if the first `kept` characters of a prompt hold nothing of the name."""
    before = template[: template.index(PLACEHOLDER)].rstrip()
    if kept <= len(before):
        raise UserError(
            f"config.prompts.templates: {visible(template)!r} leaves no room for the class name "
            f"{visible(name)!r}: the text encoder reads {length} tokens: shorten the template"
        )


def _check_distinct(
    token_ids: np.ndarray,
    owner: np.ndarray,
    classes: Sequence[ClassEntry],
    cut: Mapping[int, str],
    length: int,
) -> None:
    """Raises `UserError` for two classes whose averages are over the same prompts."""
    seen: dict[Any, int] = {}
    for index, entry in enumerate(classes):
        rows = [row.tobytes() for row in token_ids[owner == index]]
        key = frozenset((row, n / len(rows)) for row, n in Counter(rows).items())
        if key not in seen:
            seen[key] = index
            continue
        first = classes[seen[key]]
        names = f"the classes {visible(first.name)!r} and {visible(entry.name)!r}"
        if index in cut:
            raise UserError(
                f"{names} are the same to the text encoder, which reads {length} tokens and "
                f"loses '{visible(cut[index])}' of the second: shorten the names or "
                "config.prompts.templates"
            )
        raise UserError(f"{names} are the same to the text encoder: keep one of them")


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


def contexts_of(
    table: PromptTable, class_ids: np.ndarray, kind: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """`context` in numpy, on the host: nothing is compiled for a new number of classes."""
    rows, present = np.maximum(class_ids, 0), class_ids != codec.PAD  # [B, G]
    hidden, pooled = np.asarray(table.hidden), np.asarray(table.pooled)
    if kind == "bound":
        tokens = pooled[rows] + codec.level_code_of(class_ids.shape[1], pooled.shape[1])
        return np.where(present[..., None], tokens, np.float32(0)), present
    if class_ids.shape[1] == 1:
        return hidden[rows[:, 0]], None
    weights = np.zeros((len(rows), len(hidden)), np.float32)
    np.add.at(weights, (np.arange(len(rows))[:, None], rows), present)
    weights /= np.maximum(1, present.sum(1, keepdims=True))
    return np.tensordot(weights, hidden, axes=1), None
