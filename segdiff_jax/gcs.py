"""Google Cloud Storage as fsspec and epath see it: gcsfs, whose waiting is seen and ends.

gcsfs asks again up to six times, each time without an end of its own, and looks for credentials at
addresses that exist on Google's machines only. Every request of this process, from whichever
library and thread, comes through here (`files` registers this class); TensorStore's do not.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import aiohttp
import gcsfs

from segdiff_jax import waiting

_ADVICE = "check the network and your access to the bucket"
_BUCKET = re.compile(r"/b/([^/]+)/o")  # in the address of an object
# Whoever stayed silent is not asked again at once: a file that could not be written is closed,
# which tries to write it again.
_REST = 5.0  # seconds


class FileSystem(gcsfs.GCSFileSystem):
    """`gs://`, with an end to each wait: `waiting.NoAnswer`, a `UserError`."""

    # Called with the bucket and the error when a request failed for good.
    listeners: ClassVar[list[Callable[[str, Exception], None]]] = []
    _silent: ClassVar[dict[str, tuple[float, waiting.NoAnswer]]] = {}  # whom: until when, and why

    def __init__(self, *arguments: Any, **options: Any):
        seconds = waiting.limit(waiting.NETWORK)
        # Of one read: a long object takes as long as it takes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
        options.setdefault("requests_timeout", timeout)
        sent = aiohttp.TraceConfig()
        sent.on_request_chunk_sent.append(_on_chunk_sent)
        own = {"response_class": _Response, "trace_configs": [sent]}
        options["session_kwargs"] = own | (options.get("session_kwargs") or {})
        whom, connect = "Google's sign-in to gs://", super().__init__
        wait = waiting.Wait(whom, waiting.NETWORK, "check the network and your credentials")
        with self._resting(whom):
            waiting.bounded(lambda: connect(*arguments, **options), wait)
        self._spent = wait.seconds()

    async def _request(self, method: str, path: str, *arguments: Any, **options: Any) -> Any:
        request = super()._request

        async def send() -> Any:
            if self.credentials.credentials is not None:
                # It would wait in this thread, which has the requests of all others to serve.
                await asyncio.wrap_future(waiting.in_background(self.credentials.maybe_refresh))
            return await request(method, path, *arguments, **options)

        named = _BUCKET.search(path)
        return await self._answered(send, named[1] if named else str(*arguments[:1]))

    async def _get_file(self, rpath: str, *arguments: Any, **options: Any) -> Any:
        get = super()._get_file
        bucket = self._strip_protocol(rpath).split("/")[0]
        return await self._answered(lambda: get(rpath, *arguments, **options), bucket)

    async def _answered(self, request: Callable[[], Any], bucket: str) -> Any:
        spent, self._spent = self._spent, 0.0
        wait = waiting.Wait(f"gs://{bucket}", waiting.NETWORK, _ADVICE, spent)
        try:
            with self._resting(bucket):
                return await waiting.answered(request(), wait)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            for listener in list(self.listeners):
                listener(bucket, error)
            raise

    @classmethod
    @contextlib.contextmanager
    def _resting(cls, whom: str) -> Iterator[None]:
        until, reason = cls._silent.get(whom, (0.0, None))
        if reason is not None and time.monotonic() < until:
            raise waiting.NoAnswer(str(reason))
        try:
            yield
        except waiting.NoAnswer as error:
            cls._silent[whom] = time.monotonic() + _REST, error
            raise


class _Response(aiohttp.ClientResponse):
    """An answer whose bytes are signs of life to the wait for it."""

    async def start(self, connection: Any) -> Any:
        response = await super().start(connection)
        waiting.watch(lambda: self.content.total_raw_bytes)
        return response


async def _on_chunk_sent(*_: Any) -> None:
    waiting.heard()
