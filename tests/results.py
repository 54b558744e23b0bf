"""What `predict` has left in a folder, and photos for it."""

import numpy as np
from PIL import Image

from segdiff_jax import ownership


def names(folder):
    """What is in a folder, but for the list of what was written there."""
    inside = folder.iterdir() if folder.exists() else []
    return sorted(path.name for path in inside if path.name != ownership.MARKER)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_photo(path, size=(20, 20), seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
