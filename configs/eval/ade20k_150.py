"""ADE20K, 150 classes: the scene parsing benchmark."""

import dataclasses

from segdiff_jax.config import Config, DataConfig


def get_config(trained: Config = Config()) -> Config:
    """Return `trained`, the config of a model, with the data of this benchmark."""
    seen = trained.data
    data = DataConfig(
        source="ade20k",
        root="ADEChallengeData2016",
        vocabulary="ade20k_150",
        image_size=seen.image_size,
        fit=seen.fit,
    )
    return dataclasses.replace(trained, data=data)
