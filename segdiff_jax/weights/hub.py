"""Where a Stable Diffusion folder is (on disk, in `gs://`, on the Hugging Face hub), and its files.

Weights are published whole or in shards with an index, as plain files or as variants such as fp16,
under names that have changed over the years.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path

import huggingface_hub
from etils import epath
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import tqdm

from segdiff_jax import fields, files, stored, waiting
from segdiff_jax.errors import UserError

INDEX = "model_index.json"
STEM = {  # names of the weight files, without variant and suffix
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "tiny_vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
_NAMES = (  # how weights are published, best first; the last three are indices over shards
    r"{stem}{variant}\.safetensors",
    r"{stem}\.safetensors\.index{variant}\.json",
    r"{stem}\.safetensors{variant}\.index\.json",  # older diffusers
    r"{stem}{variant}\.safetensors\.index\.json",  # huggingface_hub's own
)

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")

DEMO = "demo"  # the folder of the model that comes with the package


def folder_name(component: str) -> str:
    """Return the name of a component's folder inside a Stable Diffusion folder."""
    return "scheduler" if component == "schedule" else component


def locate(source: str, components: Collection[str], variant: str | None) -> epath.Path:
    """Return the folder that `source` means; download a repository as far as `components` need it.

    Raises `UserError` when there is no such folder or repository, or it lacks a component.
    """
    networks = [name for name in components if name in STEM]
    wanted = _small(components) + [p for n in networks for p in _patterns(n, variant)]
    with files.reading(source):
        root = _root(source, wanted)
        bare = [name for name in networks if not _has_weights(root / name, name, variant)]
        if bare and _repository(source):
            # Only now: variants double the bytes or more. A variant may be of the UNet alone.
            more = [p for n in bare for p in _patterns(n, None if variant else "*")]
            root = _root(source, wanted + more)
        for name in components:
            if not (root / folder_name(name)).exists():
                raise no_part(root, source, name)
        return root


def locate_configs(source: str) -> epath.Path:
    """Return the folder that `source` means; of a repository, download only the small files."""
    with files.reading(source):
        return _root(source, _small([*STEM, "tokenizer", "schedule"]))


def local(checkpoint: os.PathLike[str] | str) -> str:
    """Return the folder of a workdir or export; download one on Hugging Face, OWNER/NAME.

    "demo" is the model that comes with the package, unless there is a folder of that name.
    """
    checkpoint = os.fspath(checkpoint)
    if checkpoint == DEMO and not os.path.exists(checkpoint):
        return os.fspath(Path(__file__).with_name(DEMO))
    repository = _repository(checkpoint)
    if repository is None or os.path.exists(os.path.dirname(checkpoint)):
        return checkpoint  # where the folder above it exists, its name is wrong
    # At the top of the folder, of the weights only ours: others put whole models in one file there.
    patterns = ["*.json", "*/*.txt", "*/*.safetensors", "*_decoder.safetensors"]
    return os.fspath(_fetch(repository, patterns))


def _root(source: str, patterns: list[str]) -> epath.Path:
    """Return the folder `source`, or where a repository's files that match `patterns` are."""
    repository = _repository(source)
    root = _fetch(repository, patterns) if repository else epath.Path(source)
    if not files.is_remote(source) and not root.exists():
        raise UserError(f"{source}: no such folder, nor a Hugging Face repository: check the name")
    if not (root / INDEX).exists():
        if root.name.endswith(_PICKLES):
            raise _pickled(root)
        raise UserError(f"{source}: no {INDEX}: give a Stable Diffusion folder (is it whole?)")
    return root


def _repository(source: str) -> re.Match[str] | None:
    """Match (owner/name, revision) of a source that is no folder here."""
    if files.is_remote(source) or epath.Path(source).exists():
        return None
    return re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", source)


def _small(components: Collection[str]) -> list[str]:
    folders = map(folder_name, components)
    return [INDEX, *(f"{folder}/*{end}" for folder in folders for end in (".json", ".txt"))]


def _patterns(component: str, variant: str | None) -> list[str]:
    """Return shell patterns of the files that may hold its weights; "*" is any variant.

    Without a variant they match the plain files alone.
    """
    stem, count = f"{component}/{STEM[component]}", "-?????-of-?????"
    names = [f".{variant}", f".{variant}{count}", f"{count}.{variant}"] if variant else ["", count]
    return [f"{stem}{name}.safetensors" for name in names]


