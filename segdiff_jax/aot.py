"""What a TPU would make of a config: `python -m segdiff_jax.aot --config C --topology v5e:4x4`.

config, topology ─► the step that train or the segmenter jits, on shapes with shardings
                 ─► `parallel.roofline`: what the compiler makes of it, on one chip and at its peaks
                 ─► a table, or the largest batch that fits
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax import cli, codec, files
from segdiff_jax.combinations import check_image_size
from segdiff_jax.config import Config, to_dict
from segdiff_jax.data.sources import scenes
from segdiff_jax.diffusion.schedule import make_schedule
from segdiff_jax.errors import UserError
from segdiff_jax.inference import sampling
from segdiff_jax.models import flops, presets
from segdiff_jax.models.attention import AttentionFn, plain
from segdiff_jax.models.layers import kernels_as_multiplied
from segdiff_jax.models.linear_decoder import LinearDecoder
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE
from segdiff_jax.parallel import attention_kernels, chips, rules
from segdiff_jax.parallel import mesh as meshes
from segdiff_jax.parallel.placement import multiple
from segdiff_jax.parallel.roofline import Step, measure
from segdiff_jax.stages import of_stage
from segdiff_jax.text import vocabulary
from segdiff_jax.text.conditioning import PromptTable, context
from segdiff_jax.training.losses import Frozen
from segdiff_jax.training.step import diffusion_step, e2e_step, init_state, jitted, vae_step
from segdiff_jax.weights.tensors import shapes_of

_DESCRIPTION = """Compile the step of a config for TPUs that are not here. Printed per chip: whether
it fits, memory by part, FLOPs, bytes accessed, collectives, and the roofline that follows.

