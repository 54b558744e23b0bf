"""Pascal VOC 2012, 20 classes and background, which the other 39 of Pascal Context stand for."""

import dataclasses

from segdiff_jax.config import Config, DataConfig


def get_config(trained: Config = Config()) -> Config:
    """Return `trained`, the config of a model, with the data of this benchmark."""
    seen = trained.data
    data = DataConfig(
        source="pascal_voc_20b",
        root="VOCdevkit/VOC2012",
        vocabulary="",
        image_size=seen.image_size,
        fit=seen.fit,
    )
    return dataclasses.replace(trained, data=data)
