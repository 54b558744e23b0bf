"""The networks of a run: given by `init_from`, made anew, or stored in its workdir already."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax import codec
from segdiff_jax.config import Config
from segdiff_jax.data import pipeline
from segdiff_jax.data.sources.source import Source
from segdiff_jax.errors import UserError
from segdiff_jax.models import presets
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE
from segdiff_jax.parallel import attention_kernels, processes
from segdiff_jax.parallel.placement import placer
from segdiff_jax.text import conditioning
from segdiff_jax.text.conditioning import prompts
from segdiff_jax.text.tokenizer import Tokenizer, train_tokenizer
from segdiff_jax.text.vocabulary import Vocabulary
from segdiff_jax.training import origin
from segdiff_jax.weights import loading, pretrained
from segdiff_jax.weights import workdir as workdirs
from segdiff_jax.weights.checkpoint import Checkpoints
from segdiff_jax.weights.tensors import shapes_of

_SCALING_EXAMPLES = 64

Build = Callable[..., nnx.Module]  # takes rngs


def vae_to_train(config: Config, mesh: Mesh) -> tuple[VAE, Build | None]:
    """Return the VAE of `init_from` on the mesh; without one, shapes and what builds it."""
    if config.init_from:
        folder = origin.folder(config.init_from)
        variant = config.init_variant or None
        found = pretrained.load(folder, ("vae",), variant=variant, place=placer(mesh)).vae
        assert found is not None
        return found, None
    architecture = presets.architecture(config.model.preset).vae
    dtype = jnp.dtype(config.model.dtype)
    build = functools.partial(VAE, architecture, dtype=dtype)
    return shapes_of(build), build


def unet_to_train(
    config: Config, mesh: Mesh, start: UNet | UNetConfig
) -> tuple[UNet, Build | None]:
    """Return `start` as this run uses it; of a config shapes, and what builds the network."""
    build = functools.partial(
        UNet,
        start.config if isinstance(start, UNet) else start,
        attention=attention_kernels.on_mesh(mesh),
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        zero_init=config.model.zero_init,
    )
    unet = shapes_of(build)
    if isinstance(start, UNet):
        return nnx.merge(nnx.graphdef(unet), nnx.state(start)), None
    return unet, build


def start_of_unet(config: Config, workdir: str, mesh: Mesh) -> UNet | UNetConfig | None:
    """Return what `init_from` says of the UNet: its weights, or what this run's checkpoints are of.

    What these replace is not read. None where `init_from` has no UNet.
    """
    return _saved_unet_config(config, workdir) or _given_unet(config, mesh)


def _saved_unet_config(config: Config, workdir: str) -> UNetConfig | None:
    """Read the architecture in the checkpoints of a run with `init_from`, if it has any."""
    folder = epath.Path(workdir) / workdirs.CHECKPOINTS
    if not config.init_from or not processes.all_agree(folder.exists()):
        return None
    with Checkpoints(folder, read_only=True) as checkpoints:
        if checkpoints.latest_step() is None:
            return None
        return loading.unet_config_from(checkpoints.metadata(), str(folder))


def _given_unet(config: Config, mesh: Mesh) -> UNet | None:
    """Load the UNet of `init_from`, if it has one: a workdir with one, or a pretrained folder.

    Its arrays are read straight to where the mesh wants them.
    """
    if not config.init_from:
        return None
    if not workdirs.is_workdir(config.init_from):
        return pretrained.load(
            config.init_from,
            ("unet",),
            variant=config.init_variant or None,
            dtype=jnp.dtype(config.model.dtype),
            widen_conv_in=True,
            place=placer(mesh),
        ).unet
    if workdirs.read_config(config.init_from).stage == "vae":
        return None
    return loading.load_unet(config.init_from, mesh=mesh)[0]


def new_text(config: Config, vocabulary: Vocabulary) -> tuple[CLIPText, Tokenizer]:
    """Make a tokenizer that knows the vocabulary's words, and a random encoder for it."""
    tokenizer = _new_tokenizer(config, vocabulary)
    architecture = presets.architecture(config.model.preset).text_encoder
    fitted = dataclasses.replace(architecture, vocab_size=tokenizer.vocab_size)
    build = nnx.jit(lambda: CLIPText(fitted, rngs=nnx.Rngs(config.seed)))
    return build(), tokenizer


def _new_tokenizer(config: Config, vocabulary: Vocabulary) -> Tokenizer:
    architecture = presets.architecture(config.model.preset).text_encoder
    templates = config.prompts.templates
    sentences = [text for entry in vocabulary.classes for text in prompts(entry, templates)]
    return train_tokenizer(sentences, architecture.vocab_size, architecture.max_position_embeddings)


def check_prompts(config: Config, vocabulary: Vocabulary) -> None:
    """Raise, before the VAE's training, what would stop the training after it."""
    tokenizer = _new_tokenizer(config, vocabulary)
    conditioning.prompt_ids(tokenizer, vocabulary.classes, config.prompts.templates)


def with_scaling(vae: VAE, config: Config, source: Source) -> VAE:
    """Return `vae` with the scaling factor that gives training latents unit variance."""
    sized = pipeline.with_batch_size(config, _SCALING_EXAMPLES)
    drawn = pipeline.train_batches(source, sized, config.seed)
    with contextlib.closing(drawn) as batches:
        rows = next(batches)
    batch: dict[str, Any] = {name: jnp.asarray(values) for name, values in rows.items()}
    masks = codec.mask_images(batch["labels"], batch["class_ids"])
    pixels = jnp.concatenate([codec.to_pixels(batch["image"]), masks])
    graph, params = nnx.split(vae)
    mean, _ = jax.jit(lambda p, x: nnx.merge(graph, p).encode(x))(params, pixels)
    spread = float(np.std(mean))
    if not 1e-4 <= spread <= 1e4:  # what `read_vae` takes for a scale
        raise UserError(
            f"the VAE that was trained gives latents of standard deviation {spread:g}: it has not "
            "learnt its images: give config.vae more steps, or another learning_rate"
        )
    vae.config = dataclasses.replace(vae.config, scaling_factor=1.0 / spread)
    return vae
