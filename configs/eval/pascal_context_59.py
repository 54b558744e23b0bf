"""Pascal Context, 59 classes, background ignored."""

import dataclasses

from segdiff_jax.config import Config, DataConfig


def get_config(trained: Config = Config()) -> Config:
    """Return `trained`, the config of a model, with the data of this benchmark."""
    seen = trained.data
    data = DataConfig(
        source="pascal_context_59",
        root="VOCdevkit/VOC2010",
        vocabulary="pascal_context_59",
        image_size=seen.image_size,
        fit=seen.fit,
    )
    return dataclasses.replace(trained, data=data)
