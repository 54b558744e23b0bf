"""Stable Diffusion weights in, Stable Diffusion weights out: Hugging Face folders ⇄ NNX modules.

A folder has `model_index.json`, `unet/`, `vae/`, `text_encoder/`, `tokenizer/` and `scheduler/`.
Modules are built without arrays and filled straight from the files, tensor by tensor, so that
memory holds the parameters once, or on each device its own part of them.
"""

import dataclasses
import functools
import os
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from etils import epath

from segdiff_jax import files, ownership
from segdiff_jax.config import DiffusionConfig
from segdiff_jax.errors import UserError
from segdiff_jax.models.clip_text import CLIPText, CLIPTextConfig
from segdiff_jax.models.layers import Dtype
from segdiff_jax.models.tiny_vae import TinyVAE
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE, VAEConfig
from segdiff_jax.parallel.placement import Place
from segdiff_jax.text.tokenizer import Tokenizer
from segdiff_jax.weights import hf_config, safetensors_files
from segdiff_jax.weights import hub as hf_folders
from segdiff_jax.weights import tensors as weights
from segdiff_jax.weights.hub import INDEX, STEM, read_json

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "schedule")
_FILES = {  # of each component's folder
    **{name: ("config.json", f"{stem}.safetensors") for name, stem in hf_folders.STEM.items()},
    "tokenizer": (
        *("vocab.json", "merges.txt"),
        *("tokenizer_config.json", "special_tokens_map.json"),
    ),
    "schedule": ("scheduler_config.json",),
}
_POSITIONS = "text_model.embeddings.position_embedding.weight"


class Pretrained(NamedTuple):
    """The parts of a Stable Diffusion folder; None for those not asked for."""

    unet: UNet | None = None
    vae: VAE | None = None
    text_encoder: CLIPText | None = None
    tokenizer: Tokenizer | None = None
    schedule: DiffusionConfig | None = None
    tiny_vae: TinyVAE | None = None  # an addition of ours, which diffusers' pipelines do not read


def load(
    source: os.PathLike[str] | str,
    components: Collection[str] = COMPONENTS,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: Dtype = jnp.float32,
    remat: bool = False,
    widen_conv_in: bool = False,
    place: Place | None = None,
) -> Pretrained:
    """Reads the `components` of a Stable Diffusion folder; safetensors only.

    Args:
      source: a local folder, a `gs://` folder, or a Hugging Face repository `owner/name` or
        `owner/name@revision`. Downloads go to the usual cache (`HF_HOME`); `HF_HUB_OFFLINE=1`
        reads only that.
      components: which fields of `Pretrained` to read; the others need not exist.
      revision: branch, tag or commit of a repository.
      variant: "fp16" reads `*.fp16.safetensors` where there are any, else the plain files. By
        default the plain files, or the only variant.
      dtype: of activations. Parameters become float32 whatever the file holds.
      remat: recompute the UNet's blocks in the backward pass.
      widen_conv_in: make the UNet take image latent ⊕ noisy latent: an input one latent wide is
        doubled by duplicating and halving `conv_in`, which keeps the scale of activations.
      place: puts a host array on devices; gets its path, such as
        "unet/down_blocks/0/resnets/0/conv1/kernel". By default the whole array goes to the
        default device.

    Raises:
      UserError: no such folder, an architecture that our modules do not have, damaged files, or
        tensors that are missing, unexpected or of the wrong shape (all of them in one error).
    """
    wrong = [name for name in components if name not in Pretrained._fields]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not one of {Pretrained._fields}")
    root = hf_folders.locate(os.fspath(source), components, revision, variant)
    plans = _plans(root, components, variant, dtype, remat, widen_conv_in)
    weights.check(plans.values())  # all of them before the first byte of any
    parts: dict[str, Any] = {}
    if "schedule" in components:
        values, file = read_json(root / "scheduler" / "scheduler_config.json")
        parts["schedule"] = hf_config.read_schedule(values, file)
    if "tokenizer" in components:
        parts["tokenizer"] = Tokenizer.load(root / "tokenizer")
        if "text_encoder" in components:
            positions, _ = plans["text_encoder"].shapes[_POSITIONS]
            _check_length(parts["tokenizer"], positions, root)
    for name, plan in plans.items():
        parts[name] = weights.fill(plan, place)
    return Pretrained(**parts)


