"""CamVid, 11 classes, from nothing on one NVIDIA card: six times the pixels of configs/camvid.py.

    python -m segdiff_jax.train --config configs/camvid_gpu.py --workdir W --config.data.root=CAMVID
    python -m segdiff_jax.evaluate --config configs/camvid_gpu.py --checkpoint W \\
        --config.data.root=CAMVID --output O

Meant for eight minutes on an H100. It has not been run on one: lengths are those of
configs/camvid.py times what larger batches should give.
"""

import dataclasses
import runpy
from pathlib import Path

from segdiff_jax.config import Config, JointConfig


def get_config() -> Config:
    cpu = runpy.run_path(str(Path(__file__).with_name("camvid.py")))["get_config"]()
    return dataclasses.replace(
        cpu,
        data=dataclasses.replace(cpu.data, image_size=(240, 320)),
        model=dataclasses.replace(cpu.model, dtype="bfloat16"),
        optimizer=dataclasses.replace(cpu.optimizer, decay_steps=8000),
        train=dataclasses.replace(cpu.train, steps=8000, batch_size=32),
        vae=dataclasses.replace(cpu.vae, steps=1500, batch_size=16),
        joint=JointConfig(steps=1500, batch_size=16, classes=11),
        sampler=dataclasses.replace(cpu.sampler, batch_size=352),
    )
