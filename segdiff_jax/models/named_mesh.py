"""The mesh that is named while a function is traced, for what depends on the chips it is for.

`training.sharding.naming` names it for a training step, and so does a `shard_map`.
"""

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P


def of_tpus() -> AbstractMesh | None:
    """The mesh, if it is of TPUs."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return mesh if device is not None and device.device_kind.startswith("TPU") else None


def by_rows(x: jax.Array) -> jax.Array:
    """x [B, ...], told to be cut by rows over data × fsdp as the batch is.

    XLA's partitioner also looks at the weights. Where these are cut by channel it may cut x by
    channel as well, which takes exchanges of whole batches.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return x
    if len(x) % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    others = (P.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, P(("data", "fsdp"), *others))
