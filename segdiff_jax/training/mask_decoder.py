"""Fits the linear decoder of mask latents when a training ends: in seconds, from its own masks."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from segdiff_jax import codec, files
from segdiff_jax.config import Config
from segdiff_jax.data import pipeline
from segdiff_jax.data.sources.source import Source
from segdiff_jax.models import linear_decoder
from segdiff_jax.models.linear_decoder import LinearDecoder
from segdiff_jax.models.vae import VAE, encode_latents
from segdiff_jax.parallel import processes
from segdiff_jax.weights import loading, mask_decoders
from segdiff_jax.weights import workdir as workdirs

_POSITIONS = 50_000  # of latents: hundreds for each of the unknowns
_MASKS = 128, 1000  # at least and at most
_AT_ONCE = 8  # masks in one call of the VAE

log = logging.getLogger(__name__)


def settle(config: Config, workdir: str, source: Source) -> None:
    """Write `linear_decoder.safetensors` into a workdir that has none. All processes call this."""
    path = epath.Path(workdir) / mask_decoders.LINEAR
    if processes.is_first() and not path.exists():
        start = time.monotonic()
        with processes.at_work("fits the linear decoder"):
            dtype = jnp.dtype(config.model.dtype)
            vae, *_ = loading.load_frozen(str(epath.Path(workdir) / workdirs.PRETRAINED), dtype)
            decoder = fit(vae, config, source)
            files.write_bytes(path, mask_decoders.linear_to_bytes(decoder))
        log.info("%s: fitted in %.1f s", path, time.monotonic() - start)
    processes.barrier()


def fit(vae: VAE, config: Config, source: Source) -> LinearDecoder:
    """Fit the linear map from latents of the training's gray masks to those masks."""
    height, width = (pixels // vae.config.downsampling for pixels in config.data.image_size)
    least, most = _MASKS
    count = min(max(_POSITIONS // (height * width), least), most)
    graph, params = nnx.split(vae)

    @jax.jit
    def encode(params, labels, class_ids):
        images = codec.mask_images(labels, class_ids)
        return encode_latents(nnx.merge(graph, params), images), images[..., 0]

    # An absent class gives an empty mask, of which few are enough.
    shown = dataclasses.replace(config, codec=dataclasses.replace(config.codec, negatives=0.1))
    shown = pipeline.with_batch_size(shown, _AT_ONCE)

    def batches() -> Iterator[tuple[jax.Array, jax.Array]]:
        drawn = pipeline.train_batches(source, shown, config.seed)
        with contextlib.closing(drawn):
            for _ in range(-(-count // _AT_ONCE)):
                rows = next(drawn)
                yield encode(params, rows["labels"], rows["class_ids"])

    return linear_decoder.fit(batches())
