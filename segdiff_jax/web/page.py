"""The page: controls on one side, the viewer on the other, and `/segment` for programs.

photo, words → requests (checks) → Segmenter, in a queue of one → viewer.data → the browser
                                                                → packed       → a zip of files
"""

import contextlib
import html
import io
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import PurePath
from typing import Any, NamedTuple

import gradio as gr
from gradio import processing_utils
from gradio_client.utils import is_http_url_like

from segdiff_jax.config import Config
from segdiff_jax.errors import UserError
from segdiff_jax.inference import formats, writers
from segdiff_jax.inference.result import Segmentation
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.web import requests, viewer
from segdiff_jax.web.requests import Limits

_WAITING = 16  # requests in the queue
_HOUR = 3600  # seconds after which files and results of visitors are deleted

_FORMATS = [  # (what a person reads, what `predict --format` calls it)
    ("Label map (PNG)", "labels"),
    ("Masks (PNG)", "masks"),
    ("Cut-outs (PNG with alpha)", "cutouts"),
    ("COCO (JSON)", "coco"),
    ("YOLO-seg", "yolo"),
    ("CVAT mask zip", "cvat"),
    ("Score maps (16-bit PNG)", "scoremaps"),
    ("Scores (NumPy)", "scores"),
]


class Example(NamedTuple):
    photo: str  # path
    classes: str


class _Kept(NamedTuple):
    """What a visitor has seen last."""

    path: str
    encoded: Any  # of `Segmenter.encode`: other words for the same photo need the VAE no more
    found: Segmentation
    settings: dict[str, Any]


