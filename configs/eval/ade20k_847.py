"""The full ADE20K, 847 classes.

Images and labels are shrunk to a short side of 512, as in the papers.
"""

import functools

from segdiff_jax.evaluation.open_vocabulary import config_of

get_config = functools.partial(config_of, "ade20k_847")
