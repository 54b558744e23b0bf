"""What CI compiles for TPUs: one level, 4 × 4 latents, bfloat16, cached latents."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from segdiff_jax.config import Config, DataConfig, ModelConfig, NoiseConfig, TrainConfig, VAEConfig
from segdiff_jax.models import presets
from segdiff_jax.roofline import measure
from segdiff_jax.roofline.chips import CHIPS
from segdiff_jax.roofline.compile import devices
from segdiff_jax.roofline.steps import Step


def get_config() -> Config:
    presets.PRESETS["micro"] = presets._small((32,), (4, 8), 32)
    return Config(
        data=DataConfig(source="scenes", image_size=(16, 16), cache_latents=True),
        model=ModelConfig(preset="micro", dtype="bfloat16"),
        noise=NoiseConfig(kind="gaussian"),
        train=TrainConfig(batch_size=8),
        vae=VAEConfig(steps=1),
    )


def train_step(topology: str) -> Step:
    return measure._make(get_config(), measure.Target(topology))


def one_chip() -> NamedSharding:
    """Of arrays that are a single v5e's."""
    return NamedSharding(Mesh(np.array(devices(CHIPS["v5e"], "v5e:2x2")[:1]), "x"), P())


def step_too_large() -> Step:
    """Returns 32 GB on a chip that has 16."""
    array = jax.ShapeDtypeStruct((), jnp.float32, sharding=one_chip())
    return Step(jax.jit(lambda x: jnp.full((2**20, 2**13), x)), (array,), 1, 0)
