"""Google Cloud Storage on loopback, with faults on demand.

The server is gcp-storage-emulator's, in this process; a fault is decided per request, before or
after the emulator has done its work. What it lacks and TensorStore relies on is added here: the
generation of what is downloaded, and conditions on it.
"""

import contextlib
import io
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"


class Fault:
    """What happens to the requests that `matches` (method, path): the first `times` of them.

    kind: "503" answers that and does nothing; "slow" waits `seconds` first; "drop" closes the
    connection and does nothing; "hang" does so when the fault is over, "lost" after the work, in
    place of an answer; "cut" sends half of the answer.
    """

    def __init__(
        self,
        kind: str,
        matches: Callable[[str, str], bool] = lambda method, path: True,
        times: float = 1,
        seconds: float = 0.0,
    ):
        assert kind in ("503", "slow", "drop", "hang", "lost", "cut")
        self.kind, self.matches, self.times, self.seconds = kind, matches, times, seconds
        self.seen: list[tuple[str, str]] = []  # the requests it struck
        self.over = threading.Event()

    def wait_until_seen(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.seen:
            assert time.monotonic() < end, "no request was struck"
            time.sleep(0.02)

    def strikes(self, method: str, path: str) -> bool:
        if len(self.seen) >= self.times or not self.matches(method, path):
            return False
        self.seen.append((method, path))
        return True


class Emulator(ThreadingHTTPServer):
    """A bucket named `BUCKET`, in memory. TensorStore opens many connections at once."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self) -> None:
        self.storage = Storage(use_memory_fs=True, data_dir="/")
        buckets.create_bucket(BUCKET, self.storage)
        self.faults: list[Fault] = []
        self.lock = threading.Lock()  # the emulator's storage expects one thread
        super().__init__(("127.0.0.1", 0), partial(_Handler, self.storage))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """The variables that send gcsfs and TensorStore here."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "FSSPEC_GCS_TOKEN": "anon",
        }

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        with self.lock:
            found, _ = self.storage.get_file_list(BUCKET, prefix)
            return {o["name"]: self.storage.get_file(BUCKET, o["name"]) for o in found}

    def put(self, name: str, data: bytes) -> None:
        """As another machine would: no client of this process knows."""
        url = f"{self.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}"
        urllib.request.urlopen(urllib.request.Request(url, data, method="POST")).read()

    def delete(self, name: str) -> None:
        with self.lock:
            self.storage.delete_file(BUCKET, name)

    @contextlib.contextmanager
    def failing(self, *faults: Fault) -> Iterator[None]:
        self.faults = list(faults)
        try:
            yield
        finally:
            self.faults = []
            for fault in faults:
                fault.over.set()


class _Handler(RequestHandler):
    server: Emulator

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):  # of a client that was killed
            super().handle_one_request()

    def _serve(self) -> None:
        work = getattr(super(), f"do_{self.command}")
        self.close_connection = True
        with self.server.lock:
            path = unquote(self.path)
            struck = [f for f in self.server.faults if f.strikes(self.command, path)]
        kinds = {fault.kind for fault in struck}
        time.sleep(sum(fault.seconds for fault in struck if fault.kind == "slow"))
        for fault in struck:
            if fault.kind == "hang":
                fault.over.wait()
        if kinds & {"drop", "hang"}:
            return
        body = self._body()
        if "503" in kinds:
            self.send_error(503, "Backend Error")
            return
        client, self.rfile, self.wfile = self.wfile, io.BytesIO(body), io.BytesIO()
        with self.server.lock:
            generation, refusal = self._condition(body)
            if refusal:
                self.send_response(refusal)
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                work()
        answer = self.wfile.getvalue()
        self.wfile = client
        if self.command == "GET" and generation:
            status, rest = answer.split(b"\r\n", 1)
            answer = status + f"\r\nx-goog-generation: {generation}\r\n".encode() + rest
        if "lost" in kinds:
            return
        client.write(answer[: len(answer) // 2] if "cut" in kinds else answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def _condition(self, body: bytes) -> tuple[str | None, int | None]:
        """The generation of the object that is asked for, and the answer if a condition fails."""
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        name = unquote(url.path.partition("/o/")[2]) or query.get("name", "")
        if query.get("uploadType") == "multipart":  # the name is in the first part
            name = json.loads(body.split(b"\n\n", 2)[1].split(b"\n--")[0])["name"]
        stored = self.storage.objects.get(BUCKET, {}).get(name)
        generation = stored["generation"] if stored else None
        if query.get("ifGenerationMatch", generation or "0") != (generation or "0"):
            return generation, 412
        if generation and query.get("ifGenerationNotMatch") == generation:
            return generation, 304
        return generation, None

    def _body(self) -> bytes:
        """The request's body, read before the lock is taken: a stalled client must stall no one."""
        length = self.headers.get("Content-Length")
        if length is not None:
            return self.rfile.read(int(length))
        body = b""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            del self.headers["Transfer-Encoding"]
            self.headers["Content-Length"] = str(len(body))
        return body
