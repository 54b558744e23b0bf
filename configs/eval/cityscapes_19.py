"""Cityscapes, the 19 train classes."""

import functools

from segdiff_jax.evaluation.open_vocabulary import config_of

get_config = functools.partial(config_of, "cityscapes_19")
