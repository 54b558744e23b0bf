"""Pascal VOC 2012, 20 classes and background, which the other 39 of Pascal Context stand for."""

import functools

from segdiff_jax.evaluation.open_vocabulary import config_of

get_config = functools.partial(config_of, "pascal_voc_20b")
