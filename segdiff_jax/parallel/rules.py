"""Sharding rules: one list for networks, optimiser state and EMA alike.

The axes are `data` (replicas), `fsdp` (parameters sharded for storage, gathered for use) and
`tensor` (heads and hidden channels sharded for compute). The same rules place parameters, moments
and their moving average, because the paths of the latter two end in the path of the parameter.

    path of an array ─► RULES: which dimension `tensor` cuts
                     ─► fsdp (`tensor` too, where no rule has it): the largest that divides
                     ─► in a training state also `data`: each replica updates its part
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

OUTPUTS, INPUTS = -1, -2  # dimensions of kernels: linear [in, out], convolution [h, w, in, out]

# Path regex → the dimension that `tensor` cuts; the first match wins. Pairs such as q/k/v → out let
# the hidden dimension stay cut between two matrix products. None: any dimension, for storage.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"(to_[qkv]|[qkv]_proj|ff/proj_in|fc1|time_emb_proj)/(kernel|bias)$", OUTPUTS),
    (r"(to_out|out_proj|ff/proj_out|fc2)/kernel$", INPUTS),
    (r"resnets/\d+/conv1/(kernel|bias)$", OUTPUTS),
    (r"resnets/\d+/conv2/kernel$", INPUTS),
    (r"", None),
)

SMALLEST_SPREAD = 2**16  # elements of an array that is worth cutting over replicas
_SPREAD = {"params", "ema", "mu", "nu"}  # parts of a training state that are


def leaf_path(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Split a JAX key path into plain names: `mu/down_blocks/0/conv_in/kernel` in parts.

    Dictionary keys, list positions and attributes (optax's named tuples) look alike, and the
    `value` that NNX variables append is dropped.
    """
    names = jax.tree_util.keystr(path, simple=True, separator="\0").split("\0")
    return tuple(names[:-1] if len(names) > 1 and names[-1] == "value" else names)


def partition(path: str, shape: tuple[int, ...], sizes: dict[str, int]) -> P:
    """Return how axes of `sizes` cut the array at `path` ("a/b/kernel").

    Under a rule `tensor` goes where it says and `fsdp` to the largest other dimension that divides.
    Without one both go to the largest dimension that divides by their product (the last such), so
    that storage still falls by fsdp × tensor. Not to two dimensions: with many such arrays the SPMD
    partitioner of XLA was seen to compute wrong values on (2, 2, 2) (UNet loss off by 6e-4).
    Vectors get no axis but `tensor`: they are a thousandth of the bytes and would cost a collective
    each.
    """
    ruled = _tensor_dimension(path)
    axes = [axis for axis in ("fsdp", "tensor") if sizes[axis] > 1]
    cuts: list[tuple[str, ...]] = [() for _ in shape]
    if ruled is not None and "tensor" in axes and shape[ruled] % sizes["tensor"] == 0:
        cuts[ruled] = ("tensor",)
        axes.remove("tensor")
    if len(shape) < 2:
        return P(*(cut or None for cut in cuts)) if any(cuts) else P()
    for group in (tuple(axes), *((axis,) for axis in axes)):
        dim = _largest(shape, math.prod(sizes[axis] for axis in group), cuts)
        if group and dim is not None:
            cuts[dim] = group
            break
    return P(*(cut or None for cut in cuts))


def _tensor_dimension(path: str) -> int | None:
    return next(dimension for pattern, dimension in RULES if re.search(pattern, path))


def _largest(shape: tuple[int, ...], parts: int, cuts: list[tuple[str, ...]]) -> int | None:
    """Return the largest dimension, not yet cut, that `parts` divides; None if there is none."""
    fits = [dim for dim, size in enumerate(shape) if size % parts == 0 and not cuts[dim]]
    return max(fits, key=lambda dim: (shape[dim], dim), default=None)


def spread(spec: P, shape: tuple[int, ...], sizes: dict[str, int]) -> P:
    """Cut `spec` along `data` too, for what the optimiser reads and writes.

    ZeRO stage 1 (arXiv 1910.02054): each replica updates its own shard of moments and float32
    parameters. Replicas exchange what the layers multiply with, since the cast to the layers'
    dtype comes before the gather. `data` joins the dimension that is already cut, so that an array
    has one cut dimension; else it takes the largest. Small arrays stay whole, because a message
    for each would cost more than the memory is worth: nearly none of Stable Diffusion's UNet, but
    most of a small network.
    """
    if sizes["data"] == 1 or len(shape) < 2 or math.prod(shape) < SMALLEST_SPREAD:
        return spec
    cuts = [(c,) if isinstance(c, str) else tuple(c or ()) for c in spec]
    cuts += [()] * (len(shape) - len(cuts))
    pieces = [math.prod(sizes[axis] for axis in cut) * sizes["data"] for cut in cuts]
    fits = [dim for dim, size in enumerate(shape) if size % pieces[dim] == 0]
    fits = [dim for dim in fits if cuts[dim] or not any(cuts)]
    dim = max(fits, key=lambda d: (shape[d], d), default=None)
    if dim is None:
        return spec
    cuts[dim] += ("data",)
    return P(*(cut or None for cut in cuts))


def state_sharding(tree: Any, mesh: Mesh) -> Any:
    """Return the `NamedSharding` of every leaf of parameters, optimiser state, EMA, or all of them.

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


def gathered(params: Any, mesh: Mesh) -> Any:
    """Inside a step, gather parameters as the layers use them: whole but where a rule has `tensor`.

    Said of the parameters, so that the partitioner has no reason to cut activations by channel
    where the kernels are: that would exchange whole batches.
    """
    sizes = {"data": 1, "fsdp": 1, "tensor": mesh.shape["tensor"]}

    def gather(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = "/".join(leaf_path(path))
        spec = P() if _tensor_dimension(name) is None else partition(name, leaf.shape, sizes)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(gather, params)


def scattered(grads: Any, mesh: Mesh) -> Any:
    """Inside a step, scatter gradients as the parameters of a training state are sharded."""
    shardings = state_sharding({"params": grads}, mesh)["params"]
    return jax.lax.with_sharding_constraint(grads, shardings)
