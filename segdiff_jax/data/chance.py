"""Where all random draws of the data come from."""

import zlib

import numpy as np


def generator(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Return the stream of `purpose` at `indices`, such as ("view", record, view).

    numpy takes (seed, i) and (seed, i, 0) for the same seed: the purpose keeps streams of different
    numbers of indices apart.
    """
    return np.random.default_rng((seed, zlib.crc32(purpose.encode()), *indices))
