"""The server of the page: what it listens on, and what it does not answer."""

import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import fastapi
import gradio as gr
import uvicorn

from segdiff_jax.errors import UserError
from segdiff_jax.web import viewer
from segdiff_jax.web.requests import Limits

_SESSIONS = 8  # of which the last result is kept: each may be of many megapixels
_REFUSED = ("/file=http", "/proxy=")  # by which Gradio would fetch from elsewhere for a visitor

_Message = MutableMapping[str, Any]


class _Guard:
    """Answers 403 and 413 for requests that are not to reach Gradio."""

    def __init__(self, app: Any, most: int):
        self.app, self.most = app, most

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        status = self._refusal(scope) if scope["type"] == "http" else 0
        if not status:
            return await self.app(scope, receive, send)
        text = b"The file is too large." if status == 413 else b"Not allowed."
        headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(text))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    def _refusal(self, scope: _Message) -> int:
        if any(part in scope["path"].lower() for part in _REFUSED):
            return 403
        length = dict(scope["headers"]).get(b"content-length", b"0")
        return 413 if not length.isdigit() or int(length) > self.most else 0


@contextlib.contextmanager
def running(page: gr.Blocks, host: str, port: int, limits: Limits) -> Iterator[str]:
    """Serve the page in a thread and give its address. Raise `UserError` if it cannot listen."""
    most = limits.megabytes * 2**20
    page.state_session_capacity = _SESSIONS
    app = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        "/",
        allowed_paths=[],
        max_file_size=most,
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        footer_links=["api"],
        enable_monitoring=False,
        show_error=False,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=viewer.STYLE,
    )
    guarded = _Guard(app, most + 2**20)  # what a form adds to its file
    server = uvicorn.Server(
        uvicorn.Config(guarded, log_config=None, log_level="warning", timeout_graceful_shutdown=1)
    )
    listening = _bound(host, port)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


def _bound(host: str, port: int) -> socket.socket:
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(kind, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        return found
    except (OSError, UnicodeError) as error:  # the latter of a host that cannot be a name
        reason = getattr(error, "strerror", None) or "no such name"
        raise UserError(
            f"cannot listen on {host}:{port} ({reason}): choose another --port or --host"
        ) from error
