"""Where a Stable Diffusion folder is: on disk, in `gs://`, or on the Hugging Face hub."""

import functools
import os
import re
from collections.abc import Callable, Collection
from typing import Any

import huggingface_hub
from etils import epath
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import tqdm

from segdiff_jax import files, stored, waiting
from segdiff_jax.errors import UserError
from segdiff_jax.weights import safetensors_files

INDEX = "model_index.json"
STEM = {  # names of the weight files, without variant and suffix
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "tiny_vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


def folder_name(component: str) -> str:
    """The folder of a component inside a Stable Diffusion folder."""
    return "scheduler" if component == "schedule" else component


def locate(
    source: str, components: Collection[str], revision: str | None, variant: str | None
) -> epath.Path:
    """The folder that `source` means; a repository is downloaded, as far as `components` need it.

    Raises `UserError` when there is no such folder or repository, or it lacks a component.
    """
    with files.reading(source):
        root = _root(source, revision, lambda name, at: _download(name, at, components, variant))
        for name in components:
            if not (root / folder_name(name)).exists():
                folder = root / folder_name(name)
                raise UserError(f"{folder}: no such folder: {source} has no {name}")
        return root


def locate_configs(source: str) -> epath.Path:
    """The folder that `source` means; of a repository only the small files are downloaded."""
    with files.reading(source):
        return _root(
            source,
            None,
            lambda name, at: _fetch(name, at, _small([*STEM, "tokenizer", "schedule"])),
        )


def _root(
    source: str, revision: str | None, download: Callable[[str, str | None], epath.Path]
) -> epath.Path:
    repository = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", source)
    root = epath.Path(source)
    if files.is_remote(source) or root.exists():
        if revision:
            raise UserError(f"{source}: a folder has no revision {revision!r}: leave it out")
    elif repository:
        root = download(repository[1], repository[2] or revision)
    else:
        raise UserError(f"{source}: no such folder, nor a Hugging Face repository: check the name")
    if not (root / INDEX).exists():
        raise UserError(f"{source}: no {INDEX}: give a Stable Diffusion folder (is it whole?)")
    return root


def _small(components: Collection[str]) -> list[str]:
    folders = map(folder_name, components)
    return [INDEX, *(f"{folder}/*{end}" for folder in folders for end in (".json", ".txt"))]


def _download(
    repository: str, revision: str | None, components: Collection[str], variant: str | None
) -> epath.Path:
    weighty = [name for name in components if name in STEM]

    def named(names: list[str], variant: str | None) -> list[str]:
        return [
            f"{name}/{pattern}"
            for name in names
            for pattern in safetensors_files.patterns(STEM[name], variant)
        ]

    def fetch(patterns: list[str]) -> epath.Path:
        return _fetch(repository, revision, _small(components) + patterns)

    wanted = named(weighty, variant)
    root = fetch(wanted)
    bare = [n for n in weighty if not safetensors_files.are_there(root / n, STEM[n], variant)]
    if not bare:
        return root
    # Only now: variants double the bytes or more. A variant may be of the UNet alone.
    return fetch(wanted + named(bare, None if variant else "*"))


def _fetch(repository: str, revision: str | None, patterns: list[str]) -> epath.Path:
    advice = "check the network, or set HF_HUB_OFFLINE=1 to use what is in its cache"
    wait = waiting.Wait(f"Hugging Face ({repository})", waiting.NETWORK, advice)
    download = functools.partial(
        huggingface_hub.snapshot_download,
        repository,
        revision=revision,
        allow_patterns=patterns,
        tqdm_class=_heard_by(wait),
    )
    try:
        return epath.Path(waiting.bounded(download, wait))
    except waiting.NoAnswer:
        raise
    except Exception as error:  # the library raises its own, httpx's, OSError and ValueError
        told = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        reason = " ".join(str(told or error).split())[:200] or repr(error)
        where = f"{repository}@{revision}" if revision else repository
        raise UserError(
            f"{where}: no such folder, nor could it be had from Hugging Face ({reason}): "
            "check the name, the network and HF_HUB_OFFLINE"
        ) from error


def _heard_by(wait: waiting.Wait) -> type[tqdm]:
    """Progress bars whose progress is a sign of life to `wait`."""

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            wait.heard()
            return super().update(n)

    return Bar


def read_json(path: epath.Path) -> tuple[dict[str, Any], str]:
    """The object in a JSON file, and the file's name for messages about it."""
    try:
        with files.reading(path):
            data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: fetch the folder again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): fetch it again") from error
    return stored.parse_object(data, path), os.fspath(path)
