"""COCO-Stuff, 171 classes: for open vocabularies, which are named at evaluation or prediction.

As configs/ade.py but for data and length, so its checkpoints can be scored on ADE20K with
`evaluate --config configs/ade.py`. It has not been run.
"""

import dataclasses
import runpy
from pathlib import Path

from segdiff_jax.config import Config

STEPS = 80_000


def get_config() -> Config:
    ade = runpy.run_path(str(Path(__file__).with_name("ade.py")))["get_config"]()
    return dataclasses.replace(
        ade,
        data=dataclasses.replace(ade.data, source="coco_stuff", vocabulary="coco_stuff_171"),
        optimizer=dataclasses.replace(ade.optimizer, decay_steps=STEPS),
        train=dataclasses.replace(ade.train, steps=STEPS, eval_every=10_000),
    )
