"""Stable Diffusion weights in, Stable Diffusion weights out: Hugging Face folders ⇄ NNX modules.

A folder has `model_index.json`, `unet/`, `vae/`, `text_encoder/`, `tokenizer/` and `scheduler/`.
Modules are built without arrays and filled straight from the files, tensor by tensor, so that
memory holds the parameters once, or on each device its own part of them.
"""

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from etils import epath

from segdiff_jax import files, ownership, stored
from segdiff_jax.config import DiffusionConfig
from segdiff_jax.errors import UserError
from segdiff_jax.models.clip_text import CLIPText, CLIPTextConfig
from segdiff_jax.models.layers import Dtype
from segdiff_jax.models.tiny_vae import TinyVAE
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE, VAEConfig
from segdiff_jax.parallel.placement import Place
from segdiff_jax.text import tokenizer as tokenizers
from segdiff_jax.text.tokenizer import Tokenizer
from segdiff_jax.weights import hf_config, hub, ldm_key_map, safetensors_files, tensors
from segdiff_jax.weights.hub import INDEX, STEM

log = logging.getLogger(__name__)

_CLASSES = {  # of each component, as others call them
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "schedule": ["diffusers", "DDIMScheduler"],
}
COMPONENTS = tuple(_CLASSES)
_NETWORKS: dict[str, Any] = {
    "unet": UNet,
    "vae": VAE,
    "tiny_vae": TinyVAE,
    "text_encoder": CLIPText,
}
# The config file of each, its reader and its writer.
_CONFIGS: dict[str, tuple[str, Callable[[Any, str], Any], Callable[[Any], dict[str, Any]]]] = {
    "unet": ("config.json", hf_config.read_unet, hf_config.write_unet),
    "vae": ("config.json", hf_config.read_vae, hf_config.write_vae),
    "tiny_vae": ("config.json", hf_config.read_tiny_vae, hf_config.write_tiny_vae),
    "text_encoder": ("config.json", hf_config.read_text_encoder, hf_config.write_text_encoder),
    "schedule": ("scheduler_config.json", hf_config.read_schedule, hf_config.write_schedule),
}


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
    variant: str | None = None,
    dtype: Dtype = jnp.float32,
    widen_conv_in: bool = False,
    tokenizer: str = "",
    place: Place | None = None,
) -> Pretrained:
    """Read the `components` of a Stable Diffusion folder or file; safetensors only.

    Args:
      source: a folder, local or in `gs://`, a Hugging Face repository `owner/name` or
        `owner/name@revision` (branch, tag or commit), or one `.safetensors` file in the original
        layout. Downloads go to the usual cache (`HF_HOME`); `HF_HUB_OFFLINE=1` reads only that.
      components: which fields of `Pretrained` to read; the others need not exist.
      variant: "fp16" reads `*.fp16.safetensors` where there are any, else the plain files. By
        default the plain files, or the only variant.
      dtype: of activations. Parameters become float32 whatever the file holds.
      widen_conv_in: make the UNet take image latent ⊕ noisy latent: an input one latent wide is
        doubled by duplicating and halving `conv_in`, which keeps the scale of activations.
      tokenizer: for one file, which has none: as of `find_tokenizer`.
      place: puts a host array on devices; gets its path, such as
        "unet/down_blocks/0/resnets/0/conv1/kernel". By default the whole array goes to the
        default device.

    Raises:
      UserError: no such folder, an architecture that our modules do not have, damaged files, or
        tensors that are missing, unexpected or of the wrong shape (all of them in one error).
    """
    files.check_scheme(source)
    networks = [name for name in STEM if name in components]
    parts: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if is_single_file(source):
            file = epath.Path(source)
            found = _in_file(file, networks, stack)
            if "tokenizer" in components:
                parts["tokenizer"] = Tokenizer.load(find_tokenizer(file, tokenizer))
        else:
            root = hub.locate(os.fspath(source), components, variant)
            found = {name: _in_folder(root, name, variant, stack) for name in networks}
            if "tokenizer" in components:
                parts["tokenizer"] = Tokenizer.load(root / "tokenizer")
            if "schedule" in components:
                parts["schedule"] = _read_config(root, "schedule")
        if "tokenizer" in parts and "text_encoder" in found:
            _check_tokenizer(parts["tokenizer"], found["text_encoder"])
        if "unet" in found and widen_conv_in:
            found["unet"] = _two_latents(found["unet"])
        plans = {}
        for name, (where, config, entries, widened) in found.items():
            make = functools.partial(_NETWORKS[name], config, dtype=dtype)
            plans[name] = tensors.plan(name, make, where, entries, widened)
        tensors.check(plans.values())  # all of them before the first array of any
        for name, plan in plans.items():
            parts[name] = tensors.fill(plan, place)
    return Pretrained(**parts)


