"""The procedural scenes, from nothing, on a CPU in minutes: what `make demo` runs."""

from segdiff_jax.config import (
    CodecConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    ScenesConfig,
    TrainConfig,
    VAEConfig,
)  # fmt: skip


def get_config() -> Config:
    return Config(
        data=DataConfig(
            source="scenes",
            image_size=(64, 64),
            scenes=ScenesConfig(train_examples=8192, val_examples=48),
        ),
        model=ModelConfig(preset="tiny"),
        codec=CodecConfig(classes_per_pass=1, negatives=0.5),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, decay_steps=4000, final_fraction=0.05, ema_decay=0.998
        ),
        train=TrainConfig(
            steps=4000, batch_size=32, terminal_share=0.5, checkpoint_every=1000, log_every=100
        ),
        vae=VAEConfig(steps=600, batch_size=16, learning_rate=2e-3),
        sampler=SamplerConfig(steps=1, ensemble=1, batch_size=64),
    )
