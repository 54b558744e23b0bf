"""The full ADE20K, 847 classes.

Images and labels are shrunk to a short side of 512, as in the papers.
"""

import dataclasses

from segdiff_jax.config import Config, DataConfig


def get_config(trained: Config = Config()) -> Config:
    """Return `trained`, the config of a model, with the data of this benchmark."""
    seen = trained.data
    data = DataConfig(
        source="ade20k_847",
        root="ADE20K_2021_17_01",
        vocabulary="ade20k_847",
        shortest=512,
        image_size=seen.image_size,
        fit=seen.fit,
    )
    return dataclasses.replace(trained, data=data)
