"""The arrays of one component ⇄ its safetensors files, one tensor in memory at a time."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from segdiff_jax.errors import UserError
from segdiff_jax.parallel.placement import Place
from segdiff_jax.weights import key_map, safetensors_files
from segdiff_jax.weights.hub import STEM

Shape = tuple[int, ...]
Module = TypeVar("Module", bound=nnx.Module)

_CONV_IN = "conv_in/kernel"
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls what needs no scales beside it


class Entry(NamedTuple):
    """A tensor of an open file."""

    file: epath.Path
    opened: Any  # by safetensors
    name: str  # in the file
    shape: Shape
    called: str  # as in a folder's file of its component
    rows: slice | None = None  # where it is a part of what is stored

    def read(self) -> np.ndarray:
        if self.rows is None:
            return self.opened.get_tensor(self.name)
        return self.opened.get_slice(self.name)[self.rows]


class Plan(NamedTuple):
    """A component before its weights are read: what is wanted, and what the files have."""

    component: str
    folder: epath.Path  # or the one file
    graph: Any  # of NNX
    variables: dict[tuple[Any, ...], Any]  # by path in the module, without arrays
    keys: dict[str, tuple[Any, ...]]  # name in a file → path in the module
    shapes: dict[str, Shape]  # by name, as the file should have them
    entries: dict[str, Entry]  # likewise by today's name
    widened: bool  # conv_in takes two latents, the file's one


def entries(paths: Collection[epath.Path], opened: Iterable[Any]) -> Iterator[Entry]:
    """List the tensors of open files, in their order there. Only headers are looked at."""
    for path, file in zip(paths, opened, strict=True):
        for name in file.offset_keys():
            yield Entry(path, file, name, tuple(file.get_slice(name).get_shape()), name)


def plan(
    component: str,
    make: Callable[..., nnx.Module],
    folder: epath.Path,
    found: Iterable[Entry],
    widened: bool = False,
) -> Plan:
    """Plan how the tensors `found` fill the module that `make` builds.

    `make` is only traced. With `widened`, the file's `conv_in` has half the input channels: it is
    duplicated and halved, so that two copies of an input give what one gave.
    """
    named = {key_map.canonical_name(component, entry.called): entry for entry in found}
    graph, state = nnx.split(shapes_of(make))
    variables = dict(nnx.to_flat_state(state))
    keys = {key_map.tensor_name(component, _path(key)): key for key in variables}
    shapes = {}
    for name, key in keys.items():
        shape = key_map.file_shape(_path(key), tuple(variables[key].shape))
        halve = widened and _path(key) == _CONV_IN
        shapes[name] = (shape[0], shape[1] // 2, *shape[2:]) if halve else shape
    known = {name: entry for name, entry in named.items() if name is not None}
    return Plan(component, folder, graph, variables, keys, shapes, known, widened)


def check(plans: Collection[Plan]) -> None:
    """Raise one `UserError` that lists every tensor of every component that does not fit.

    Where all fit, it names the first that is stored in a quantised form, if any is.
    """
    found = [f"{plan.folder}: {'; '.join(parts)}" for plan in plans if (parts := _misfits(plan))]
    if found:
        raise UserError(
            f"{'; '.join(found)}: the tensors do not fit config.json "
            "(is it the config.json of these weights?)"
        )
    for entry in (entry for plan in plans for entry in plan.entries.values()):
        stored = entry.opened.get_slice(entry.name).get_dtype()
        if stored not in _FLOATS:
            raise UserError(
                f"{entry.file}: {entry.name} is stored as {stored}: use weights in float32, "
                "float16 or bfloat16"
            )


def fill(plan: Plan, place: Place | None = None) -> nnx.Module:
    """Build the module of a checked plan, in float32, with the arrays from its files.

    `place` puts each host array, named "component/path", on devices. Raises `UserError` for a
    tensor that is not finite in float32.
    """
    variables = plan.variables
    for name, entry in plan.entries.items():
        path = _path(plan.keys[name])
        array = entry.read().reshape(plan.shapes[name])
        array = key_map.from_file(path, array)
        if plan.widened and path == _CONV_IN:  # [h, w, in, out]
            array = np.concatenate([array, array], axis=2).astype(np.float32) / 2
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, np.float32)
        if not all_finite(array):
            raise UserError(
                f"{entry.file}: {entry.name} holds NaN or infinity: these weights cannot be used: "
                "fetch the file again, or take an earlier checkpoint of that training"
            )
        # A copy by default: JAX may otherwise keep the buffer, which cannot be donated later.
        leaf = jnp.array(array) if place is None else place(f"{plan.component}/{path}", array)
        variables[plan.keys[name]] = variables[plan.keys[name]].replace(leaf)
    return nnx.merge(plan.graph, nnx.from_flat_state(variables))


def all_finite(array: np.ndarray) -> bool:
    """Return whether no element is NaN or infinite, by a sum: a third of the cost of a look."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum()) or np.isfinite(array).all())


def write(component: str, module: nnx.Module, folder: epath.Path, dtype: str) -> None:
    """Invert `plan` and `fill`: write one file, with today's names, weights as `dtype`."""
    tensors = {}
    for key, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        path = _path(key)
        shape = key_map.file_shape(path, tuple(variable.shape))

        def array(path: str = path, variable: Any = variable) -> np.ndarray:
            return key_map.to_file(path, np.asarray(variable[...]))

        tensors[key_map.tensor_name(component, path)] = (shape, array)
    safetensors_files.write(folder / f"{STEM[component]}.safetensors", tensors, dtype)


def shapes_of(make: Callable[..., Module]) -> Module:
    """Trace `make(rngs=…)`: the module with shapes in place of arrays."""
    return nnx.eval_shape(lambda: make(rngs=_OneKey()))


class _OneKey(nnx.Rngs):
    """A stand-in for `nnx.Rngs` where only shapes matter.

    Rngs counts its draws in a variable, and the time to trace its updates grows with the square of
    their number: 8 s instead of 0.8 for Stable Diffusion's UNet.
    """

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


def _path(key: tuple[Any, ...]) -> str:
    return "/".join(map(str, key))


def _misfits(plan: Plan) -> list[str]:
    """Describe the misfits: "missing: 2 (a, b)" and so on for the kinds that there are."""
    expected, found = plan.shapes, {name: entry.shape for name, entry in plan.entries.items()}
    wrong = [
        f"{name} {list(found[name])} instead of {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if not _fits(found[name], expected[name])
    ]
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "wrongly shaped": wrong,
    }
    return [f"{kind}: {len(names)} ({', '.join(names)})" for kind, names in kinds.items() if names]


def _fits(found: Shape, expected: Shape) -> bool:
    # Early files store the VAE's attention as 1×1 convolutions.
    return found == expected or (len(expected) == 2 and found == (*expected, 1, 1))
