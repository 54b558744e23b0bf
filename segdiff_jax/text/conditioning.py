"""Class names → CLIP hidden states → the context that the UNet attends to."""

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segdiff_jax import codec
from segdiff_jax.combinations import PLACEHOLDER
from segdiff_jax.errors import UserError
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.text.prompts import expanded
from segdiff_jax.text.tokenizer import Tokenizer
from segdiff_jax.text.vocabulary import ClassEntry, visible

log = logging.getLogger(__name__)

_PROMPTS = 64  # in one call of the text encoder


class PromptTable(NamedTuple):
    """Text of a vocabulary, encoded once. A pytree of numpy or JAX arrays."""

    hidden: Any  # [K, L, D] last hidden states, averaged over each class's prompts
    pooled: Any  # [K, D] the hidden state at the end-of-text token, averaged likewise


def prompts(entry: ClassEntry, templates: Sequence[str]) -> list[str]:
    """List every name of the class, then its synonyms, each in every template."""
    return [_prompt(name, template) for name in entry.names for template in expanded(templates)]


def _prompt(name: str, template: str) -> str:
    return template.replace(PLACEHOLDER, name)  # not format: other braces are text


def encode_prompts(
    text_encoder: CLIPText,
    tokenizer: Tokenizer,
    classes: Iterable[ClassEntry],
    templates: Sequence[str],
) -> PromptTable:
    """Encode every prompt of every class; synonyms and templates of a class are averaged.

    The table is in numpy, so that nothing is compiled for a new number of classes. Raises
    `UserError` as `prompt_ids` does, and for a text encoder whose weights are not finite.
    """
    token_ids, owner = prompt_ids(tokenizer, tuple(classes), templates)  # [S, L], [S]
    ends = np.argmax(token_ids == tokenizer.eos_id, axis=1)  # the first: padding may repeat it
    graph, params = nnx.split(text_encoder)
    hidden = []
    for start in range(0, len(token_ids), _PROMPTS):
        rows = token_ids[start : start + _PROMPTS]
        padded = np.pad(rows, ((0, _PROMPTS - len(rows)), (0, 0)), mode="edge")
        hidden.append(np.asarray(_encode(graph, params, padded))[: len(rows)])
    states = np.concatenate(hidden)  # [S, L, D]
    if not np.isfinite(states).all():
        raise UserError(
            "the text encoder gives numbers that are not finite: its weights are damaged, "
            "restore the folder they come from"
        )
    pooled = states[np.arange(len(states)), ends]
    count = np.bincount(owner).astype(np.float32)

    def average(values: np.ndarray) -> np.ndarray:
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
    """Return token ids [S, L] of every prompt of every class, and the class [S] each belongs to.

    What a prompt loses, because the text encoder reads no more than L tokens, is told in one
    warning. Raises `UserError` where nothing of a class name is left, and for two classes whose
    prompts are the same to the text encoder: the second would never get a pixel.
    """
    sentences: list[str] = []
    owner: list[int] = []
    cut: dict[int, str] = {}  # class -> the first of its prompts that loses something
    lost: list[tuple[str, str]] = []  # (prompt, its lost end)
    for index, entry in enumerate(classes):
        for name, template in itertools.product(entry.names, expanded(templates)):
            text = _prompt(name, template)
            kept = tokenizer.kept(text)
            if kept < len(text):
                _check_left(kept, name, template, tokenizer.model_max_length)
                lost.append((text, text[kept:]))
                cut.setdefault(index, text[kept:])
            sentences.append(text)
            owner.append(index)
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


def lost_ends(
    tokenizer: Tokenizer, classes: Sequence[ClassEntry], template: str
) -> list[tuple[str, str]]:
    """Return (name, its end that the text encoder does not read) of the names that lose one."""
    names = [name for entry in classes for name in entry.names]
    prompts = {name: _prompt(name, template) for name in names}
    lost = {name: text[tokenizer.kept(text) :] for name, text in prompts.items()}
    return [(name, end) for name, end in lost.items() if end]


def _check_left(kept: int, name: str, template: str, length: int) -> None:
    """Raise `UserError` if the first `kept` characters of a prompt hold nothing of the name."""
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
    """Raise `UserError` for two classes whose averages are over the same prompts."""
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


def context(table: PromptTable, class_ids: Any, kind: str) -> tuple[Any, Any | None]:
    """Return the context of groups of classes: class_ids int [B, G], -1 = empty slot.

    kind "mean": ([B, L, D], None). "bound": one token per class that also says its gray level,
    pooled text vector + level code, ([B, G, D], mask bool [B, G]); those of empty slots are zero.
    Numpy in, numpy out, so that on the host nothing is compiled for a new number of classes.
    """
    traced = isinstance(table.hidden, jax.core.Tracer)
    xp: Any = np if isinstance(class_ids, np.ndarray) and not traced else jnp
    hidden, pooled = xp.asarray(table.hidden), xp.asarray(table.pooled)
    rows, present = xp.maximum(class_ids, 0), class_ids != codec.PAD  # [B, G]
    if kind == "bound":
        tokens = pooled[rows] + codec.level_code(class_ids.shape[1], pooled.shape[1])
        return xp.where(present[..., None], tokens, xp.float32(0)), present
    if class_ids.shape[1] == 1:  # nothing to average: skip the sum over K
        return hidden[rows[:, 0]], None
    chosen = (rows[..., None] == np.arange(len(hidden))) & present[..., None]  # [B, G, K]
    weights = chosen.sum(1) / xp.maximum(1, present.sum(1, keepdims=True))  # [B, K]
    return xp.tensordot(weights.astype(hidden.dtype), hidden, axes=1), None  # [B, L, D]
