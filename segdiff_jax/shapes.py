"""Names for the arrays of the mathematics, with their types and shapes.

In production they are documentation only. In the tests they are checked at every call of a function
that they annotate (an import hook in tests/conftest.py): an axis that has a name has one size
throughout the arguments and the result of a call.
"""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Integer, Key, Num

if TYPE_CHECKING:
    Array = jax.Array
    Leaf = jax.Array
else:
    Array = jax.Array | np.ndarray  # functions of JAX take both
    Leaf = Any  # of a pytree, which JAX rebuilds around whatever stands in for arrays

Latents = Float[Array, "B h w c"]  # mask or photo latents, at 1/f of the pixels' size
ConditionedLatents = Float[Array, "B h w c_in"]  # mask latents beside photo latents
Sample = Float[Array, "*shape"]  # x_t, x_0, noise or prediction: one shape in a call
Timesteps = Num[Array, "B"]  # 0 ... T - 1
Keys = Key[Array, "J"]  # one random key for each job of the sampler

Pixels = Float[Array, "B H W C"]  # in [-1, 1]; photos and masks have three channels
Tokens = Integer[Array, "B L"]
Context = Float[Array, "B L D"]  # what cross-attention reads
ContextMask = Bool[Array, "B L"]  # False for tokens that no query may see
HeadQueries = Float[Array, "B S N D"]  # S queries of N heads
HeadKeys = Float[Array, "B L N D"]

Labels = Integer[Array, "*map"]  # [..., H, W]
PixelMask = Bool[Array, "*map"]
ClassIds = Integer[Array, "G"]  # of one pass, in level order
GroupIds = Integer[Array, "*batch G"]  # the same for every example
Levels = Float[Array, "G"]
GrayMap = Float[Array, "*map"]  # [..., H, W], the gray image of a pass, about [-1, 1]
ClassMaps = Float[Array, "B K H W"]  # gray maps or logits of K classes asked of each photo
ClassText = Float[Array, "B K D"]  # their pooled prompts
Features = Float[Array, "B h w c"]  # of photos, in blocks of pixels

Members = Float[Array, "N H W"]  # gray maps of an ensemble, in [0, 1]
MergedMap = Float[Array, "H W"]
PerMember = Float[Array, "N"]

NoiseGrid = Float[Array, "h w c"]
