"""A UNet, batches and configs small enough to follow what a step does with them."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from segdiff_jax.config import Config, E2EConfig, ModelConfig, OptimizerConfig, TrainConfig

CHANNELS, TEXT = 4, 5  # of latents and of text
B, C, H, W, K = 4, 3, 8, 12, 6  # photos, classes asked, pixels, classes


class SmallUNet(nnx.Module):
    """One linear layer over the sample, moved by time and text."""

    def __init__(self, rngs):
        self.mix = nnx.Linear(2 * CHANNELS, CHANNELS, rngs=rngs)
        self.text = nnx.Linear(TEXT, CHANNELS, rngs=rngs)

    def __call__(self, sample, timesteps, context, context_mask):
        text = self.text(context.mean(1))[:, None, None]  # [B, 1, 1, c]
        return jnp.tanh(self.mix(sample)) + text * (timesteps / 1000)[:, None, None, None]


def make_batch(seed=0):
    """Blocks of classes, *ignore* among them; absent classes and empty slots are asked for too."""
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(0, 4, (B, 4, 4)), np.ones((1, 2, 3))).astype(np.uint8)
    labels[:, :2, :5] = 255
    labels[3] = 255
    return {
        "image": rng.integers(0, 256, (B, H, W, 3), dtype=np.uint8),
        "labels": labels,
        "class_ids": np.array([[0, 1, 2], [3, 5, 0], [1, -1, -1], [0, 1, 2]], np.int32),
    }


def make_config(e2e=None, remat=False, **optimizer):
    defaults = {"learning_rate": 3e-3, "warmup_steps": 1, "weight_decay": 0.0}
    return Config(
        stage="e2e",
        e2e=e2e or E2EConfig(classes=C),
        model=ModelConfig(remat=remat),
        optimizer=OptimizerConfig(**defaults | optimizer),
        train=TrainConfig(batch_size=B),
    )
