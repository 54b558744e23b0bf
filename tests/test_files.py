"""Whole files or none, and one-line errors, with failures made by the operating system."""

import contextlib
import errno
import json
import os
import resource
import stat

import pytest
from etils import epath

from segdiff_jax import files, ownership
from segdiff_jax.data import images
from segdiff_jax.errors import UserError
from segdiff_jax.inference import photos, requests
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.weights import pretrained


def _message(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def _file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_writes_and_replaces(tmp_path):
    target = tmp_path / "new" / "folder" / "a.bin"
    for data in (b"first, the longer one", b"second", b""):
        files.write_bytes(target, data)
        assert target.read_bytes() == data
    assert os.listdir(target.parent) == ["a.bin"]
    wide = "字" * 85  # as long as a name can be
    files.write_text(epath.Path(tmp_path) / wide, "né\n")
    assert (tmp_path / wide).read_bytes() == b"n\xc3\xa9\n"


def test_permissions_are_those_that_the_umask_allows_a_plain_file(tmp_path, monkeypatch):
    before = os.umask(0o027)
    try:
        # The umask is the process's, whose other threads make files too.
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("umask was set"))
        files.write_bytes(tmp_path / "ours", b"")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o640


@pytest.mark.parametrize("scheme", ["s3", "http", "foo", "S3", "hf", "file"])
def test_other_stores_are_refused_wherever_a_path_is_opened(tmp_path, monkeypatch, scheme):
    monkeypatch.chdir(tmp_path)
    place = f"{scheme}://bucket/x"
    for call in (
        *(lambda: files.write_text(place, "x"), lambda: files.check_writable(place)),
        *(lambda: images.read_image(place), lambda: Segmenter.load(place)),
        *(lambda: pretrained.load(place), lambda: pretrained.load(f"{place}.safetensors")),
        *(lambda: pretrained.describe(f"{place}.safetensors"), lambda: ownership.owned(place)),
        lambda: requests.parse_classes("@" + place),
        *([lambda: photos.find([place])] if scheme != "http" else []),
    ):
        assert f"{scheme.lower()}:// is not supported, only local paths and gs://" in _message(call)
    assert os.listdir(tmp_path) == []


def test_bytes_that_are_no_utf8_are_shown(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xff")
    files.write_json(tmp_path / "a.json", {name: [name]})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"caf\\xe9 \\xff": ["caf\\xe9 \\xff"]}
    files.write_text(tmp_path / "a.txt", f"é{name}\ud800")
    assert (tmp_path / "a.txt").read_text("utf-8") == "écaf\\xe9 \\xff\\ud800"


def test_json(tmp_path):
    value = {"name": "café", "iou": 0.25, "none": None, "list": [1, 2]}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and "café" in text and text.endswith("}\n")
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"iou": float("nan")})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == text


def test_failure_in_the_middle_keeps_the_old_file(tmp_path):
    target = tmp_path / "a.bin"
    files.write_bytes(target, b"old")
    with _file_size_limit(1000):
        message = _message(files.write_bytes, target, bytes(100_000))
    assert str(target) in message and "File too large" in message
    assert os.listdir(tmp_path) == ["a.bin"] and target.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "permission denied: choose a place"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_late_error_leaves_nothing(tmp_path, monkeypatch, code, mend):
    def failing(error):
        def fsync(handle):
            raise error

        monkeypatch.setattr(os, "fsync", fsync)

    target = tmp_path / "a.bin"
    failing(OSError(code, os.strerror(code)))
    message = _message(files.write_bytes, target, b"data")
    assert str(target) in message and mend in message
    assert os.listdir(tmp_path) == []
    failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(target, b"data")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux device")
def test_what_is_no_plain_file_is_written_and_not_replaced(tmp_path):
    assert "the disk is full" in _message(files.write_bytes, "/dev/full", b"data")
    files.write_bytes(os.devnull, b"data")
    assert all(stat.S_ISCHR(os.stat(path).st_mode) for path in ("/dev/full", os.devnull))
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    files.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"


def test_places_that_cannot_be(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    assert "directory" in _message(files.write_bytes, tmp_path / "folder", b"")
    assert "not a directory" in _message(files.write_bytes, tmp_path / "file" / "a", b"")
    assert "too long" in _message(files.write_bytes, tmp_path / ("n" * 300), b"")
    assert "not a directory" in _message(files.check_writable, tmp_path / "file")
    assert "not a directory" in _message(files.check_writable, tmp_path / "file" / "a")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_check_writable(tmp_path, monkeypatch):
    files.check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    assert "permission denied" in _message(files.check_writable, tmp_path)
