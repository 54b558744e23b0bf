"""The page over random networks, in this process, and a real browser without a screen."""

import contextlib
import shutil
from concurrent.futures import Future
from typing import NamedTuple

import anyio
import pytest
from PIL import Image

from segdiff_jax.web import page as web_page
from segdiff_jax.web import server
from segdiff_jax.web.requests import Limits

# Loaded here, not when the server's thread first needs it: pytest rewrites this library, which it
# takes for a plugin, and CPython 3.11 may fail to parse in one thread while another parses too.
for name in dir(anyio):
    getattr(anyio, name)

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LIMITS = Limits(pixels=2_000_000, megabytes=3, classes=200, passes=2000)


class Served(NamedTuple):
    url: str
    files: str  # folder of uploads and results
    segmenter: object


@contextlib.contextmanager
def serve(files, loading, segmenter, monkeypatch, examples=()):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(files))
    monkeypatch.setenv("GRADIO_EXAMPLES_CACHE", str(files / "examples"))
    blocks = web_page.build(loading, segmenter.config, "Segment <b>photos</b>", LIMITS, examples)
    with server.running(blocks, "127.0.0.1", 0, LIMITS) as url:
        yield Served(url, str(files), segmenter)


@pytest.fixture(scope="session")
def served(make_segmenter, tiny_config, tmp_path_factory):
    """The page with its model loaded, two samples a photo, and an example."""
    config = tiny_config()
    config.sampler.ensemble = 2
    segmenter, loading = make_segmenter(config), Future()
    loading.set_result(segmenter)
    files = tmp_path_factory.mktemp("served") / "files"
    files.mkdir()
    Image.radial_gradient("L").convert("RGB").save(files / "round.png")
    example = web_page.Example(str(files / "round.png"), "sky\nroad")
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        serve(files, loading, segmenter, monkeypatch, [example]) as found,
    ):
        yield found


@pytest.fixture(scope="module")
def browser():
    # Not of the session: while it is open, asyncio takes its loop for one that runs in this thread.
    from playwright.sync_api import Error, sync_playwright

    path = next(filter(None, map(shutil.which, _BROWSERS)), None)  # None: Playwright's own
    with sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error:
            pytest.fail("the page is tested in Chromium: apt-get install chromium", pytrace=False)
        yield found
        found.close()
