"""COCO-Stuff, 171 classes."""

import functools

from segdiff_jax.evaluation.open_vocabulary import config_of

get_config = functools.partial(config_of, "coco_stuff_171")