class _Found(NamedTuple):
    """A network in a source: its folder or file, what it is, and its tensors."""

    where: epath.Path
    config: Any
    entries: list[tensors.Entry]
    widened: bool = False  # the config takes two latents, the tensors one


def _in_folder(
    root: epath.Path, component: str, variant: str | None, stack: contextlib.ExitStack
) -> _Found:
    config = _read_config(root, component)
    paths = hub.find_weights(root / component, component, variant)
    if variant and variant not in hub.variants(root / component, component):
        log.info("%s: has no variant %s, its plain files are read", root / component, variant)
    opened = stack.enter_context(safetensors_files.opened(paths))
    return _Found(root / component, config, list(tensors.entries(paths, opened)))


def _in_file(
    path: epath.Path, components: Collection[str], stack: contextlib.ExitStack
) -> dict[str, _Found]:
    opened = stack.enter_context(safetensors_files.opened([path]))
    entries = list(tensors.entries([path], opened))
    return {
        name: _Found(path, *ldm_key_map.read(entries, name, os.fspath(path))) for name in components
    }


def is_single_file(source: os.PathLike[str] | str) -> bool:
    """Return whether a source is one file in Stable Diffusion's original layout, by its name."""
    return os.fspath(source).endswith(".safetensors")


def find_tokenizer(file: epath.Path, given: str = "") -> epath.Path:
    """Return the tokenizer's folder for a model in one `file`: `given`, or beside it.

    given: a tokenizer's folder, or the folder or repository of a model that has one.
    """
    beside = file.parent / "tokenizer"
    with files.reading(file):
        if given and any((epath.Path(given) / name).exists() for name in tokenizers.FILES):
            return epath.Path(given)
        if given:
            return hub.locate(given, ("tokenizer",), None) / "tokenizer"
        if beside.exists():
            return beside
    raise UserError(
        f"{file}: one file holds no tokenizer, and there is no {beside}: put its folder there, or "
        "name a Stable Diffusion folder or repository that has one with --config.init_tokenizer"
    )


def _read_config(root: epath.Path, component: str) -> Any:
    name, read, _ = _CONFIGS[component]
    path = root / hub.folder_name(component) / name
    return read(stored.read_object(path), os.fspath(path))


class Described(NamedTuple):
    """What a Stable Diffusion folder or file says of its parts; None for those not asked for.

    `schedule` also is None where there is no such folder, as for one file.
    """

    unet: UNetConfig | None
    vae: VAEConfig | None
    text_encoder: CLIPTextConfig | None
    schedule: DiffusionConfig | None


def describe(
    source: os.PathLike[str] | str,
    components: Collection[str] = ("unet", "vae", "text_encoder", "schedule"),
    variant: str | None = None,
) -> Described:
    """Return the configs of `components`, checked as `load` checks them; no weight is read.

    A tokenizer, which is not described, has to be there, and so have the weights in a folder.
    Raises `UserError` for what `load` would refuse of them, and for a `variant` that no part of a
    folder has.
    """
    files.check_scheme(source)
    found: dict[str, Any] = dict.fromkeys(Described._fields)
    networks = [name for name in components if name in STEM]
    if is_single_file(source):
        if variant:
            raise UserError(f"{source}: one file has no variants: leave {variant!r} out")
        with contextlib.ExitStack() as stack:
            in_file = _in_file(epath.Path(source), networks, stack)
            return Described(**found | {name: part.config for name, part in in_file.items()})
    root = hub.locate_configs(os.fspath(source))
    for name in components:
        folder = root / hub.folder_name(name)
        with files.reading(folder):
            there = folder.exists()
        if not there and name != "schedule":
            raise hub.no_part(root, source, name)
        if there and name in found:
            found[name] = _read_config(root, name)
    kept = {variant for name in STEM for variant in hub.variants(root / name, name)}
    if variant and kept and variant not in kept:  # of a repository no weights are here yet
        others = ", ".join(sorted(name or "the plain files" for name in kept))
        raise UserError(f"{root}: no weights of the variant {variant!r}, but {others}: choose")
    if root == epath.Path(source):  # no repository
        for name in networks:
            hub.find_weights(root / name, name, variant)
    return Described(**found)


