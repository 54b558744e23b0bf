"""CamVid, 11 classes, from nothing on two CPU cores: all stages in under an hour."""

from segdiff_jax.config import (
    AugmentConfig,
    CodecConfig,
    Config,
    DataConfig,
    JointConfig,
    ModelConfig,
    OptimizerConfig,
    PromptsConfig,
    SamplerConfig,
    TrainConfig,
    VAEConfig,
)  # fmt: skip


def get_config() -> Config:
    return Config(
        data=DataConfig(
            source="folder",
            image_size=(96, 128),
            # 367 pairs of a few streets are learnt by heart without other scales and colours.
            augment=AugmentConfig(min_scale=0.8, max_scale=1.5, color_jitter=0.4, views=8),
            cache_images=True,  # for the VAE stage
            cache_latents=True,
        ),
        model=ModelConfig(preset="small"),
        # A pole is never more likely than the house behind it: rare classes would never win.
        codec=CodecConfig(classes_per_pass=1, negatives=0.15, closed=True, logit_adjustment=0.75),
        # To a random text encoder the words of a sentence around the class are only dilution.
        prompts=PromptsConfig(templates=("{class}",)),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=50,
            decay_steps=4000,
            final_fraction=0.1,
            ema_decay=0.998,
        ),
        train=TrainConfig(
            steps=4000,
            batch_size=16,
            terminal_share=0.8,
            balance=0.5,  # half of the classes are thin or rare
            checkpoint_every=500,
            log_every=50,
        ),
        # AdamW learns the faint colours of a street last: docs/results.md.
        vae=VAEConfig(
            steps=1200, batch_size=8, learning_rate=4e-3, optimizer="muon", mask_share=0.375
        ),
        # Latents of 12 × 16 positions have no edges, and nothing that is thin.
        joint=JointConfig(steps=1000, batch_size=4, classes=11),
        sampler=SamplerConfig(steps=1, ensemble=1, batch_size=66, decoder="joint"),
    )
