"""Plain names, checksums and finiteness of the arrays in a checkpoint.

Orbax's chunks carry no checksum, so a flipped bit would be restored unnoticed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segdiff_jax.parallel import processes
from segdiff_jax.parallel.rules import leaf_path
from segdiff_jax.weights.tensors import all_finite


def by_name(tree: Any) -> dict[str, Any]:
    """Return the leaves of `tree` under the parts of `leaf_path`, "params/conv_in/kernel"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(leaf_path(path)): leaf for path, leaf in leaves}


def of(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """Return the checksum of each array, by its name: the sum of its bit patterns modulo 2³².

    It is exact, and the same however the array is sharded.
    """
    spread = [name for name, leaf in leaves.items() if len(leaf.sharding.device_set) > 1]
    alone = {name: leaf for name, leaf in leaves.items() if name not in set(spread)}
    sums = {name: _of_one_device(leaf) for name, leaf in alone.items()}
    found = {name: int(value) for name, value in jax.device_get(sums).items()}
    if spread:
        # On the host: a program with collectives for each array was seen to hang on CPU devices.
        mine = np.array([_of_shards(leaves[name]) for name in spread], np.uint32)
        total = processes.stacked(mine).sum(0, dtype=np.uint32)
        found |= {name: int(value) for name, value in zip(spread, total, strict=True)}
    return found


def _of_one_device(array: jax.Array) -> jax.Array | int:
    (device,) = array.devices()
    # A CPU sums faster than a program for each shape is compiled, which took 2 s for a small UNet.
    return _of_shards(array) if device.platform == "cpu" else _on_device(array)


@jax.jit
def _on_device(array: jax.Array) -> jax.Array:
    if array.dtype != jnp.bool_:
        array = jax.lax.bitcast_convert_type(array, f"uint{array.dtype.itemsize * 8}")
    return jnp.sum(array, dtype=jnp.uint32)


def _of_shards(array: jax.Array) -> int:
    """Sum the shards held here, each counted by one of the devices that hold it."""
    total = 0
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            part = np.ascontiguousarray(shard.data)
            if part.dtype != np.bool_:
                part = part.view(f"uint{part.dtype.itemsize * 8}")
            total += int(part.sum(dtype=np.uint32))
    return total % 2**32


def verify(leaves: dict[str, jax.Array], expected: dict[str, int], stored: dict[str, Any]) -> None:
    """Raise `ValueError` unless arrays that kept their type have the sums that were stored."""
    same = {name: leaf for name, leaf in leaves.items() if leaf.dtype == stored[name].dtype}
    for name, value in of(same).items():
        if value != expected[name]:
            raise ValueError(f"the contents of {name} do not match their checksum")


def check_finite(leaves: dict[str, jax.Array]) -> None:
    """Raise `ValueError` for NaN or infinity, in every process.

    Both pass a checksum, and a run that resumed from them would blame data or learning rate.
    """
    bad = next((name for name, leaf in leaves.items() if not _is_finite(leaf)), None)
    if not processes.all_agree(bad is None):
        raise ValueError(f"{bad or 'an array'} holds NaN or infinity")


def _is_finite(array: jax.Array) -> bool:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    mine = (part.data for part in array.addressable_shards if part.replica_id == 0)
    return all(all_finite(np.asarray(data)) for data in mine)