class Described(NamedTuple):
    """What a Stable Diffusion folder says of its parts; None where it has no such part."""

    root: epath.Path
    unet: UNetConfig | None
    vae: VAEConfig | None
    text_encoder: CLIPTextConfig | None
    schedule: DiffusionConfig | None


def describe(
    source: os.PathLike[str] | str,
    components: Collection[str] = ("unet", "vae", "text_encoder", "schedule"),
    variant: str | None = None,
) -> Described:
    """The configs of `components` in a folder, checked as `load` checks them; no weight is read.

    Raises `UserError` for what `load` would refuse of them, and for a `variant` of the weights that
    no part of a local folder has.
    """
    root = hf_folders.locate_configs(os.fspath(source))
    readers = {
        "unet": hf_config.read_unet,
        "vae": hf_config.read_vae,
        "text_encoder": hf_config.read_text_encoder,
        "schedule": hf_config.read_schedule,
    }
    found: dict[str, Any] = dict.fromkeys(readers)
    for name in components:
        folder = root / hf_folders.folder_name(name)
        file = "scheduler_config.json" if name == "schedule" else "config.json"
        with files.reading(folder):
            there = folder.exists()
        found[name] = readers[name](*read_json(folder / file)) if there else None
    kept = {v for name, stem in STEM.items() for v in safetensors_files.variants(root / name, stem)}
    if variant and kept and variant not in kept:  # of a repository no weights are here yet
        others = ", ".join(sorted(name or "the plain files" for name in kept))
        raise UserError(f"{root}: no weights of the variant {variant!r}, but {others}: choose")
    return Described(root, **found)


def _plans(
    root: epath.Path,
    components: Collection[str],
    variant: str | None,
    dtype: Dtype,
    remat: bool,
    widen_conv_in: bool,
) -> dict[str, weights.Plan]:
    """How to fill each of the networks among `components`."""
    plan = functools.partial(weights.plan, variant=variant)
    plans = {}
    if "unet" in components:
        values, file = read_json(root / "unet" / "config.json")
        config, widened = _two_latents(hf_config.read_unet(values, file), widen_conv_in, file)
        unet = lambda rngs: UNet(config, dtype=dtype, remat=remat, rngs=rngs)  # noqa: E731
        plans["unet"] = plan("unet", unet, root / "unet", widened=widened)
    if "vae" in components:
        vae_config = hf_config.read_vae(*read_json(root / "vae" / "config.json"))
        vae = lambda rngs: VAE(vae_config, dtype=dtype, rngs=rngs)  # noqa: E731
        plans["vae"] = plan("vae", vae, root / "vae")
    if "tiny_vae" in components:
        tiny_config = hf_config.read_tiny_vae(*read_json(root / "tiny_vae" / "config.json"))
        tiny = lambda rngs: TinyVAE(tiny_config, dtype=dtype, rngs=rngs)  # noqa: E731
        plans["tiny_vae"] = plan("tiny_vae", tiny, root / "tiny_vae")
    if "text_encoder" in components:
        folder = root / "text_encoder"
        text_config = hf_config.read_text_encoder(*read_json(folder / "config.json"))
        text = lambda rngs: CLIPText(text_config, dtype=dtype, rngs=rngs)  # noqa: E731
        plans["text_encoder"] = plan("text_encoder", text, folder)
    return plans


def _check_length(tokenizer: Tokenizer, positions: int, root: epath.Path) -> None:
    if tokenizer.model_max_length > positions:
        raise UserError(
            f"{root / 'tokenizer' / 'tokenizer_config.json'}: model_max_length is "
            f"{tokenizer.model_max_length}, but the text encoder has {positions} positions: "
            "use the tokenizer of this encoder"
        )


def is_whole(directory: os.PathLike[str] | str) -> bool:
    """Whether `save` finished there. In `gs://` a killed one leaves a folder without its index."""
    with files.reading(directory):
        return (epath.Path(directory) / INDEX).exists()


