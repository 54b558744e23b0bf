"""Pascal VOC 2012, 21 classes, asked for "background" by its name."""

import functools

from segdiff_jax.evaluation.open_vocabulary import config_of

get_config = functools.partial(config_of, "pascal_voc_21")