def _fetch(repository: re.Match[str], patterns: list[str]) -> epath.Path:
    name, revision = repository.groups()
    advice = "check the network, or set HF_HUB_OFFLINE=1 to use what is in its cache"
    wait = waiting.Wait(f"Hugging Face ({name})", waiting.NETWORK, advice)

    class Bar(tqdm):  # its progress is a sign of life
        def update(self, n: float | None = 1) -> bool | None:
            wait.heard()
            return super().update(n)

    def download() -> str:
        return huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=patterns, tqdm_class=Bar
        )

    try:
        return epath.Path(waiting.bounded(download, wait))
    except waiting.NoAnswer:
        raise
    except Exception as error:  # the library raises its own, httpx's, OSError and ValueError
        told = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        reason = " ".join(str(told or error).split())[:200] or repr(error)
        raise UserError(
            f"{repository[0]}: no such folder, nor could it be had from Hugging Face ({reason}): "
            "check the name, the network and HF_HUB_OFFLINE"
        ) from error


def find_weights(folder: epath.Path, component: str, variant: str | None) -> list[epath.Path]:
    """Return the files that hold the weights of a component, in order: see `_NAMES`.

    Without `variant` the plain files are preferred, then the only variant: parameters become
    float32 in any case. With it, a component that lacks the variant falls back on its plain files,
    since many repositories have it for the UNet alone. Raises `UserError` when there are no
    weights, or only pickles.
    """
    present = variants(folder, component)
    if not present:
        raise _no_weights(folder)
    others = ", ".join(sorted(present))
    if variant is None and "" not in present:
        if len(present) > 1:
            raise UserError(
                f"{folder}: there are only the variants {others}: choose one, for a training with "
                f"--config.init_variant={min(present)}"
            )
        (wanted,) = present
    else:
        wanted = variant if variant and variant in present else ""
        if wanted not in present:
            raise UserError(f"{folder}: {variant}: there is no such variant, but {others}: choose")
    path = folder / present[wanted]
    return [path] if path.suffix == ".safetensors" else _shards(path)


def _has_weights(folder: epath.Path, component: str, variant: str | None) -> bool:
    """Return whether the weights are there as `variant`, or as whichever is found without one."""
    try:
        return (not variant or variant in variants(folder, component)) and bool(
            find_weights(folder, component, variant)
        )
    except UserError:
        return False


def variants(folder: epath.Path, component: str) -> dict[str, str]:
    """Map each variant that `find_weights` can choose ("" is the plain files) to its first file."""
    names, found = _names(folder), dict[str, str]()
    for pattern in _NAMES:
        compiled = re.compile(pattern.format(stem=STEM[component], variant=r"(?:\.(\w+))?"))
        for match in filter(None, map(compiled.fullmatch, names)):
            found.setdefault(match[1] or "", match[0])
    return found


def _names(folder: epath.Path) -> list[str]:
    with files.reading(folder):
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def _no_weights(folder: epath.Path) -> UserError:
    pickles = [name for name in _names(folder) if name.endswith(_PICKLES)]
    if pickles:
        return _pickled(folder / pickles[0])
    return UserError(
        f"{folder}: no .safetensors weights (pickles are not read), or shards without index: fetch "
        "it again, or use another model"
    )


def no_part(root: epath.Path, source: object, name: str) -> UserError:
    """Return the error for a component that is not in the folder `root` of `source`."""
    kind = stored.read_object(root / INDEX).get("_class_name")
    means = f"{source} is a {fields.shown(kind)[1:-1]} and" if isinstance(kind, str) else source
    return UserError(f"{root / folder_name(name)}: no such folder: {means} has no {name}")


def _pickled(path: epath.Path) -> UserError:
    return UserError(
        f"{path}: pickled weights can run code and are not read: convert them to safetensors"
    )


def _shards(index: epath.Path) -> list[epath.Path]:
    weights = stored.read_object(index).get("weight_map")
    shards = set(weights.values()) if isinstance(weights, dict) else set()
    if not shards or not all(re.fullmatch(r"[\w.-]+\.safetensors", str(name)) for name in shards):
        raise UserError(f"{index}: must name .safetensors files beside it: fetch it again")
    paths = [index.parent / name for name in sorted(shards)]
    with files.reading(index):
        missing = [path for path in paths if not path.exists()]
    if missing:
        raise UserError(f"{missing[0]}: this shard is missing: fetch it again")
    return paths
