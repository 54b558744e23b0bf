"""A UNet, batches and configs small enough to follow what a step does with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segdiff_jax.config import Config, E2EConfig, ModelConfig, OptimizerConfig, TrainConfig
from segdiff_jax.diffusion.schedule import make_schedule
from segdiff_jax.text.conditioning import PromptTable
from segdiff_jax.training.losses import Frozen
from segdiff_jax.training.step import init_state

CHANNELS, TEXT = 4, 5  # of latents and of text
B, C, H, W, K = 4, 3, 8, 12, 6  # photos, classes asked, pixels, classes
PHOTO = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
NAMES = ["plain red circle", "background"]  # of the scenes


class SmallUNet(nnx.Module):
    """One linear layer over the sample, moved by time and text."""

    def __init__(self, rngs):
        self.mix = nnx.Linear(2 * CHANNELS, CHANNELS, rngs=rngs)
        self.text = nnx.Linear(TEXT, CHANNELS, rngs=rngs)

    def __call__(self, sample, timesteps, context, context_mask):
        text = self.text(context.mean(1))[:, None, None]  # [B, 1, 1, c]
        return jnp.tanh(self.mix(sample)) + text * (timesteps / 1000)[:, None, None, None]


def make_frozen(vae_params, **more):
    """What a step reads and does not change, with a text of every class."""
    hidden = np.random.default_rng(0).normal(size=(K, 7, TEXT)).astype(np.float32)
    table = PromptTable(jnp.asarray(hidden), jnp.asarray(hidden[:, 0]))
    return Frozen(vae_params, make_schedule(Config().diffusion), table, **more)


class Steps:
    """Steps from `params` on, compiled once for each config.

    make_step: of a config.
    """

    def __init__(self, make_step, params, frozen):
        self.make_step, self.params, self.frozen = make_step, params, frozen
        self.compiled = {}

    def __call__(self, config, batches, *, key=0, state=None, frozen=None):
        """The states after each batch and the metrics."""
        if repr(config) not in self.compiled:
            self.compiled[repr(config)] = jax.jit(self.make_step(config))
        step = self.compiled[repr(config)]
        state, found = state or init_state(self.params, config), []
        for batch in batches:
            state, metrics = step(state, frozen or self.frozen, batch, jax.random.key(key))
            found.append((state, {name: float(value) for name, value in metrics.items()}))
        return found


def unet_steps(make_step, vae):
    """Steps of a `SmallUNet` by `diffusion_step` or `e2e_step`."""
    graph, params = nnx.split(SmallUNet(nnx.Rngs(0)))
    vae, vae_params = nnx.split(vae)
    return Steps(lambda config: make_step(graph, vae, config), params, make_frozen(vae_params))


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


def changed(config, key, value):
    """`config` with another value of a dotted key."""
    *groups, name = key.split(".")
    setattr(functools.reduce(getattr, groups, config), name, value)
    return config


def make_config(e2e=None, remat=False, **optimizer):
    defaults = {"learning_rate": 3e-3, "warmup_steps": 1, "weight_decay": 0.0}
    return Config(
        stage="e2e",
        e2e=e2e or E2EConfig(classes=C),
        model=ModelConfig(remat=remat),
        optimizer=OptimizerConfig(**defaults | optimizer),
        train=TrainConfig(batch_size=B),
    )
