"""`python -m segdiff_jax.app`: what goes wrong before there is a page is one line."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from segdiff_jax import app
from segdiff_jax.errors import UserError
from segdiff_jax.web.requests import Limits
from segdiff_jax.weights import workdir

_MAIN = """
import sys
from segdiff_jax import app, cli
for port in sys.argv[2:]:
    try:
        cli.run(app.main, ["--checkpoint", sys.argv[1], "--port", port])
    except SystemExit as ended:
        assert ended.code == 2
"""


@pytest.fixture
def place(tmp_path, tiny_config):
    workdir.write_config(str(tmp_path / "w"), tiny_config())
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def _lines(place, *ports, before=""):
    """In a process of its own: Gradio and uvicorn change the logging of theirs."""
    command = [sys.executable, "-c", before + _MAIN, str(place / "w"), *ports]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("starting the page") == len(ports)
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("WARNING:absl")]
    assert len(lines) == len(ports) and all(line.startswith("error: ") for line in lines), lines
    return lines


def test_a_port_that_is_taken_and_a_workdir_without_networks(place):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        taken, empty = _lines(place, port, "0")
    message = f"cannot listen on 127.0.0.1:{port} (Address already in use): choose another"
    assert message in taken and str(place / "w") in empty, "the latter ends the server"


def test_without_gradio_it_says_what_to_install(place):
    (line,) = _lines(place, "0", before="import sys; sys.modules['gradio'] = None\n")
    assert "pip install 'segdiff_jax[app]'" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--port", "70000"], "--port 70000: give a number from 0 to 65535"),
        (["--host", "a" * 70], "cannot listen on aaa.*: choose another --port or --host"),
        (["--examples", "."], r"--examples \.: no images in this folder"),
    ],
)
def test_addresses_and_folders_that_are_none(flags, words, place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=words):
        app.main(["--checkpoint", "w", "--port", "0", *flags])


def test_examples_of_the_same_name_stay_apart_and_a_broken_one_is_named(place, tiny_config):
    given, temporary = place / "photos", str(place / "temporary")
    for folder, gray in (("a", 50), ("b", 200)):
        (given / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8), (gray,) * 3).save(given / folder / "x.png")
    one, two = app._examples(str(given), temporary, tiny_config(), None, Limits())
    assert (Path(one.photo).name, Path(two.photo).name) == ("x.png", "x.png")
    assert Path(one.photo).read_bytes() == (given / "a" / "x.png").read_bytes()
    assert Path(two.photo).read_bytes() == (given / "b" / "x.png").read_bytes()
    (given / "c.jpg").write_text("no photo")
    with pytest.raises(UserError, match=r"photos/c\.jpg: c\.jpg is no photo that can be read"):
        app._examples(str(given), str(place / "others"), tiny_config(), None, Limits())


def test_an_example_names_its_classes_as_a_visitor_would(tmp_path, tiny_config):
    config = tiny_config()
    config.data.source = "scenes"
    first, *_ = app._examples(None, str(tmp_path), config, None, Limits())
    assert first.classes.startswith("background; ") and "\n" not in first.classes
