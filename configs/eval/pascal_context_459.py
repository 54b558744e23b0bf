"""Pascal Context, all 459 classes."""

import dataclasses

from segdiff_jax.config import Config, DataConfig


def get_config(trained: Config = Config()) -> Config:
    """Return `trained`, the config of a model, with the data of this benchmark."""
    seen = trained.data
    data = DataConfig(
        source="pascal_context_459",
        root="VOCdevkit/VOC2010",
        vocabulary="pascal_context_459",
        image_size=seen.image_size,
        fit=seen.fit,
    )
    return dataclasses.replace(trained, data=data)
