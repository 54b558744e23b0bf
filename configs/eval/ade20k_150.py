"""ADE20K, 150 classes: the scene parsing benchmark."""

import functools

from segdiff_jax.evaluation.open_vocabulary import config_of

get_config = functools.partial(config_of, "ade20k_150")
