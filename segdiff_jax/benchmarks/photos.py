"""Made-up photos, which take a codec about as long as real ones."""

import numpy as np
from PIL import Image


def drawn(height: int, width: int, seed: int = 0, block: int = 32, grain: int = 6) -> np.ndarray:
    """Draw a photo uint8 [height, width, 3]: colours that run into each other, with noise.

    block: pixels from one colour to the next. grain: the noise in gray values, at most.
    """
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // block + 2, width // block + 2, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(-grain, grain + 1, (height, width, 1), np.int16)
    return (smooth + noise).clip(0, 255).astype(np.uint8)
