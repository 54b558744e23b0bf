"""The mesh of a config, and the shardings of batches, rows and replicated arrays on it.

The axes are `data` (replicas), `fsdp` and `tensor` (`rules` says what they cut). A batch is sharded
over data × fsdp.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from segdiff_jax.config import Config, MeshConfig
from segdiff_jax.errors import UserError
from segdiff_jax.stages import key_of

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # `tensor` peers have the same examples


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build the mesh with axes ("data", "fsdp", "tensor") over `devices` (all of them by default).

    An axis is as long as its size within a slice (ICI: config.mesh.data, ...) times its size across
    slices (DCN: config.mesh.dcn_data, ...); a machine that is no TPU is one slice. One size of each
    kind may be -1: all that the other two leave. Raises `UserError` when sizes do not multiply to
    the number of devices in a slice, or of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    across = _sizes(config, "dcn_", slices, "slices")
    within = _sizes(config, "", len(devices) // slices, "devices")
    # Explicit axes (the default of make_mesh) refuse convolutions with sharded kernels.
    kinds = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        return jax.make_mesh(within, AXES, axis_types=kinds, devices=devices)
    placed = mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )
    return Mesh(placed, AXES, axis_types=kinds)


def _sizes(config: MeshConfig, prefix: str, count: int, things: str) -> tuple[int, ...]:
    """Return the sizes of the axes in `config`, -1 replaced, which must multiply to `count`."""
    names = [f"{prefix}{axis}" for axis in AXES]
    sizes = {name: getattr(config, name) for name in names}
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(
                f"config.mesh.{name}={size}: must be at least 1, or -1 for all remaining {things}"
            )
    free = [name for name in names if sizes[name] == -1]
    if len(free) > 1:
        raise UserError(
            f"config.mesh.{free[0]} and config.mesh.{free[1]} are both -1: "
            f"only one axis can take the remaining {things}"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = " × ".join(f"{name}={sizes[name]}" for name in names)
    if free:
        if count % fixed:
            culprits = ", ".join(f"config.mesh.{name}" for name in names if sizes[name] > 1)
            raise UserError(
                f"{culprits}: {asked} does not divide {count} {things}: "
                f"choose sizes whose product divides the number of {things}"
            )
        sizes[free[0]] = count // fixed
    elif fixed != count:
        raise UserError(
            f"config.mesh.{names[0]}: {asked} makes {fixed} {things}, but there are {count}: "
            "set it to -1 or correct the sizes"
        )
    return tuple(sizes.values())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: data × fsdp cut its rows, `tensor` peers share them."""
    return NamedSharding(mesh, P(BATCH_AXES))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of independent rows: over all devices, `tensor` peers too."""
    return NamedSharding(mesh, P(mesh.axis_names))


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Count the shards into which a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_rows(mesh: Mesh, batch_size: int, key: str = "config.train.batch_size") -> list[int]:
    """List the rows of a global batch that this process feeds to its devices, in ascending order.

    Processes whose devices differ only along `tensor` feed the same rows. Raises `UserError`, which
    names the `key` that the batch's size comes from, when it cannot be cut evenly.
    """
    parts = batch_parts(mesh)
    if batch_size % parts:
        raise UserError(
            f"a batch of {batch_size} does not divide over the {parts} devices along the axes data "
            f"and fsdp: correct {key} or config.mesh.data"
        )
    cuts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for cut in cuts if cut for row in range(*cut[0].indices(batch_size))})


def check_batches(mesh: Mesh, own: Config) -> None:
    """Raise `UserError` unless a stage's batch, and each micro-batch, divides over the devices.

    own: the config of the stage (`stages.of_stage`). Of a micro-batch that does not divide, each
    device would compute all rows.
    """
    size, rounds = own.train.batch_size, own.optimizer.accumulation
    local_rows(mesh, size, f"config.{key_of(own.stage, 'train.batch_size')}")
    if rounds > 1:
        local_rows(mesh, size // rounds, "config.optimizer.accumulation")


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, size: int) -> dict[str, jax.Array]:
    """Place the `local_rows` that this process feeds as shards of a global batch of `size`."""
    cut = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(cut, rows, (size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts a whole copy on every device."""
    return NamedSharding(mesh, P())


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """Put an array that every process holds whole on devices, to each device its own shard."""
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda cut: whole[cut])


def abstract(tree: Any, shardings: Any) -> Any:
    """Return the shapes and types of `tree`, to be placed by `shardings`.

    shardings: a tree like `tree`, or one sharding for all of it.
    """
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    struct = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(struct, tree, shardings)
