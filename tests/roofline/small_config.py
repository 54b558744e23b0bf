"""What CI compiles for TPUs: one level, 4 × 4 latents, bfloat16, cached latents."""

from segdiff_jax.config import Config, DataConfig, ModelConfig, NoiseConfig, TrainConfig, VAEConfig
from segdiff_jax.models import presets


def get_config() -> Config:
    presets.PRESETS["micro"] = presets._small((32,), (4, 8), 32)
    return Config(
        data=DataConfig(source="scenes", image_size=(16, 16), cache_latents=True),
        model=ModelConfig(preset="micro", dtype="bfloat16"),
        noise=NoiseConfig(kind="gaussian"),
        train=TrainConfig(batch_size=8),
        vae=VAEConfig(steps=1),
    )
