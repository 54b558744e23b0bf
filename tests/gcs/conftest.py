"""A bucket on loopback for every test of this folder."""

import os
import threading

import fsspec
import pytest
from emulator import BUCKET, Emulator
from etils.epath import backend

from segdiff_jax import files  # noqa: F401  sets gcsfs up, before anything imports it


@pytest.fixture(scope="session")
def _server():
    server = Emulator()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ |= server.environment()  # for the processes that tests start, and for this one
    yield server
    for name in server.environment():
        del os.environ[name]
    server.shutdown()


@pytest.fixture
def gcs(_server):
    """The emulator, its bucket empty, and `gs://` of this process and its children sent to it."""
    _server.storage.wipe(keep_buckets=True)
    fsspec.config.conf["gcs"]["token"] = "anon"  # the environment was read at import
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield _server
    _server.faults = []
    del fsspec.config.conf["gcs"]["token"]


@pytest.fixture
def bucket(gcs):
    return f"gs://{BUCKET}"


@pytest.fixture
def impatient(monkeypatch):
    """gcsfs tries as often as ever, but does not wait half a minute in between."""
    import gcsfs.retry

    monkeypatch.setattr(gcsfs.retry, "min", lambda *_: 0.01, raising=False)