The function is the one that train (or the segmenter) jits; its arguments are shapes. No data, no
weights and no TPU are needed, but pip install 'jax[tpu]' and, for Stable Diffusion 2, some 15 GB of
memory and 5 to 10 minutes; --search compiles once for every batch that it tries. The architecture
is config.model.preset, whatever config.init_from names. docs/performance.md says what they mean."""

_GIB = 2**30
_UNKNOWN_CLASSES = 150  # where only the data would tell: the prompt table is all it changes


class _Networks(NamedTuple):
    """Abstract networks, as train builds them, and the sizes that follow from a config."""

    unet: UNet
    vae: VAE
    table: PromptTable  # of all classes
    group: int  # classes per pass
    tokens: int  # of the context
    latent: tuple[int, int, int]  # h, w, c


def main(argv: list[str]) -> None:
    overrides, rest = cli.split_config_flags(argv)
    args = _parser().parse_args(rest)
    if not any(flag.startswith(f"{cli.PREFIX}data.root=") for flag in overrides):
        overrides = [f"{cli.PREFIX}data.root=unused", *overrides]  # no data is read
    config = of_stage(cli.load_config(args.config, overrides))
    jax.config.update("jax_platforms", "cpu")  # the compiler needs no device
    jax.config.update("jax_enable_compilation_cache", False)  # only devices can load what it holds
    chip, devices = chips.stand_ins(args.topology, args.slices)
    if args.json:
        files.check_writable(os.path.dirname(args.json) or ".")  # now, not after the compilation
    if args.price is not None:
        if not 0 <= args.price < math.inf:
            raise UserError(f"--price {args.price}: must be a number of dollars, at least 0")
        chip = dataclasses.replace(chip, price=args.price)
    mesh = meshes.make_mesh(config.mesh, devices)
    parts = meshes.batch_parts(mesh) if args.step == "train" else mesh.size  # of a batch

    def report(config: Config) -> dict[str, Any]:
        step = make_step(config, mesh, args.step, args.classes)
        steps = config.train.steps if args.step == "train" else None
        return {
            "topology": args.topology,
            "slices": args.slices,
            "chips": mesh.size,
            "mesh": dict(mesh.shape),
            "step": args.step,
            "batch_per_chip": step.batch / parts,
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
            "config": to_dict(config),
            **measure(step, chip, mesh.size, steps),
        }

    made = _search(config, parts, args.step, report) if args.search else report(config)
    print(_table(made))
    if args.json:
        files.write_json(args.json, made)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("segdiff_jax.aot", _DESCRIPTION, cli.config_help())
    add = parser.add_argument
    add("--config", required=True, type=cli.path, metavar="FILE", help="file with get_config()")
    shapes = f"{', '.join(chips.CHIPS)} and the shape of a slice, such as v5e:4x4 or v5p:2x2x2"
    add("--topology", required=True, metavar="CHIP:SHAPE", help=shapes)
    add("--slices", type=cli.positive_int, default=1, metavar="N", help="slices of it (1)")
    kinds = "a training step, or config.sampler.batch_size jobs of the sampler at once (train)"
    add("--step", choices=("train", "sample"), default="train", help=kinds)
    asked = "about which --step sample asks an image (the config's vocabulary)"
    add("--classes", type=cli.positive_int, metavar="K", help=asked)
    add("--price", type=float, metavar="DOLLARS", help="per chip and hour (a list price)")
    add("--json", type=cli.file, metavar="FILE", help="also write the report here")
    add("--search", action="store_true", help="find the largest batch per chip that fits")
    return parser


def make_step(config: Config, mesh: Mesh, kind: str = "train", classes: int | None = None) -> Step:
    """Return the step of `kind`, "train" or "sample", as it is jitted for `mesh`.

    classes: K that the sampler is asked about; by default the config's vocabulary, or 150 where
    only the data would tell. Raises `UserError` for a batch that does not divide over the mesh.
    """
    named = config.data.vocabulary
    if classes is None and (named or config.data.source == "scenes"):
        classes = len(vocabulary.load(named) if named else scenes.vocabulary())
    nets = _networks(config, classes or _UNKNOWN_CLASSES, attention_kernels.on_mesh(mesh))
    return (_train_step if kind == "train" else _sample_step)(config, nets, mesh)


def _networks(config: Config, classes: int, attention: AttentionFn) -> _Networks:
    preset, dtype = presets.architecture(config.model.preset), jnp.dtype(config.model.dtype)
    check_image_size(config, preset.vae.downsampling, f"model.preset={config.model.preset!r}")
    text, channels = preset.text_encoder, preset.vae.latent_channels
    unet_config = presets.unet_between(config.model.preset, channels, text.hidden_size)
    kw: Any = {"attention": attention, "dtype": dtype}
    unet = shapes_of(functools.partial(UNet, unet_config, remat=config.model.remat, **kw))
    vae = shapes_of(functools.partial(VAE, preset.vae, **kw))
    hidden = _floats(classes, text.max_position_embeddings, text.hidden_size)
    table = PromptTable(hidden, _floats(classes, text.hidden_size))
    group = codec.group_size(classes, config.codec.classes_per_pass)
    tokens = group if config.codec.context == "bound" else text.max_position_embeddings
    height, width = (size // preset.vae.downsampling for size in config.data.image_size)
    return _Networks(unet, vae, table, group, tokens, (height, width, channels))


def _floats(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _linear_decoder(nets: _Networks) -> LinearDecoder:
    channels, pixels = nets.latent[-1], nets.vae.config.downsampling**2
    return LinearDecoder(_floats(3, 3, channels, pixels), _floats(pixels))


def _train_step(config: Config, nets: _Networks, mesh: Mesh) -> Step:
    """Return the step of config.stage as `training.run` compiles it."""
    meshes.check_batches(mesh, config)  # as train does, for its errors
    vae, vae_params = nnx.split(nets.vae)
    if config.stage == "vae":
        params, frozen, step = vae_params, None, vae_step(vae, config, mesh)
    else:
        unet, params = nnx.split(nets.unet)
        single = config.stage == "e2e"
        linear = _linear_decoder(nets) if single and config.e2e.decoder == "linear" else None
        schedule = jax.eval_shape(lambda: make_schedule(config.diffusion))
        frozen = Frozen(vae_params, schedule, nets.table, linear)
        step = (e2e_step if single else diffusion_step)(unet, vae, config, mesh)
    state = jax.eval_shape(lambda p: init_state(p, config), params)
    state = meshes.abstract(state, rules.state_sharding(state, mesh))
    whole = meshes.replicated(mesh)
    arguments = (
        state,
        meshes.abstract(frozen, whole),
        meshes.abstract(_train_batch(config, nets), meshes.batch_sharding(mesh)),
        meshes.abstract(jax.eval_shape(lambda: jax.random.key(0)), whole),
    )
    unet_config = None if config.stage == "vae" else nets.unet.config
    needed = flops.example(config, unet_config, nets.vae.config, nets.tokens)
    count = config.train.batch_size
    return Step(jitted(step, state, mesh), arguments, count, count, count * needed)


def _train_batch(config: Config, nets: _Networks) -> dict[str, Any]:
    """Return the shapes of a batch as the pipeline makes it, of pixels or of cached latents."""
    count, size = config.train.batch_size, config.data.image_size
    asked = config.e2e.classes if config.stage == "e2e" else nets.group
    shapes: dict[str, Any] = {"class_ids": ((count, asked), jnp.int32)}
    if config.data.cache_latents:
        latents = ((count, *nets.latent), jnp.float32)
        shapes |= dict.fromkeys(("image_latents", "mask_latents"), latents)
        shapes |= dict.fromkeys(("shown", "valid"), ((count, *nets.latent[:2]), jnp.bool_))
    else:
        shapes |= {"image": ((count, *size, 3), jnp.uint8), "labels": ((count, *size), jnp.uint8)}
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def _sample_step(config: Config, nets: _Networks, mesh: Mesh) -> Step:
    """Return one call of the segmenter's sampler.

    The images that it is worth are its UNet calls over those that an image needs: a shortlist
    needs one for every pass, and the full budget for its classes only.
    """
    sampler = config.sampler
    if sampler.decoder == "tiny":
        raise UserError(
            "config.sampler.decoder='tiny': no preset has such a decoder: use vae or linear"
        )
    jobs = multiple(sampler.batch_size, mesh.size)
    passes = codec.num_groups(len(nets.table.pooled), nets.group)
    calls = flops.unet_calls(passes, sampler)
    once = flops.unet(nets.unet.config, *nets.latent[:2], nets.tokens).forward
    decoded = flops.mask_decode(nets.vae.config, sampler.decoder, *config.data.image_size)
    needed = jobs * (sampler.steps * once + decoded)
    return Step(*_sampler(config, nets, mesh, jobs), jobs, jobs * sampler.steps / calls, needed)


def _sampler(config: Config, nets: _Networks, mesh: Mesh, jobs: int) -> tuple[Any, tuple[Any, ...]]:
    """Return `sampling.sampler_on` and its arguments: all this file knows of how it is called."""
    whole, rows = meshes.replicated(mesh), meshes.rows_sharding(mesh)
    unet, unet_params = nnx.split(
        attention_kernels.with_attention(nets.unet, attention_kernels.on_device("tpu"))
    )
    vae = attention_kernels.with_attention(nets.vae, plain)
    decoder: Any = nnx.graphdef(vae)
    decoder_params: Any = nnx.state(vae)
    if config.sampler.decoder in ("linear", "joint"):  # sharpened on the host, after the sampler
        decoder, decoder_params = None, _linear_decoder(nets)
    schedule, key = jax.eval_shape(lambda: (make_schedule(config.diffusion), jax.random.key(0)))
    kind, ids = config.codec.context, jax.ShapeDtypeStruct((jobs, nets.group), jnp.int32)
    contexts, mask = jax.eval_shape(lambda table, ids: context(table, ids, kind), nets.table, ids)
    shared = kernels_as_multiplied(unet, unet_params), decoder_params, schedule
    members = jax.ShapeDtypeStruct((jobs,), jnp.int32)
    settings = config.sampler.steps, config.sampler.eta, config.sampler.initial_noise
    return sampling.sampler_on(mesh), (
        sampling.How(unet, decoder, *settings),
        *(meshes.abstract(tree, whole) for tree in shared),
        meshes.abstract(sampling.Jobs(contexts, mask, _floats(jobs, *nets.latent), members), rows),
        meshes.abstract(key, whole),
    )


def _search(
    config: Config, parts: int, kind: str, report: Callable[[Config], dict[str, Any]]
) -> dict[str, Any]:
    """Report the largest batch per chip that fits: doubled or halved, then bisected."""
    if kind == "train" and config.optimizer.accumulation > 1:
        raise UserError("--search: set config.optimizer.accumulation=1: a micro-batch has to fit")
    group = "train" if kind == "train" else "sampler"
    low, high, best = 0, None, None  # the largest that fits, the smallest that does not
    tried = max(1, getattr(config, group).batch_size // parts)
    while high is None or high - low > 1:
        part = dataclasses.replace(getattr(config, group), batch_size=tried * parts)
        made = report(dataclasses.replace(config, **{group: part}))
        print(f"{tried} a chip: {_fit(made)}", file=sys.stderr, flush=True)
        low, high, best = (tried, high, made) if made["fits"] else (low, tried, best)
        tried = 2 * low if high is None else (low + high) // 2
    if best is None:
        raise UserError("--search: not even 1 per chip fits: try more chips, config.mesh.fsdp=-1")
    return best


def _fit(made: dict[str, Any]) -> str:
    if not made["fits"]:
        return f"NO\n{made['why']}"
    used = made["per_chip"]["hbm"]["total"]
    return f"yes, {used / _GIB:.3g} of {made['hbm_of_chip'] / _GIB:.0f} GiB"


def _table(made: dict[str, Any]) -> str:
    axes = " ".join(f"{axis}={size}" for axis, size in made["mesh"].items())
    rows = {
        "topology": f"{made['slices']} × {made['topology']}, {made['chips']} chips, mesh {axes}",
        "step": f"{made['step']}, batch {made['batch_per_chip']:g} a chip",
        "fits": _fit(made),
    }
    if made["fits"]:
        chip, line = made["per_chip"], made["roofline"]
        done = {name: f"{count / 1e12:.4g}" for name, count in chip["flops"].items()}
        ratio = chip["flops"]["total"] / chip["flops"]["analytic"]
        found = ", ".join(f"{name} {n}" for name, n in sorted(chip["collectives"].items()))
        times = [1e3 * line[f"{name}_seconds"] for name in ("step", "compute", "memory")]
        rows |= {f"  {name}": f"{size / _GIB:.3g} GiB" for name, size in chip["hbm"].items()}
        rows |= {
            "TFLOP": f"{done['total']}, {ratio:.3f} of the analytic {done['analytic']}: XLA counts "
            f"{done['xla']}, rounds of loops add {done['loops']}, kernels {done['kernels']}",
            "bytes accessed": f"{chip['bytes_accessed'] / 1e9:.4g} GB",
            "collectives": found or "none",
            "roofline": "{:.4g} ms: FLOPs {:.4g} ms, bytes {:.4g} ms".format(*times),
            "MFU there": f"{line['mfu']:.1%}",
            "images/s there": f"{line['images_per_second']:.4g}",
        }
        if "run" in made:
            run, both = made["run"], "{:.3g} by FLOPs alone, {:.3g} at the roofline"
            rows[f"{run['steps']:,} steps, hours"] = both.format(*run["hours"])
            rows[f"dollars at {run['price']:.2f}"] = both.format(*run["dollars"])
        rows["compiled in"] = f"{made['compile_seconds']:.0f} s"
    return "\n".join(f"{name:<24}{text}" for name, text in rows.items())


if __name__ == "__main__":
    cli.run(main)
