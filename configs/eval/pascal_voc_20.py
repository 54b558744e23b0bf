"""Pascal VOC 2012, 20 classes, background ignored."""

import dataclasses

from segdiff_jax.config import Config, DataConfig


def get_config(trained: Config = Config()) -> Config:
    """Return `trained`, the config of a model, with the data of this benchmark."""
    seen = trained.data
    data = DataConfig(
        source="pascal_voc",
        root="VOCdevkit/VOC2012",
        vocabulary="pascal_voc_20",
        image_size=seen.image_size,
        fit=seen.fit,
    )
    return dataclasses.replace(trained, data=data)
