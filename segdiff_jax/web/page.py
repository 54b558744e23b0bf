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
_PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # of events that no program may cause

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
    """What a visitor may try the page with."""

    photo: str  # path
    classes: str  # as a visitor would write them


class _Kept(NamedTuple):
    """What a visitor has seen last."""

    path: str
    encoded: Any  # of `Segmenter.encode`: other words for the same photo need the VAE no more
    found: Segmentation
    settings: dict[str, Any]


def _upload(**options: Any) -> gr.Image:
    """Make an image component that hands over the path of an upload and does not decode it.

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
    """Say on the page what a visitor can mend; names are no markup there."""
    try:
        yield
    except (UserError, ValueError) as error:
        message = html.escape(str(error), quote=False)
        raise gr.Error(message, duration=12, print_exception=False) from error


class _Model(NamedTuple):
    """The model, which may still be loading, and what may be asked of it."""

    loading: "Future[Segmenter]"
    config: Config
    limits: Limits


def _segment(
    model: _Model,
    photo: str | None,
    classes: str,
    asked: dict[str, Any],
    kept: _Kept | None = None,
    say: Callable[[float, str], None] = lambda part, text: None,
) -> _Kept:
    """Segment the upload at `photo`; `kept` spares the VAE where it is of the same one.

    say: is told which part of the work, 0…1, is done, and what comes next.
    """
    pixels = requests.photo(photo, model.config.data, model.limits)
    wanted = requests.classes(classes, model.limits)
    settings = requests.settings(asked, model.config, len(wanted), model.limits)
    if not model.loading.done():
        say(0.05, "The model is being loaded")
    segmenter = model.loading.result()
    say(0.15, "Looking at the photo")
    encoded = kept.encoded if kept and kept.path == photo else segmenter.encode(pixels)
    counted = "1 class" if len(wanted) == 1 else f"{len(wanted)} classes"
    say(0.3, f"Painting {counted} (the first time takes longer)")
    return _Kept(str(photo), encoded, segmenter(encoded, wanted, **settings), settings)


def build(
    loading: "Future[Segmenter]",
    config: Config,
    title: str,
    limits: Limits,
    examples: Sequence[Example],
) -> gr.Blocks:
    """Make the page over a model that may still be `loading`."""

    def status() -> Iterator[str]:
        begun = time.monotonic()
        while not loading.done():
            yield f"Loading the model: {time.monotonic() - begun:.0f} s. You can fill in the form."
            time.sleep(0.5)
        yield "" if loading.exception() is None else "The model could not be loaded."

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(_HOUR // 4, _HOUR)) as page:
        gr.Markdown(f"## {html.escape(title)}")
        shown_status = gr.Markdown("Loading the model…", elem_id="status")
        page.load(
            status, None, shown_status, concurrency_limit=None, show_progress="hidden", **_PRIVATE
        )
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                question = _question(config)
            with gr.Column(scale=7, min_width=300):
                answer = _answer()
        if examples:
            inputs = [question.photo, question.words]
            gr.Examples([list(e) for e in examples], inputs, label="Examples")
        _connect(page, _Model(loading, config, limits), question, answer)
    return page.queue(max_size=_WAITING, default_concurrency_limit=1)


class _Question(NamedTuple):
    """The controls by which a visitor asks."""

    photo: gr.Image
    words: gr.Textbox
    understood: gr.Markdown  # how the words were read
    run: gr.Button
    settings: list[Any]  # steps, ensemble, seed, closed


def _question(config: Config) -> _Question:
    photo = _upload(label="Photo", sources=["upload", "clipboard"], height=240, elem_id="photo")
    words = gr.Textbox(
        label="What to look for",
        lines=4,
        max_lines=12,
        elem_id="classes",
        placeholder="sky\nbuilding, house\nroad",
        info="One class a line, or ; between them. Synonyms after a comma.",
    )
    understood = gr.Markdown(elem_id="understood")
    run = gr.Button("Segment", variant="primary", elem_id="segment")
    with gr.Accordion("Settings", open=False):
        steps = gr.Slider(
            1,
            min(50, config.diffusion.num_train_timesteps),
            config.sampler.steps,
            step=1,
            label="Steps",
            info="of denoising: more are slower and finer",
        )
        ensemble = gr.Slider(
            1,
            16,
            config.sampler.ensemble,
            step=1,
            label="Ensemble",
            info="samples to merge: from 2 on there is a map of uncertainty",
        )
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        closed = gr.Checkbox(config.codec.closed, label="Every pixel belongs to one of the classes")
    return _Question(photo, words, understood, run, [steps, ensemble, seed, closed])


class _Answer(NamedTuple):
    """What a visitor is shown, and the controls of the download."""

    result: gr.HTML
    kept: gr.State
    kinds: gr.CheckboxGroup
    pack: gr.Button
    ready: gr.DownloadButton  # hidden: a script presses it when the zip is made


def _answer() -> _Answer:
    result = gr.HTML(
        html_template='<div class="viewer"></div>', js_on_load=viewer.SCRIPT, elem_id="result"
    )
    with gr.Accordion("Download", open=False):
        kinds = gr.CheckboxGroup(
            _FORMATS, value=["labels"], label="Formats", show_label=False, elem_id="formats"
        )
        pack = gr.Button("Download as zip", elem_id="download")
        ready = gr.DownloadButton(visible="hidden", elem_id="ready")
    return _Answer(result, gr.State(None, time_to_live=_HOUR), kinds, pack, ready)


def _connect(page: gr.Blocks, model: _Model, question: _Question, answer: _Answer) -> None:
    """Say what the page does when a visitor acts, and what programs may call.

    Gradio hands over one argument for each control. Programs name them as they are named here.
    """

    def on_segment(photo, classes, steps, ensemble, seed, closed, kept, progress=gr.Progress()):
        asked = {"steps": steps, "ensemble": ensemble, "seed": seed, "closed": closed}
        with _told():
            say = lambda part, text: progress(part, desc=text)  # noqa: E731
            kept = _segment(model, photo, classes, asked, kept, say)
        return viewer.data(kept.found), kept

    def on_download(kept, kinds):
        with _told():
            if kept is None:
                raise UserError("Segment a photo first: nothing is kept for longer than an hour.")
            return _zip(kept, kinds, page.GRADIO_CACHE)

    def on_call(photo, classes, steps, ensemble, seed, closed, kinds):
        """Return the share of each class, the settings used, and a zip in the formats asked for."""
        asked = {"steps": steps, "ensemble": ensemble, "seed": seed, "closed": closed}
        with _told():
            kept = _segment(model, photo, classes, asked)
            shares = {"classes": kept.found.shares(), "settings": kept.settings}
            return shares, _zip(kept, kinds, page.GRADIO_CACHE)

    def understood(text: str) -> str:
        with contextlib.suppress(UserError):
            wanted = requests.classes(text, model.limits)
            loaded = model.loading.done() and model.loading.exception() is None
            read = requests.not_read(model.loading.result(), wanted) if loaded else ""
            return html.escape(wanted.summary() + read)
        return ""

    result, kept, kinds, pack, ready = answer
    asked = [question.photo, question.words, *question.settings]
    question.words.change(
        understood,
        question.words,
        question.understood,
        queue=False,
        show_progress="hidden",
        **_PRIVATE,
    )
    # Under another photo the masks of the last one would pass for its own.
    question.photo.change(
        lambda: (None, None), None, [result, kept], queue=False, show_progress="hidden", **_PRIVATE
    )
    question.run.click(
        on_segment, [*asked, kept], [result, kept], concurrency_id="model", **_PRIVATE
    )
    click = "() => document.querySelector('#ready, #ready a, #ready button').click()"
    pack.click(on_download, [kept, kinds], ready, **_PRIVATE).success(
        None, None, None, js=f"() => setTimeout({click}, 300)", **_PRIVATE
    )
    shares, packed = gr.JSON(visible=False), gr.File(visible=False)
    gr.Button(visible=False).click(
        on_call, [*asked, kinds], [shares, packed], concurrency_id="model", api_name="segment"
    )


def _zip(kept: _Kept, kinds: Sequence[str], cache: str) -> str:
    """Zip what `predict` writes in these formats, and return the path. Gradio deletes it later."""
    if not kinds:
        raise UserError("Choose a format first.")
    formats.check(kinds, kept.found.vocabulary)
    name, source = requests.name_of(kept.path), PurePath(kept.path).name
    name += "_" * writers.is_coco(name)
    made, _ = writers.contents_of(name, source, kept.found, kept.settings, kinds)
    for kind in kinds:
        made |= formats.summary(kind, made.__getitem__, [name], kept.found.vocabulary)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for file, data in made.items():
            packed.writestr(file, data)
    return processing_utils.save_bytes_to_cache(buffer.getvalue(), f"{name}.zip", cache)
