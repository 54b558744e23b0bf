"""What tests of prediction share: a model with a photo, what is compiled, a server of photos."""

import http.server
import io
import threading
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(make_segmenter):
    return make_segmenter()


@pytest.fixture
def compiled(caplog):
    """A function that calls another one and returns what JAX compiled meanwhile."""

    def lines(function, *arguments, **options):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            function(*arguments, **options)
        return [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")]

    return lines


class Served(NamedTuple):
    url: str
    served: list  # what was asked for, in order
    files: dict  # address → (type, contents); a test may add some


def _png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def server():
    """A server of one photo, and of what is met in its place."""
    noisy = _png(Image.effect_noise((14, 14), 50))
    found = Served(
        "",
        [],
        {
            "/photo.png": ("image/png", _png(Image.new("RGB", (20, 10), (1, 2, 3)))),
            "/page.png": ("text/html; charset=utf-8", b"<html>Sign in</html>"),
            "/cut.png": ("image/png", noisy[: len(noisy) // 2]),
            "/text": ("text/plain", b"hello"),
            "/large": ("image/png", bytes(1000)),
            "/moved": ("", b""),
        },
    )

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found.served.append(self.path)
            if self.path == "/silent":
                time.sleep(3)
                return
            kind, body = found.files.get(self.path, ("", b""))
            status = 302 if self.path == "/moved" else 200 if self.path in found.files else 404
            self.send_response(status)
            self.send_header("Location", "/photo.png")
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield found._replace(url=f"http://127.0.0.1:{serving.server_address[1]}")
        serving.shutdown()
