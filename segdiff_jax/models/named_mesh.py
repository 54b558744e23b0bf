"""The mesh that is named while a function is traced, for what depends on the chips it is for.

`training.loop.compile_step` names it, and so does a `shard_map`.
"""

import jax
from jax.sharding import AbstractMesh


def of_tpus() -> AbstractMesh | None:
    """The mesh, if it is of TPUs."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return mesh if device is not None and device.device_kind.startswith("TPU") else None
