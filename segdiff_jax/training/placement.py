"""Weights from files straight to where the mesh wants them: no device ever holds them whole."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from segdiff_jax.models.weights import Place
from segdiff_jax.training.sharding import partition, put


def placer(mesh: Mesh) -> Place:
    """For `models.pretrained.load(place=...)`: cuts each array by the rules of `sharding`.

    Every process reads the files and keeps of each array what its devices hold.
    """
    sizes = dict(mesh.shape)

    def place(path: str, array: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, partition(path, array.shape, sizes))
        return put(array, sharding)

    return place
