"""Open a page in the browser: `python -m segdiff_jax.app --checkpoint W`."""

import argparse
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from segdiff_jax import cli
from segdiff_jax.errors import UserError

if TYPE_CHECKING:
    from segdiff_jax.config import Config
    from segdiff_jax.text.vocabulary import Vocabulary
    from segdiff_jax.web.page import Example
    from segdiff_jax.web.requests import Limits

_DESCRIPTION = """Segment photos in a browser.

Drop a photo, name classes, look at masks, scores and uncertainty, download them in the formats of
predict. Programs call the same address through gradio_client. Only this machine can reach it
unless --host says otherwise; no file of this machine is served but the page and its results.
"""
_EXAMPLES = 4
_SHOWN_CLASSES = 8
_LAST_PORT = 2**16 - 1


def main(argv: list[str]) -> None:
    parser = cli.parser("segdiff_jax.app", _DESCRIPTION)
    cli.add_checkpoint(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 = all; default: here")
    add("--port", type=cli.natural_int, default=7860, help="0 = any that is free; default: 7860")
    add("--examples", type=cli.path, metavar="DIR", help="folder of photos to try it with")
    add(
        "--max-pixels",
        type=cli.positive_int,
        default=32_000_000,
        metavar="N",
        help="refuse larger photos; default: 32 megapixels",
    )
    args = parser.parse_args(argv)
    if args.port > _LAST_PORT:
        raise UserError(f"--port {args.port}: give a number from 0 to {_LAST_PORT}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what visitors left is gone
    _serve(args)


def _serve(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    print("starting the page", flush=True)  # what it is made with takes seconds to import
    from segdiff_jax.weights import hub, workdir

    folder = hub.local(args.checkpoint)
    config, trained = workdir.read_config(folder), workdir.read_classes(folder)
    with tempfile.TemporaryDirectory(prefix="segdiff_app_") as temporary:
        # Read by Gradio when it is imported: uploads and results lie here, and nowhere else.
        os.environ["GRADIO_TEMP_DIR"] = os.path.join(temporary, "files")
        os.environ["GRADIO_EXAMPLES_CACHE"] = os.path.join(temporary, "examples")
        try:
            from segdiff_jax.web import page, server
        except ImportError as error:
            raise UserError(
                f"the app needs Gradio ({error}): pip install 'segdiff_jax[app]'"
            ) from error
        limits = page.Limits(pixels=args.max_pixels)
        files = os.path.join(temporary, "files")
        examples = _examples(args.examples, files, config, trained, limits)
        loading: Future[Any] = Future()
        name = os.path.basename(os.path.normpath(args.checkpoint))
        blocks = page.build(loading, config, f"Segment photos · {name}", limits, examples)
        with server.running(blocks, args.host, args.port, limits) as url:
            threading.Thread(target=_load, args=(folder, args.which, loading), daemon=True).start()
            print(f"open {url} (Ctrl-C ends it); the model is being loaded", flush=True)
            _wait(loading)


def _load(folder: str, which: str, loading: Future[Any]) -> None:
    from segdiff_jax.inference.segmenter import Segmenter
    from segdiff_jax.parallel import runtime

    try:
        runtime.start()
        loading.set_result(Segmenter.load(folder, which))
    except BaseException as error:
        loading.set_exception(error)


def _wait(loading: Future[Any]) -> None:
    begun = time.monotonic()
    loading.result()
    print(f"ready after {time.monotonic() - begun:.0f} s", flush=True)
    while True:
        time.sleep(3600)


def _examples(
    given: str | None,
    temporary: str,
    config: "Config",
    trained: "Vocabulary | None",
    limits: "Limits",
) -> "Sequence[Example]":
    """Return photos of the folder that was given, or scenes for a model trained on scenes.

    Raise `UserError` for a photo that the page would refuse.
    """
    from PIL import Image

    from segdiff_jax.data.sources import scenes
    from segdiff_jax.web.page import Example

    os.makedirs(temporary, exist_ok=True)
    if given:
        names = [] if trained is None else trained.names[:_SHOWN_CLASSES]
        return [
            Example(path, "; ".join(names)) for path in _copies(given, temporary, config, limits)
        ]
    if config.data.source != "scenes":
        return []
    source = scenes.ScenesSource(config.data.scenes, (192, 192), train=False, seed=config.seed)
    examples = []
    for number in range(min(_EXAMPLES, len(source))):
        scene = source[number]
        path = os.path.join(temporary, f"scene_{number + 1}.png")
        Image.fromarray(scene["image"]).save(path)
        ids = sorted(set(scene["labels"].ravel().tolist()))
        shown = [source.vocabulary.names[i] for i in ids if i < len(source.vocabulary)]
        examples.append(Example(path, "; ".join(shown)))
    return examples


def _copies(given: str, temporary: str, config: "Config", limits: "Limits") -> list[str]:
    """Return copies, below `temporary`, of the first photos of the folder `given`."""
    import shutil

    from segdiff_jax.inference import photos
    from segdiff_jax.web import requests

    copies = []
    for number, path in enumerate(photos.find([given], "--examples")[:_EXAMPLES]):
        try:
            requests.photo(path, config.data, limits)  # no visitor is offered what would be refused
        except UserError as error:
            raise UserError(f"--examples {path}: {error}") from error
        folder = os.path.join(temporary, str(number))  # two may have the same name
        os.makedirs(folder)
        copies.append(shutil.copy(path, folder))
    return copies


if __name__ == "__main__":
    cli.run(main)
