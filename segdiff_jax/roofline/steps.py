"""The functions that training and sampling jit, with abstract arguments in place of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from segdiff_jax import codec, segmenter
from segdiff_jax.conditioning import PromptTable
from segdiff_jax.config import Config
from segdiff_jax.data import scenes, vocabulary
from segdiff_jax.diffusion.schedule import make_schedule
from segdiff_jax.models import presets
from segdiff_jax.models.layers import kernels_as_multiplied
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE, decode_latents
from segdiff_jax.roofline import flops
from segdiff_jax.training import attention_kernels, loop, sharding
from segdiff_jax.training.placement import multiple
from segdiff_jax.training.step import Frozen, diffusion_step, init_state, vae_step

_UNKNOWN_CLASSES = 150  # where only the data would tell: the prompt table is all it changes


class Step(NamedTuple):
    """A jitted function and what to lower it for."""

    function: Any
    arguments: tuple[Any, ...]  # ShapeDtypeStructs with shardings, or static values
    images: float  # per call and all chips: training examples, or segmented images
    model_flops: float  # per call and all chips, what the networks need (flops.py)
    loops: "Loops | None" = None


class Loops(NamedTuple):
    """Loops of a step, whose bodies XLA counts once: one of `length` rounds, and `times` others.

    body: one round of the others, a function by itself; what is not it is the first loop's.
    """

    length: int
    times: int
    body: Step


class Networks(NamedTuple):
    """Abstract networks, as the preset of a config makes them."""

    unet: UNet
    vae: VAE
    text_tokens: int
    text_width: int


def networks(config: Config) -> Networks:
    """What `train` builds for `config`, without arrays.

    `config.init_from` is not read: the architecture is that of `config.model.preset`.
    """
    preset = presets.architecture(config.model.preset)
    unet_config = presets.unet_between(
        config.model.preset, preset.vae.latent_channels, preset.text_encoder.hidden_size
    )
    dtype = jnp.dtype(config.model.dtype)
    unet = nnx.eval_shape(
        lambda: UNet(unet_config, dtype=dtype, remat=config.model.remat, rngs=nnx.Rngs(0))
    )
    vae = nnx.eval_shape(lambda: VAE(preset.vae, dtype=dtype, rngs=nnx.Rngs(0)))
    text = preset.text_encoder
    return Networks(unet, vae, text.max_position_embeddings, text.hidden_size)


def class_count(config: Config) -> int:
    """K of the configured vocabulary; 150 where it is known only to the data."""
    if config.data.vocabulary:
        return len(vocabulary.load(config.data.vocabulary))
    return len(scenes.vocabulary()) if config.data.source == "scenes" else _UNKNOWN_CLASSES


def train_step(config: Config, mesh: jax.sharding.Mesh) -> Step:
    """The step of `config.stage`, as `training.loop` compiles it."""
    nets = networks(config)
    attention = attention_kernels.on_mesh(mesh)
    vae_graph, vae_params = nnx.split(attention_kernels.with_attention(nets.vae, attention))
    if config.stage == "vae":
        params, frozen = vae_params, None
        step = vae_step(vae_graph, config, mesh)
    else:
        graph, params = nnx.split(attention_kernels.with_attention(nets.unet, attention))
        frozen = sharding.abstract(
            Frozen(vae_params, _schedule(config), _table(nets, class_count(config))),
            sharding.replicated(mesh),
        )
        step = diffusion_step(graph, vae_graph, config, mesh)
    state = jax.eval_shape(lambda p: init_state(p, config), params)
    state = sharding.abstract(state, sharding.state_sharding(state, mesh))
    batch = sharding.abstract(train_batch(config, nets), sharding.batch_sharding(mesh))
    key = sharding.abstract(_key(), sharding.replicated(mesh))
    function = loop.compile_step(step, state, mesh)
    count = config.train.batch_size
    total = count * _train_flops(config, nets)
    return Step(function, (state, frozen, batch, key), count, total)


def train_batch(config: Config, nets: Networks) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch of the pipeline, or of the latent cache where the config trains from one."""
    count, (height, width) = config.train.batch_size, config.data.image_size
    group = codec.group_size(class_count(config), config.codec.classes_per_pass)
    ids = jax.ShapeDtypeStruct((count, group), jnp.int32)
    if config.data.cache_latents and config.stage != "vae":
        small = (count, *_latent_size(config, nets))
        latent = jax.ShapeDtypeStruct((*small, nets.vae.config.latent_channels), jnp.float32)
        positions = jax.ShapeDtypeStruct(small, jnp.bool_)
        return {
            "image_latents": latent,
            "mask_latents": latent,
            "shown": positions,
            "valid": positions,
            "class_ids": ids,
        }
    image = jax.ShapeDtypeStruct((count, height, width, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((count, height, width), jnp.uint8)
    return {"image": image, "labels": labels, "class_ids": ids}


def sample_step(config: Config, mesh: jax.sharding.Mesh, images: int, classes: int) -> Step:
    """The sampler on all passes and members of `images` at once.

    Their number is padded to a multiple of the chips, as the segmenter pads to its batch.
    """
    jobs = multiple(images * _passes(config, classes) * config.sampler.ensemble, mesh.size)
    return _sampler(config, mesh, images, classes, jobs, images)


def evaluate_step(config: Config, mesh: jax.sharding.Mesh) -> Step:
    """The sampler on `sampler.batch_size` jobs, the chunk that `evaluate` works in.

    The images a chunk is worth are its UNet calls over those that an image needs; a shortlist
    needs one call per pass, and the full budget for its classes only.
    """
    classes, sampler = class_count(config), config.sampler
    passes = _passes(config, classes)
    full = min(sampler.shortlist, passes) or passes
    cheap = passes if full < passes else 0
    calls = cheap + full * sampler.ensemble * sampler.steps
    jobs = multiple(sampler.batch_size, mesh.size)
    worth = jobs * sampler.steps / calls
    return _sampler(config, mesh, max(1, round(worth)), classes, jobs, worth)


def _passes(config: Config, classes: int) -> int:
    return codec.num_groups(classes, codec.group_size(classes, config.codec.classes_per_pass))


def _sampler(
    config: Config, mesh: jax.sharding.Mesh, images: int, classes: int, jobs: int, worth: float
) -> Step:
    """The segmenter's sampler: whole parameters on every chip, jobs spread over the mesh."""
    nets, whole = networks(config), sharding.replicated(mesh)
    rows = sharding.rows_sharding(mesh)
    attention = attention_kernels.on_device(mesh.devices.flat[0].platform)
    unet_graph, unet_params = nnx.split(attention_kernels.with_attention(nets.unet, attention))
    vae_graph, vae_params = nnx.split(nets.vae)
    group = codec.group_size(classes, config.codec.classes_per_pass)
    latent = (*_latent_size(config, nets), nets.vae.config.latent_channels)
    everywhere = (
        kernels_as_multiplied(unet_graph, unet_params),
        vae_params,
        _schedule(config),
        _table(nets, classes),
        jax.ShapeDtypeStruct((images, *latent), jnp.float32),
        jax.ShapeDtypeStruct((_passes(config, classes), group), jnp.int32),
    )
    arrays = (
        *(sharding.abstract(tree, whole) for tree in everywhere),
        sharding.abstract(jax.ShapeDtypeStruct((jobs, 3), jnp.int32), rows),
        sharding.abstract(_key(), whole),
    )
    sampler = config.sampler
    static = (unet_graph, vae_graph, config.codec.context, sampler.steps, sampler.eta)
    count = flops.unet_count(config, nets.unet.config, nets.vae.config, classes, nets.text_tokens)
    decoding = _decoding(config, nets, mesh)
    total = jobs * (decoding.model_flops / mesh.size + sampler.steps * count.forward)
    loops = Loops(sampler.steps, jobs // mesh.size, decoding)
    return Step(segmenter.sampler_on(mesh), (*static, *arrays), worth, total, loops)


def _decoding(config: Config, nets: Networks, mesh: jax.sharding.Mesh) -> Step:
    """The loop in which the sampler decodes, one job a chip at a time.

    On every chip by itself, as there: where the partitioner cuts the batch, XLA makes another
    program of it, which accesses more than the whole sampler does.
    """
    rows, (graph, params) = sharding.rows_sharding(mesh), nnx.split(nets.vae)
    shape = (mesh.size, *_latent_size(config, nets), nets.vae.config.latent_channels)

    def decode(params, latents):
        return segmenter.to_gray(decode_latents(nnx.merge(graph, params), latents))

    cut = jax.shard_map(
        decode, mesh=mesh, in_specs=(P(), rows.spec), out_specs=rows.spec, check_vma=False
    )
    arguments = (
        sharding.abstract(params, sharding.replicated(mesh)),
        sharding.abstract(jax.ShapeDtypeStruct(shape, jnp.float32), rows),
    )
    needed = mesh.size * flops.vae_decode(nets.vae.config, *config.data.image_size)
    function = jax.jit(cut)
    return Step(function, arguments, mesh.size, needed)


def _train_flops(config: Config, nets: Networks) -> float:
    """Of one example."""
    unet = nets.unet.config if config.stage != "vae" else None
    classes = class_count(config)
    return flops.train_example(config, unet, nets.vae.config, classes, nets.text_tokens)


def _schedule(config: Config) -> Any:
    return jax.eval_shape(lambda: make_schedule(config.diffusion))


def _table(nets: Networks, classes: int) -> PromptTable:
    hidden: Any = jax.ShapeDtypeStruct((classes, nets.text_tokens, nets.text_width), jnp.float32)
    pooled: Any = jax.ShapeDtypeStruct((classes, nets.text_width), jnp.float32)
    return PromptTable(hidden, pooled)


def _latent_size(config: Config, nets: Networks) -> tuple[int, int]:
    height, width = config.data.image_size
    return height // nets.vae.config.downsampling, width // nets.vae.config.downsampling


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))
