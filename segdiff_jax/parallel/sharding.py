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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from segdiff_jax.config import MeshConfig
from segdiff_jax.errors import UserError

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # `tensor` peers have the same examples
SMALLEST_SPREAD = 2**16  # elements of an array that is worth cutting over replicas

# The parts of a training state that are cut over replicas.
_SPREAD = {"params", "ema", "mu", "nu"}

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
    """The sizes of the axes in `config`, -1 replaced, which must multiply to `count` things."""
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

    Under a rule `tensor` goes where it says and `fsdp` to the largest other dimension that divides.
    Without one both go to the largest dimension that divides by their product (the last such), so
    that storage still falls by fsdp × tensor. Not to two dimensions: with many such arrays the SPMD
    partitioner of XLA was seen to compute wrong values on (2, 2, 2) (UNet loss off by 6e-4).
    Vectors without a rule are replicated: they are a thousandth of the bytes and would cost a
    collective each.
    """
    rule = next((spec for pattern, spec in RULES if re.search(pattern, path)), None)
    axes = [axis for axis in ("fsdp", "tensor") if sizes[axis] > 1]
    if len(shape) < 2 and rule is None:
        return P()
    cuts: list[tuple[str, ...]] = [() for _ in shape]
    if rule is not None and len(rule) == len(shape) and "tensor" in axes:
        dim = rule.index("tensor")
        if shape[dim] % sizes["tensor"] == 0:
            cuts[dim] = ("tensor",)
            axes.remove("tensor")
    if len(shape) > 1:
        for group in (tuple(axes), *((axis,) for axis in axes)):
            dim = _largest(shape, math.prod(sizes[axis] for axis in group), cuts)
            if group and dim is not None:
                cuts[dim] = group
                axes = [axis for axis in axes if axis not in group]
                break
        if axes:
            _log_replicated(shape, tuple((axis, sizes[axis]) for axis in axes))
    return P(*(cut or None for cut in cuts))


def _largest(shape: tuple[int, ...], parts: int, cuts: list[tuple[str, ...]]) -> int | None:
    """The largest dimension, not yet cut, that divides into `parts`; None if there is none."""
    fits = [dim for dim, size in enumerate(shape) if size % parts == 0 and not cuts[dim]]
    return max(fits, key=lambda dim: (shape[dim], dim), default=None)


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every leaf of parameters, optimiser state, EMA, or all of them.

    `tree` holds arrays or `ShapeDtypeStruct`s; scalars are replicated. In a training state, or a
    part of it under the name it has there ({"params": ...}), large arrays are cut over replicas too
    (`spread`), unless each is a slice of its own: the network between slices is slow, and XLA was
    seen to send it weights that it had gathered. A network by itself is not.
    """
    sizes, spreads = dict(mesh.shape), not _replicas_are_slices(mesh)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names, shape = leaf_path(path), tuple(leaf.shape)
        spec = partition("/".join(names), shape, sizes)
        if spreads and _SPREAD & set(names):
            spec = spread(spec, shape, sizes)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def _replicas_are_slices(mesh: Mesh) -> bool:
    slices = {getattr(device, "slice_index", 0) for device in mesh.devices[:, 0, 0]}
    return len(slices) == mesh.shape["data"] > 1


