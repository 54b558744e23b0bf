"""Placement of a process's arrays on the mesh: weights from files, whole networks, rows of work.

Weights from files are put straight into their shards: no device ever holds them whole.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from segdiff_jax.parallel import processes
from segdiff_jax.parallel.mesh import put, replicated, rows_sharding
from segdiff_jax.parallel.rules import partition

Place = Callable[[str, np.ndarray], jax.Array]  # puts the array of a path where it belongs


def placer(mesh: Mesh) -> Place:
    """Return a `place` argument for `weights.pretrained.load` that shards each array by `rules`.

    Every process reads the files and keeps of each array what its devices hold.
    """
    sizes = dict(mesh.shape)

    def place(path: str, array: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, partition(path, array.shape, sizes))
        return put(array, sharding)

    return place


def whole(tree: Any, mesh: Mesh) -> Any:
    """Replicate the arrays of `tree` on every device of `mesh`. All processes call this.

    Arrays that are whole there stay where they are, those that are cut over the devices, as in
    a training state, are gathered, and shapes without arrays stay shapes.
    """
    everywhere = replicated(mesh)
    leaves, structure = jax.tree.flatten(tree)
    cut = [i for i, leaf in enumerate(leaves) if _is_cut(leaf, mesh)]
    if cut:  # in one program, for no process can fetch what only others hold
        gathered = jax.jit(lambda x: x, out_shardings=everywhere)([leaves[i] for i in cut])
        for i, leaf in zip(cut, gathered, strict=True):
            leaves[i] = leaf

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct) or _is_on(leaf, mesh):
            return leaf
        # With one process, device_put copies from device to device, not through the host.
        return jax.device_put(leaf, everywhere) if processes.count() == 1 else put(leaf, everywhere)

    return jax.tree.unflatten(structure, map(place, leaves))


def _is_on(leaf: Any, mesh: Mesh) -> bool:
    here = getattr(leaf, "sharding", None)
    return isinstance(here, NamedSharding) and here.mesh == mesh


def _is_cut(leaf: Any, mesh: Mesh) -> bool:
    whole = replicated(mesh)
    return (
        isinstance(leaf, jax.Array)
        and _is_on(leaf, mesh)
        and not leaf.sharding.is_equivalent_to(whole, leaf.ndim)
    )


def spread_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Shard rows [N, ...] that every process holds over the devices of `mesh`.

    N grows to a multiple of the devices: the first rows come again.
    """
    padded = np.take(rows, range(multiple(len(rows), mesh.size)), axis=0, mode="wrap")
    return put(padded, rows_sharding(mesh))


def equal_parts(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Cut rows [N, ...] into parts [size, ...]: one shape for one compilation.

    The last part is filled up with the first rows.
    """
    for start in range(0, len(rows), size):
        yield np.take(rows, range(start, start + size), axis=0, mode="wrap")


def rows_of_call(count: int, most: int, devices: int) -> int:
    """Choose how many rows each compiled call takes for `count` rows in all: one of a few numbers.

    On each device 1, 2, 4, 8, and from there on twice and three times a power of two: 12, 16, 24,
    32, ..., up to `most` rows over all devices. At worst five rows pay for eight, and after
    the first few calls no number of rows compiles anything.
    """
    largest = multiple(most, devices) // devices
    wanted, size = min(-(-count // devices), largest), 1
    while size < wanted:
        size = size + size // 2 if size >= 8 and size & (size - 1) == 0 else 1 << size.bit_length()
    return devices * min(size, largest)


def multiple(count: int, of: int) -> int:
    """Return the smallest multiple of `of` that is at least `count`."""
    return -(-count // of) * of
