"""Drawn scenes, from nothing, on two CPU cores in nine minutes: what `make demo` runs."""

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
    ScenesConfig,
    TrainConfig,
    VAEConfig,
)  # fmt: skip


def get_config() -> Config:
    return Config(
        data=DataConfig(
            source="scenes",
            image_size=(64, 64),
            scenes=ScenesConfig(train_examples=3072, val_examples=48, max_shapes=2),
            augment=AugmentConfig(flip=False),  # twice the cache would take longer than it gives
            cache_images=True,
            cache_latents=True,
        ),
        model=ModelConfig(preset="tiny"),
        codec=CodecConfig(classes_per_pass=1, negatives=0.3),
        # To a random text encoder the words of a sentence around the class are only dilution.
        prompts=PromptsConfig(templates=("{class}",)),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=50,
            decay_steps=1200,
            final_fraction=0.1,
            ema_decay=0.99,
        ),
        train=TrainConfig(
            steps=1200,
            batch_size=16,
            terminal_share=0.9,
            balance=0.5,
            checkpoint_every=400,
            log_every=50,
        ),
        # What it blurs the UNet cannot tell apart. AdamW learns colours last: docs/results.md.
        vae=VAEConfig(
            steps=450, batch_size=12, learning_rate=4e-3, optimizer="muon", mask_share=0.375
        ),
        # Eight pixels a latent: the photo has the edges, and what of colours the latents lost.
        joint=JointConfig(steps=800, batch_size=4),
        # Two shapes and what lies behind them are three classes; what is not likely gets one look.
        sampler=SamplerConfig(steps=1, ensemble=2, shortlist=6, decoder="joint", batch_size=100),
    )
