"""CamVid, 11 classes, as a folder of images and masks."""

import functools

from segdiff_jax.evaluation.open_vocabulary import config_of

get_config = functools.partial(config_of, "camvid_11")
