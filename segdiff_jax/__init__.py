"""Text-prompted segmentation with diffusion models, in JAX.

    from segdiff_jax import Segmenter, read_image

    segmenter = Segmenter.load("runs/demo/workdir-0")
    result = segmenter(read_image("photo.jpg"), ["sky", "building, edifice"])

Names are imported when they are first used, so that the command line starts without JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segdiff_jax.cli import load_config
    from segdiff_jax.config import Config
    from segdiff_jax.data.images import read_image
    from segdiff_jax.errors import UserError
    from segdiff_jax.inference.result import Segmentation
    from segdiff_jax.inference.segmenter import Segmenter

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Segmentation",
    "Segmenter",
    "UserError",
    "__version__",
    "load_config",
    "read_image",
]

_HOMES = {
    "Config": "config",
    "Segmentation": "inference.result",
    "Segmenter": "inference.segmenter",
    "UserError": "errors",
    "load_config": "cli",
    "read_image": "data.images",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
