"""Maps of classes made sharp by the photo: a light decoder that sees both.

A latent of eight pixels has no edges, and shows nothing thin. Beside the maps that the UNet's
latents give, this decoder looks at the photo itself (as joint upsampling does), once for all
classes, and adds to the logit of each class what the photo says of it:

    photo [B, H, W, 3] ─► features [B, H/2, W/2, 64] ─┐
    text  [K, D]       ─► query of each class ────────┴► product ─► details [B, K, H, W]
    maps  [B, K, H, W] ─────────────────────► scale × map + detail = logit ─► maps [B, K, H, W]

A new decoder has details of 0 and leaves the order of the classes as it is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segdiff_jax.models.layers import Dtype, GroupNorm, conv, linear
from segdiff_jax.shapes import ClassMaps, ClassText, Features, Pixels

# Of one unit of gray. A class is certain at gray 1 with the others at -1, where the softmax gives
# it 0.99: what is left drives no map beyond the range of masks, as it would if one unit were one
# logit (0.6), nor is it deaf to errors of a tenth of that range.
LOGITS_PER_GRAY = 5.0
BLOCK = 2  # pixels along a side that share their features
WIDTH, _GROUPS = 64, 8
DILATIONS = 1, 2, 4, 8, 1


class Head(NamedTuple):
    """What turns features, text and maps into logits."""

    kernel: Any  # [D, 4 · 64]: from a text vector to what to look for in the pixels of a block
    bias: Any  # [4 · 64]
    scale: Any  # logits of one unit of gray


class JointDecoder(nnx.Module):
    """What a photo adds to the maps of classes that are named by text vectors of `text_width`."""

    def __init__(self, text_width: int, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs):
        kw: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.conv_in = conv(3 * BLOCK**2, WIDTH, 1, **kw)
        self.norms = nnx.List(GroupNorm(WIDTH, _GROUPS, 1e-5) for _ in DILATIONS)
        self.convs = nnx.List(
            conv(WIDTH, WIDTH, padding=(d, d), kernel_dilation=d, **kw) for d in DILATIONS
        )
        self.query = linear(text_width, BLOCK**2 * WIDTH, zero=True, rngs=rngs)
        self.scale = nnx.Param(jnp.asarray(LOGITS_PER_GRAY))

    def features(self, pixels: Pixels) -> Features:
        """See pixels [B, H, W, 3] in [-1, 1], H and W even, as float32 [B, H/2, W/2, 64]."""
        batch, height, width, channels = pixels.shape
        down, across = height // BLOCK, width // BLOCK
        blocks = pixels.reshape(batch, down, BLOCK, across, BLOCK, channels).swapaxes(2, 3)
        x = self.conv_in(blocks.reshape(batch, down, across, -1))
        for norm, layer in zip(self.norms, self.convs, strict=True):
            x = x + jax.nn.relu(layer(norm(x)))
        return x.astype(jnp.float32)

    def logits(self, pixels: Pixels, text: ClassText, maps: ClassMaps) -> ClassMaps:
        """Return the logits of classes [B, K, H, W], as `logits` does, of a photo's `pixels`."""
        return logits(self.head(), self.features(pixels), text, maps)

    def head(self) -> Head:
        bias = self.query.bias
        assert bias is not None
        return Head(self.query.kernel[...], bias[...], self.scale[...])


def logits(head: Head, features: Any, text: Any, maps: Any) -> Any:
    """Return the logits of classes [B, K, H, W].

    Numpy in, numpy out, so that nothing is compiled for another number of classes.

    Args:
      features: of the photo, [B, H/2, W/2, 64].
      text: the vector of each class [B, K, D].
      maps: of the classes, unclipped [B, K, H, W].
    """
    xp: Any = np if isinstance(features, np.ndarray) else jnp
    batch, height, width, channels = features.shape
    queries = (text @ head.kernel + head.bias).reshape(batch, -1, channels)  # [B, K · 4, 64]
    flat = features.reshape(batch, height * width, channels)
    found = xp.matmul(queries, xp.swapaxes(flat, 1, 2))  # [B, K · 4, h · w]
    blocks = found.reshape(batch, -1, BLOCK, BLOCK, height, width).transpose(0, 1, 4, 2, 5, 3)
    return head.scale * maps + blocks.reshape(maps.shape)


def to_maps(logits: Any) -> Any:
    """Return gray maps in [-1, 1] whose scores, (m + 1) / 2, are the logistic of the logits."""
    xp: Any = np if isinstance(logits, np.ndarray) else jnp
    return xp.tanh(logits / 2.0)