def _check_tokenizer(tokenizer: Tokenizer, encoder: _Found) -> None:
    length, positions = tokenizer.model_max_length, encoder.config.max_position_embeddings
    if length > positions:
        raise UserError(
            f"{encoder.where}: the text encoder has {positions} positions, but model_max_length in "
            f"tokenizer_config.json is {length}: use the tokenizer of this encoder"
        )
    tokens, rows = tokenizer.vocab_size, encoder.config.vocab_size
    if tokens > rows:  # JAX would not say so by itself
        raise UserError(
            f"{encoder.where}: the text encoder has {rows} tokens, but the tokenizer in use "
            f"{tokens}: use the tokenizer of this encoder"
        )


def _two_latents(unet: _Found) -> _Found:
    """Widen the input to image latent ⊕ noisy latent, where it takes one latent."""
    config: UNetConfig = unet.config
    if config.in_channels == 2 * config.out_channels:
        return unet
    if config.in_channels != config.out_channels:
        raise UserError(
            f"{unet.where}: in_channels={config.in_channels} is neither one latent nor two of "
            f"out_channels={config.out_channels}: use a text-to-image model"
        )
    wide = dataclasses.replace(config, in_channels=2 * config.in_channels)
    return unet._replace(config=wide, widened=True)


def is_whole(directory: os.PathLike[str] | str) -> bool:
    """Return whether `save` finished there: in `gs://` a killed one leaves no index."""
    with files.reading(directory):
        return (epath.Path(directory) / INDEX).exists()


def save(
    pretrained: Pretrained,
    directory: os.PathLike[str] | str,
    *,
    dtype: str = "float32",
    extra_files: Mapping[str, str | bytes] | None = None,
    kind: str = "pretrained",
) -> None:
    """Write the parts that are not None as a folder that diffusers, transformers and `load` read.

    The folder appears whole or not at all: locally it is renamed into place, in `gs://` (which
    cannot rename) `model_index.json`, without which `load` refuses a folder, comes last. An earlier
    folder that this function wrote is replaced; one with anything else in it is refused
    (`ownership`). The bytes depend only on the input.

    Args:
      pretrained: what to write.
      directory: local or `gs://` folder.
      dtype: of the stored weights: "float32", "bfloat16" or "float16".
      extra_files: relative path → text or bytes, to appear together with the weights.
      kind: what `ownership` calls the folder; only one of the same kind is replaced.

    Raises:
      UserError: the place holds other files or cannot be written, or a weight overflows float16.
    """
    extra = extra_files or {}
    given = {name: part for name, part in pretrained._asdict().items() if part is not None}
    names = [f"{hub.folder_name(name)}/{file}" for name in given for file in _file_names(name)]
    with ownership.whole_folder(directory, kind, [*names, *extra, INDEX], last=INDEX) as folder:
        for path, content in extra.items():
            write: Any = files.write_text if isinstance(content, str) else files.write_bytes
            write(folder / path, content)
        for name, part in given.items():
            _write(name, part, folder / hub.folder_name(name), dtype)
        files.write_json(folder / INDEX, _model_index(given))


def _file_names(component: str) -> tuple[str, ...]:
    """Return the names of the files that `_write` writes."""
    if component == "tokenizer":
        return tokenizers.FILES
    weights = [f"{STEM[component]}.safetensors"] if component in STEM else []
    return (_CONFIGS[component][0], *weights)


def _write(component: str, part: Any, folder: epath.Path, dtype: str) -> None:
    if component == "tokenizer":
        part.save(folder)
        return
    file, _, as_json = _CONFIGS[component]
    values = as_json(part if component == "schedule" else part.config)
    values |= {"torch_dtype": dtype} if component == "text_encoder" else {}
    files.write_json(folder / file, values)
    if component in STEM:
        tensors.write(component, part, folder, dtype)


def _model_index(given: Collection[str]) -> dict[str, Any]:
    listed = {
        hub.folder_name(name): names if name in given else [None, None]
        for name, names in _CLASSES.items()
    }
    absent = {"feature_extractor": [None, None], "safety_checker": [None, None]}
    about = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    return about | absent | listed