def _upload(**options: Any) -> gr.Image:
    """An image component that hands over the path of an upload, which nothing has looked into.

    No subclass: Gradio writes a file of types beside the module of every one.
    """
    component: Any = gr.Image(type="filepath", **options)  # whose methods are replaced
    move = component.async_move_resource_to_block_cache

    async def move_files_only(path: Any) -> str | None:
        if is_http_url_like(str(path)):  # this machine fetches nothing for a visitor
            raise gr.Error("Give a file, not an address.")
        return await move(path)

    component.preprocess = lambda payload: None if payload is None else payload.path
    component.async_move_resource_to_block_cache = move_files_only
    return component


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What a visitor can mend is said on the page; names are no markup there."""
    try:
        yield
    except (UserError, ValueError) as error:
        message = html.escape(str(error), quote=False)
        raise gr.Error(message, duration=12, print_exception=False) from error


def build(
    loading: "Future[Segmenter]",
    config: Config,
    title: str,
    limits: Limits,
    examples: Sequence[Example],
) -> gr.Blocks:
    """The page over a model that may still be `loading`."""

    def segment(
        photo: str | None,
        classes: str,
        asked: dict[str, Any],
        kept: _Kept | None = None,
        say: Callable[[float, str], None] = lambda part, text: None,
    ) -> _Kept:
        pixels = requests.photo(photo, limits)
        wanted = requests.classes(classes, limits)
        settings = requests.settings(asked, config, len(wanted), limits)
        if not loading.done():
            say(0.05, "The model is being loaded")
        segmenter = loading.result()
        say(0.15, "Looking at the photo")
        same = kept is not None and kept.path == photo
        encoded = kept.encoded if kept and same else segmenter.encode(pixels)
        counted = "1 class" if len(wanted) == 1 else f"{len(wanted)} classes"
        say(0.3, f"Painting {counted} (the first time takes longer)")
        return _Kept(str(photo), encoded, segmenter(encoded, wanted, **settings), settings)

    def on_segment(photo, classes, steps, ensemble, seed, closed, kept, progress=gr.Progress()):
        asked = {"steps": steps, "ensemble": ensemble, "seed": seed, "closed": closed}
        with _told():
            kept = segment(photo, classes, asked, kept, lambda p, text: progress(p, desc=text))
        return viewer.data(kept.found), kept

    def on_download(kept, kinds):
        with _told():
            if kept is None:
                raise UserError("Segment a photo first: nothing is kept for longer than an hour.")
            return _zip(kept, kinds, page.GRADIO_CACHE)

    def on_call(photo, classes, steps, ensemble, seed, closed, kinds):
        """The share of each class, the settings used, and a zip in the formats asked for."""
        asked = {"steps": steps, "ensemble": ensemble, "seed": seed, "closed": closed}
        with _told():
            kept = segment(photo, classes, asked)
            shares = {"classes": kept.found.shares(), "settings": kept.settings}
            return shares, _zip(kept, kinds, page.GRADIO_CACHE)

    def understood(text: str) -> str:
        with contextlib.suppress(UserError):
            return html.escape(requests.classes(text, limits).summary()) if text.strip() else ""
        return ""

    def status() -> Iterator[str]:
        begun = time.monotonic()
        while not loading.done():
            yield f"Loading the model: {time.monotonic() - begun:.0f} s. You can fill in the form."
            time.sleep(0.5)
        yield "" if loading.exception() is None else "The model could not be loaded."

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(_HOUR // 4, _HOUR)) as page:
        gr.Markdown(f"## {html.escape(title)}")
        shown_status = gr.Markdown("Loading the model…", elem_id="status")
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                photo = _upload(
                    label="Photo",
                    sources=["upload", "clipboard"],
                    height=240,
                    elem_id="photo",
                )
                words = gr.Textbox(
                    label="What to look for",
                    lines=4,
                    max_lines=12,
                    elem_id="classes",
                    placeholder="sky\nbuilding, house\nroad",
                    info="One class a line, or ; between them. Synonyms after a comma.",
                )
                said = gr.Markdown(elem_id="understood")
                run = gr.Button("Segment", variant="primary", elem_id="segment")
                with gr.Accordion("Settings", open=False):
                    sampler, most = config.sampler, config.diffusion.num_train_timesteps
                    steps = gr.Slider(
                        1,
                        min(50, most),
                        sampler.steps,
                        step=1,
                        label="Steps",
                        info="of denoising: more are slower and finer",
                    )
                    ensemble = gr.Slider(
                        1,
                        16,
                        sampler.ensemble,
                        step=1,
                        label="Ensemble",
                        info="samples to merge: from 2 on there is a map of uncertainty",
                    )
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                    closed = gr.Checkbox(
                        config.codec.closed, label="Every pixel belongs to one of the classes"
                    )
            with gr.Column(scale=7, min_width=300):
                result = gr.HTML(
                    html_template='<div class="viewer"></div>',
                    js_on_load=viewer.SCRIPT,
                    elem_id="result",
                )
                with gr.Accordion("Download", open=False):
                    kinds = gr.CheckboxGroup(
                        _FORMATS,
                        value=["labels"],
                        label="Formats",
                        show_label=False,
                        elem_id="formats",
                    )
                    pack = gr.Button("Download as zip", elem_id="download")
                    ready = gr.DownloadButton(visible="hidden", elem_id="ready")
        kept = gr.State(None, time_to_live=_HOUR)
        if examples:
            gr.Examples([list(e) for e in examples], [photo, words], label="Examples")

        private: dict[str, Any] = {"api_visibility": "private"}
        asked = [photo, words, steps, ensemble, seed, closed]
        page.load(
            status, None, shown_status, concurrency_limit=None, show_progress="hidden", **private
        )
        words.change(understood, words, said, queue=False, show_progress="hidden", **private)
        run.click(on_segment, [*asked, kept], [result, kept], concurrency_id="model", **private)
        click = "() => document.querySelector('#ready, #ready a, #ready button').click()"
        pack.click(on_download, [kept, kinds], ready, **private).success(
            None, None, None, js=f"() => setTimeout({click}, 300)", **private
        )
        shares, packed = gr.JSON(visible=False), gr.File(visible=False)
        gr.Button(visible=False).click(
            on_call, [*asked, kinds], [shares, packed], concurrency_id="model", api_name="segment"
        )
    return page.queue(max_size=_WAITING, default_concurrency_limit=1)


def _zip(kept: _Kept, kinds: Sequence[str], cache: str) -> str:
    """Path of a zip of what `predict` writes in these formats; Gradio moves it and deletes it."""
    if not kinds:
        raise UserError("Choose a format first.")
    formats.check(kinds, kept.found.vocabulary)
    name, source = requests.name_of(kept.path), PurePath(kept.path).name
    made, _ = writers.contents_of(name, source, kept.found, kept.settings, kinds)
    for kind in kinds:
        made |= formats.summary(kind, made.__getitem__, [name], kept.found.vocabulary)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for file, data in made.items():
            packed.writestr(file, data)
    return processing_utils.save_bytes_to_cache(buffer.getvalue(), f"{name}.zip", cache)
