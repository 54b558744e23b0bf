"""--images as a user writes them, and what the network sends for an address."""

import argparse
import os

import pytest

from segdiff_jax.config import DataConfig
from segdiff_jax.data.images import UnreadableError
from segdiff_jax.errors import UserError
from segdiff_jax.inference import photos, requests


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt", "sub/c.png", "sub/d[1].png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def _names(folder, *arguments):
    found = photos.find([str(folder / a) if a else str(folder) for a in arguments])
    return [os.path.relpath(p, folder) for p in found]


def test_files_folders_and_patterns(folder):
    assert _names(folder, "") == ["a.JPG", "b.png", "sub/c.png", "sub/d[1].png"]
    assert _names(folder, "sub/c.png", "*.png") == ["sub/c.png", "b.png"]
    assert _names(folder, "**/*.png") == ["b.png", "sub/c.png", "sub/d[1].png"]
    assert _names(folder, "sub/d[1].png") == ["sub/d[1].png"], "a file before a pattern"


def test_each_image_once(folder):
    os.symlink(folder / "b.png", folder / "link.png")
    assert _names(folder, "b.png", "*.png", "sub/../b.png") == ["b.png"]


def test_a_folder_whose_name_has_brackets(tmp_path):
    for name in ("g [x]/a.png", "g [x]/sub/b.png", "g x/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert _names(tmp_path, "g [x]") == ["g [x]/a.png", "g [x]/sub/b.png"]
    assert _names(tmp_path, "g [x]/*.png", "g [x]/**/*.png") == ["g [x]/a.png", "g [x]/sub/b.png"]
    assert _names(tmp_path, "g[ ]x/*.png") == ["g x/c.png"]


def test_folders_are_searched_all_the_way_down(folder):
    (folder / "sub" / ".cache").mkdir()
    (folder / "sub" / ".cache" / "e.png").write_bytes(b"x")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "there").symlink_to("sub")
    assert _names(folder, "") == ["a.JPG", "b.png", "sub/c.png", "sub/d[1].png"]


def test_what_is_no_file_is_not_passed_over(folder):
    (folder / "gone.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    assert _names(folder, "*.png") == ["b.png", "gone.png", "pipe.png"]
    assert set(_names(folder, "")) > {"gone.png", "pipe.png"}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("x[1].png", r"no file matches this pattern.*\[ and \] enclose"),
        ("gone.png", "gone.png: a link to nowhere, which does not exist"),
        ("b.png/c.png", "b.png/c.png: "),
        ("n" * 300, "no such file or folder"),
        ("none.png", "none.png: no such file or folder"),
        ("*.webp", "no file matches"),
        ("empty", "no images in this folder"),
    ],
)
def test_nothing_found(folder, argument, message):
    (folder / "empty").mkdir()
    (folder / "gone.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=message):
        _names(folder, "b.png", argument)
    with pytest.raises(UserError, match="empty name"):
        photos.find([""])


def test_a_folder_without_images_gives_its_clips(folder):
    for name in ("sub/x.mp4", "clips/b.MOV", "clips/c/a.webm", "clips/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert _names(folder, "sub") == ["sub/c.png", "sub/d[1].png"]
    assert _names(folder, "clips") == ["clips/b.MOV", "clips/c/a.webm"]


def test_addresses_and_stdin_are_taken_as_they_are(folder):
    url = "https://host/a/street%20view.jpg?width=300"
    assert photos.find([url, "-", url]) == [url, "-"]
    assert requests.image(url) == url and requests.image("-") == "-"
    names = [photos.file_name(path) for path in (url, "-", "x/y.png", "http://host/..%2Fx%2fy.png")]
    assert names == ["street view.jpg", "stdin", "y.png", "y.png"]
    assert photos.without_results([url, "-"]) == ([url, "-"], [])
    for text in ("http://", "http://[x/y.png", "ftp://host/x.png"):
        with pytest.raises(argparse.ArgumentTypeError, match="not supported"):
            requests.image(text)


def test_a_photo_is_fetched_once(server, tmp_path):
    read = photos.Photos(DataConfig(), None, str(tmp_path))
    for path in ("/photo.png", "/moved"):
        assert read.check(server.url + path).pixels.shape == (10, 20, 3)
        assert (read.read(server.url + path).pixels == (1, 2, 3)).all()
        assert read.read(server.url + path).pixels.shape == (10, 20, 3), "decoded anew"
    assert len({read.digest(server.url + path) for path in ("/photo.png", "/moved")}) == 1
    assert server.served == ["/photo.png", "/moved", "/photo.png"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none.png", "the server answers 404"),
        ("/page.png", "a web page, not an image"),
        ("/cut.png", "truncated or damaged"),
        ("/text", "not an image"),
        ("/large", "more than 0 MB"),
        ("/photo.png", "photo.png: more than 199 pixels"),
        ("/silent", "no answer for 1 s|timed out"),
        ("http://127.0.0.1:9/x.png", "check the address"),
        ("http://no-such-host.invalid/x.png", "check the address"),
    ],
)
def test_what_is_no_photo_is_one_line(server, tmp_path, monkeypatch, path, message):
    monkeypatch.setenv("SEGDIFF_NETWORK_TIMEOUT", "1" if path == "/silent" else "9")
    if path == "/large":
        monkeypatch.setattr(photos, "_MOST_BYTES", 999)
    read = photos.Photos(DataConfig(), 199, str(tmp_path))
    with pytest.raises(UnreadableError, match=message) as caught:
        read.check(path if path.startswith("http") else server.url + path)
    assert "\n" not in str(caught.value)
