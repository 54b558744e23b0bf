"""The procedural scenes, from nothing, on a CPU in minutes: what `make demo` runs."""

from segdiff_jax.config import (
    CodecConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PromptsConfig,
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
        codec=CodecConfig(classes_per_pass=1, negatives=0.3),
        # To a random text encoder the words of a sentence around the class are only dilution.
        prompts=PromptsConfig(templates=("{class}",)),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=50,
            decay_steps=1500,
            final_fraction=0.1,
            ema_decay=0.99,
        ),
        train=TrainConfig(
            steps=1500, batch_size=16, terminal_share=0.8, checkpoint_every=500, log_every=50
        ),
        vae=VAEConfig(steps=450, batch_size=16, learning_rate=2.5e-3, mask_share=0.25),
        sampler=SamplerConfig(steps=1, ensemble=4, batch_size=100),
    )