def _two_latents(config: UNetConfig, wanted: bool, file: str) -> tuple[UNetConfig, bool]:
    """The config with room for image latent ⊕ noisy latent, and whether that changed it."""
    if not wanted or config.in_channels == 2 * config.out_channels:
        return config, False
    if config.in_channels != config.out_channels:
        raise UserError(
            f"{file}: in_channels={config.in_channels} is neither one latent nor two "
            f"of out_channels={config.out_channels}: use a text-to-image model"
        )
    return dataclasses.replace(config, in_channels=2 * config.in_channels), True


def save(
    pretrained: Pretrained,
    directory: os.PathLike[str] | str,
    *,
    dtype: str = "float32",
    extra_files: Mapping[str, str] | None = None,
    kind: str = "pretrained",
) -> None:
    """Writes the parts that are not None as a folder that diffusers, transformers and `load` read.

    The folder appears whole or not at all: locally it is renamed into place, in `gs://` (which
    cannot rename) `model_index.json`, without which `load` refuses a folder, comes last. An earlier
    folder that this function wrote is replaced; one with anything else in it is refused
    (`ownership`). The bytes depend only on the input.

    Args:
      pretrained: what to write.
      directory: local or `gs://` folder.
      dtype: of the stored weights: "float32", "bfloat16" or "float16".
      extra_files: relative path → text, to appear together with the weights.
      kind: what `ownership` calls the folder; only one of the same kind is replaced.

    Raises:
      UserError: the place holds other files or cannot be written, or a weight overflows float16.
    """
    if dtype not in safetensors_files.FLOATS:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(safetensors_files.FLOATS)}")
    extra = extra_files or {}
    names = [*_file_names(pretrained), *extra, INDEX]
    with ownership.whole_folder(directory, kind, names, last=INDEX) as folder:
        for path, text in extra.items():
            files.write_text(folder / path, text)
        _write_components(pretrained, folder, dtype)
        files.write_json(folder / INDEX, _model_index(pretrained))


def _file_names(pretrained: Pretrained) -> list[str]:
    """What `_write_components` writes, relative to its folder."""
    return [
        f"{hf_folders.folder_name(component)}/{name}"
        for component, part in pretrained._asdict().items()
        if part is not None
        for name in _FILES[component]
    ]


def _write_components(pretrained: Pretrained, folder: epath.Path, dtype: str) -> None:
    unet, vae, text, tokenizer, schedule, tiny_vae = pretrained
    if unet is not None:
        files.write_json(folder / "unet" / "config.json", hf_config.write_unet(unet.config))
        weights.write("unet", unet, folder / "unet", dtype)
    if vae is not None:
        files.write_json(folder / "vae" / "config.json", hf_config.write_vae(vae.config))
        weights.write("vae", vae, folder / "vae", dtype)
    if tiny_vae is not None:
        values = hf_config.write_tiny_vae(tiny_vae.config)
        files.write_json(folder / "tiny_vae" / "config.json", values)
        weights.write("tiny_vae", tiny_vae, folder / "tiny_vae", dtype)
    if text is not None:
        values = hf_config.write_text_encoder(text.config, dtype)
        files.write_json(folder / "text_encoder" / "config.json", values)
        weights.write("text_encoder", text, folder / "text_encoder", dtype)
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
    if schedule is not None:
        path = folder / "scheduler" / "scheduler_config.json"
        files.write_json(path, hf_config.write_schedule(schedule))


def _model_index(pretrained: Pretrained) -> dict[str, Any]:
    classes = {
        "scheduler": ("diffusers", "DDIMScheduler", pretrained.schedule),
        "text_encoder": ("transformers", "CLIPTextModel", pretrained.text_encoder),
        "tokenizer": ("transformers", "CLIPTokenizer", pretrained.tokenizer),
        "unet": ("diffusers", "UNet2DConditionModel", pretrained.unet),
        "vae": ("diffusers", "AutoencoderKL", pretrained.vae),
    }
    listed = {
        name: [None, None] if part is None else [library, kind]
        for name, (library, kind, part) in classes.items()
    }
    absent = {"feature_extractor": [None, None], "safety_checker": [None, None]}
    return {
        "_class_name": "StableDiffusionPipeline",
        **absent,
        "requires_safety_checker": False,
        **listed,
    }
