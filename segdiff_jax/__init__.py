"""Text-prompted semantic segmentation with diffusion models, in JAX."""

__version__ = "0.1.0"
