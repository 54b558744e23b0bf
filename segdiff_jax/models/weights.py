"""The arrays of one component ⇄ its safetensors files, one tensor in memory at a time."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from segdiff_jax.errors import UserError
from segdiff_jax.models import key_map, safetensors_files
from segdiff_jax.models.hf_folders import STEM

Place = Callable[[str, np.ndarray], jax.Array]
Module = TypeVar("Module", bound=nnx.Module)
Shape = tuple[int, ...]

_CONV_IN = "conv_in/kernel"
_LISTED = 20  # names of each kind in an error about tensors


def fill(
    component: str,
    make: Callable[[nnx.Rngs], Module],
    folder: epath.Path,
    variant: str | None = None,
    place: Place | None = None,
    widened: bool = False,
) -> Module:
    """What `make` builds, in float32, with the arrays from the files in `folder`.

    `make` is only traced. `place` puts each host array, named "component/path", on devices.
    With `widened`, the file's `conv_in` has half the input channels: it is duplicated and halved,
    so that two copies of an input give what one gave.

    Raises `UserError` when tensors are missing, unexpected or of the wrong shape, naming them all,
    and when a file is damaged.
    """
    entries = {}
    for file in safetensors_files.find(folder, STEM[component], variant):
        for stored, entry in safetensors_files.read_header(file).items():
            name = key_map.canonical_name(component, stored)
            if name is not None:
                entries[name] = entry
    graph, state = nnx.split(nnx.eval_shape(lambda: make(cast(nnx.Rngs, _OneKey()))))
    variables = dict(nnx.to_flat_state(state))
    keys = {key_map.tensor_name(component, _path(key)): key for key in variables}
    shapes = {}
    for name, key in keys.items():
        shape = key_map.file_shape(_path(key), tuple(variables[key].shape))
        halve = widened and _path(key) == _CONV_IN
        shapes[name] = (shape[0], shape[1] // 2, *shape[2:]) if halve else shape
    _check(folder, shapes, {name: entry.shape for name, entry in entries.items()})
    for name, array in safetensors_files.read(entries):
        path = _path(keys[name])
        array = key_map.from_file(path, array.reshape(shapes[name]))
        if widened and path == _CONV_IN:  # [h, w, in, out]
            array = np.concatenate([array, array], axis=2).astype(np.float32) / 2
        array = np.ascontiguousarray(array, np.float32)
        # A copy by default: JAX may otherwise keep the buffer, which cannot be donated later.
        leaf = jnp.array(array) if place is None else place(f"{component}/{path}", array)
        variables[keys[name]] = variables[keys[name]].replace(leaf)
    return nnx.merge(graph, nnx.from_flat_state(variables))


def write(component: str, module: nnx.Module, folder: epath.Path, dtype: str) -> None:
    """The inverse of `fill`: one file, with today's names, weights as `dtype`."""
    tensors = {}
    for key, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        path = _path(key)
        shape = key_map.file_shape(path, tuple(variable.shape))

        def array(path: str = path, variable: Any = variable) -> np.ndarray:
            return key_map.to_file(path, np.asarray(variable[...]))

        tensors[key_map.tensor_name(component, path)] = (shape, array)
    safetensors_files.write(folder / f"{STEM[component]}.safetensors", tensors, dtype)


class _OneKey:
    """Stands in for `nnx.Rngs` where only shapes matter.

    Rngs counts its draws in a variable, and tracing those updates takes a time that grows with the
    square of their number: 5 s instead of 0.4 for Stable Diffusion's UNet.
    """

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


def _path(key: tuple[Any, ...]) -> str:
    return "/".join(map(str, key))


def _check(folder: epath.Path, expected: dict[str, Shape], found: dict[str, Shape]) -> None:
    """Raises one `UserError` that lists every tensor that does not fit."""
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    wrong = [
        f"{name} {list(found[name])} instead of {list(expected[name])}"
        for name in sorted(set(expected) & set(found))
        if not _fits(found[name], expected[name])
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "wrongly shaped": wrong}
    parts = [f"{kind}: {_list(names)}" for kind, names in kinds.items() if names]
    if parts:
        raise UserError(
            f"{folder}: the tensors do not fit config.json: {'; '.join(parts)} "
            "(is it the config.json of these weights?)"
        )


def _fits(found: Shape, expected: Shape) -> bool:
    # Early files store the VAE's attention as 1×1 convolutions.
    return found == expected or (len(expected) == 2 and found == (*expected, 1, 1))


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} ({', '.join(names[:_LISTED])}{more})"
