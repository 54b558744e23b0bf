"""ADE20K in one step: goes on from a training with configs/ade.py, through the VAE's decoder.

    python -m segdiff_jax.train --config configs/ade_e2e.py --workdir W2 \\
        --config.init_from=W --config.data.root=ADE20K

Not tuned: it has not been run. Rate and length are those of arXiv 2409.11355 for depth.
"""

import dataclasses
import runpy
from pathlib import Path

from segdiff_jax.config import Config, E2EConfig, OptimizerConfig, SamplerConfig, TrainConfig


def get_config() -> Config:
    ade = runpy.run_path(str(Path(__file__).with_name("ade.py")))["get_config"]()
    return dataclasses.replace(
        ade,
        stage="e2e",
        init_from="./runs/ade",  # the workdir or an export of the training that it goes on from
        # The decoder's activations of one photo at 512 × 512 are gigabytes.
        model=dataclasses.replace(ade.model, remat=True),
        e2e=E2EConfig(classes=4, noise="zero"),
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=100, decay_steps=20_000),
        # Of four classes each: the 32 maps of a step of configs/ade.py.
        train=TrainConfig(
            steps=20_000,
            batch_size=8,
            checkpoint_every=1000,
            eval_every=5000,
            eval_examples=16,
        ),
        # One step costs what ranking for a shortlist would.
        sampler=SamplerConfig(steps=1, ensemble=1, initial_noise="zero", batch_size=8),
    )