def for_use(params: Any, mesh: Mesh) -> Any:
    """The parameters of a training state whole on every device, for the sampler.

    All processes must call it. Parameters that are whole already, and shapes without arrays, are
    returned as they are.
    """
    whole = replicated(mesh)
    cut = lambda leaf: not leaf.sharding.is_equivalent_to(whole, leaf.ndim)  # noqa: E731
    arrays = (leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
    if not any(map(cut, arrays)):
        return params
    return jax.jit(lambda p: p, out_shardings=whole)(params)


def spread(spec: P, shape: tuple[int, ...], sizes: dict[str, int]) -> P:
    """`spec` cut along `data` too, for what the optimiser reads and writes.

    ZeRO stage 1 (arXiv 1910.02054): replicas need the same update once, so each makes its part of
    moments and float32 parameters. What they exchange is what the layers multiply with: the cast
    to their dtype comes before the gather. The cut goes to the dimension that is cut already, so
    that arrays keep one; else to the largest. Small arrays stay whole: a message each would cost
    more than the memory is worth. Of Stable Diffusion's UNet these are as good as none, of a small
    network most.
    """
    if sizes["data"] == 1 or len(shape) < 2 or math.prod(shape) < SMALLEST_SPREAD:
        return spec
    cuts = [(c,) if isinstance(c, str) else tuple(c or ()) for c in spec]
    cuts += [()] * (len(shape) - len(cuts))
    if any("data" in cut for cut in cuts):
        return spec
    pieces = [math.prod(sizes[axis] for axis in cut) * sizes["data"] for cut in cuts]
    fits = [dim for dim, size in enumerate(shape) if size % pieces[dim] == 0]
    taken = [dim for dim in fits if "fsdp" in cuts[dim] or "tensor" in cuts[dim]]
    if any(cuts) and not taken:
        return spec
    dim = max(taken or fits, key=lambda d: (shape[d], d), default=None)
    if dim is None:
        return spec
    cuts[dim] += ("data",)
    return P(*(cut or None for cut in cuts))


def gathered(params: Any, mesh: Mesh) -> Any:
    """Inside a step: parameters as the layers use them, whole but where a rule has `tensor`.

    Said of the parameters, so that the partitioner has no reason to cut activations by channel
    where the kernels are: that would exchange whole batches.
    """
    sizes = {"data": 1, "fsdp": 1, "tensor": mesh.shape["tensor"]}

    def gather(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = "/".join(leaf_path(path))
        ruled = any(re.search(pattern, name) for pattern, _ in RULES)
        spec = partition(name, leaf.shape, sizes) if ruled else P()
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(gather, params)


def scattered(grads: Any, mesh: Mesh) -> Any:
    """Inside a step: gradients cut as the parameters of a training state."""
    shardings = state_sharding({"params": grads}, mesh)["params"]
    return jax.lax.with_sharding_constraint(grads, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch is cut along its leading axis over data × fsdp; `tensor` peers see the same part."""
    return NamedSharding(mesh, P(BATCH_AXES))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Rows that have nothing to do with each other are cut over all devices, `tensor` peers too."""
    return NamedSharding(mesh, P(mesh.axis_names))


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this process feeds to its devices, in ascending order.

    Processes whose devices differ only along `tensor` feed the same rows. Raises `UserError` when
    the batch cannot be cut evenly.
    """
    parts = batch_parts(mesh)
    if batch_size % parts:
        raise UserError(
            f"a batch of {batch_size} does not divide over the {parts} devices along the axes data "
            "and fsdp: correct config.train.batch_size, config.vae.batch_size or config.mesh.data"
        )
    cuts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for cut in cuts if cut for row in range(*cut[0].indices(batch_size))})


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole, as arrays on the devices of all.

    shardings: a tree like `tree`, or one sharding for all of it.
    """
    return _map_with(put, tree, shardings)


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """Of an array that every process holds whole, to each device the part that is its own."""
    whole = np.asarray(array)
    return jax.make_array_from_callback(whole.shape, sharding, lambda cut: whole[cut])


def abstract(tree: Any, shardings: Any) -> Any:
    """The shapes and types of `tree`, to be placed by `shardings` (as of `place`)."""
    struct = lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s)  # noqa: E731
    return _map_with(struct, tree, shardings)


def _map_with(function: Callable[[Any, NamedSharding], Any], tree: Any, shardings: Any) -> Any:
    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda leaf: function(leaf, shardings), tree)
    return jax.tree.map(function, tree, shardings)


@functools.cache  # one line per distinct shape, however many layers, moments and averages share it
def _log_replicated(shape: tuple[int, ...], axes: tuple[tuple[str, int], ...]) -> None:
    if jax.process_index() == 0:
        over = ", ".join(f"{axis}={size}" for axis, size in axes)
        log.info("arrays of shape %s do not divide by %s: replicated over it", shape, over)
