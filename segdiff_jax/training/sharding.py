"""Where arrays live: one mesh, a short list of rules, and the fallback when a shape does not fit.

The axes are `data` (replicas), `fsdp` (parameters cut up for storage, gathered for use) and
`tensor` (heads and hidden channels cut up for compute). A batch is spread over data × fsdp. The
same function places parameters, optimiser moments and their moving average, because the paths of
the latter two end in the path of the parameter.
"""

import functools
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from segdiff_jax.config import MeshConfig
from segdiff_jax.errors import UserError

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")

# Path regex → where `tensor` goes; the first match wins. Pairs such as q/k/v → out let the hidden
# dimension stay cut between two matrix products. Linear kernels are [in, out], convolutions HWIO.
# Arrays without a rule still give `tensor` a dimension, for storage: see `partition`.
RULES: tuple[tuple[str, P], ...] = (
    (r"(to_[qkv]|[qkv]_proj|ff/proj_in|fc1|time_emb_proj)/kernel$", P(None, "tensor")),
    (r"(to_out|out_proj|ff/proj_out|fc2)/kernel$", P("tensor", None)),
    (r"resnets/\d+/conv1/kernel$", P(None, None, None, "tensor")),
    (r"resnets/\d+/conv2/kernel$", P(None, None, "tensor", None)),
    (r"(to_[qkv]|[qkv]_proj|ff/proj_in|fc1|time_emb_proj)/bias$", P("tensor")),
    (r"resnets/\d+/conv1/bias$", P("tensor")),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh with axes ("data", "fsdp", "tensor") over `devices` (all of them by default).

    One size may be -1: all devices that the other two leave. Raises `UserError` when the sizes do
    not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(
                f"config.mesh.{axis}={size}: must be at least 1, or -1 for all remaining devices"
            )
    free = [axis for axis in AXES if sizes[axis] == -1]
    if len(free) > 1:
        raise UserError(
            f"config.mesh.{free[0]} and config.mesh.{free[1]} are both -1: "
            "only one axis can take the remaining devices"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = " × ".join(f"{axis}={sizes[axis]}" for axis in AXES)
    if free:
        if len(devices) % fixed:
            culprits = ", ".join(f"config.mesh.{axis}" for axis in AXES if sizes[axis] > 1)
            raise UserError(
                f"{culprits}: {asked} does not divide {len(devices)} devices: "
                "choose sizes whose product divides the number of devices"
            )
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise UserError(
            f"config.mesh.data: {asked} makes {fixed} devices, but there are {len(devices)}: "
            "set it to -1 or correct the sizes"
        )
    # Explicit axes (the default of make_mesh) refuse convolutions with sharded kernels.
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def leaf_path(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A JAX key path as plain names: `mu/down_blocks/0/conv_in/kernel` in parts.

    Dictionary keys, list positions and attributes (optax's named tuples) look alike, and the
    `value` that NNX variables append is dropped.
    """
    names = []
    for key in path:
        for attribute in ("key", "idx", "name"):
            if hasattr(key, attribute):
                names.append(str(getattr(key, attribute)))
                break
        else:
            names.append(str(key))
    return tuple(names[:-1] if len(names) > 1 and names[-1] == "value" else names)


def partition(path: str, shape: tuple[int, ...], sizes: dict[str, int]) -> P:
    """How an array is cut: the `PartitionSpec` of `path` ("a/b/kernel") on axes of `sizes`.

    `tensor` goes where `RULES` say, `fsdp` to another dimension. Without a rule each cuts what is
    then the largest dimension on a device that divides (the last such), so that storage falls by
    fsdp × tensor wherever the shape allows. Vectors without a rule are replicated: they are a
    thousandth of the bytes and would cost a collective each.
    """
    rule = next((spec for pattern, spec in RULES if re.search(pattern, path)), None)
    if rule is not None and len(rule) != len(shape):
        rule = None
    if len(shape) < 2 and rule is None:
        return P()
    local = list(shape)
    cuts: list[list[str]] = [[] for _ in shape]
    left = [axis for axis in ("fsdp", "tensor") if sizes[axis] > 1]

    def cut(dim: int, axis: str) -> None:
        cuts[dim].append(axis)
        local[dim] //= sizes[axis]
        left.remove(axis)

    if rule is not None and "tensor" in left:
        dim = rule.index("tensor")
        if local[dim] % sizes["tensor"] == 0:
            cut(dim, "tensor")
    for axis in tuple(left) if len(shape) > 1 else ():
        fits = [dim for dim, size in enumerate(local) if size % sizes[axis] == 0]
        if fits:
            uncut = [dim for dim in fits if axis == "fsdp" and not cuts[dim]]
            cut(max(uncut or fits, key=lambda dim: (local[dim], dim)), axis)
    if left and len(shape) > 1:
        _log_replicated(shape, tuple((axis, sizes[axis]) for axis in left))
    return P(*(tuple(axes) if axes else None for axes in cuts))


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every leaf of parameters, optimiser state, EMA, or all of them.

    `tree` holds arrays or `ShapeDtypeStruct`s; scalars are replicated.
    """
    sizes = dict(mesh.shape)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition("/".join(leaf_path(path)), tuple(leaf.shape), sizes))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch is cut along its leading axis over data × fsdp; `tensor` peers see the same part."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


@functools.cache  # one line per distinct shape, however many layers, moments and averages share it
def _log_replicated(shape: tuple[int, ...], axes: tuple[tuple[str, int], ...]) -> None:
    if jax.process_index() == 0:
        over = ", ".join(f"{axis}={size}" for axis, size in axes)
        log.info("arrays of shape %s do not divide by %s: replicated over it", shape, over)
