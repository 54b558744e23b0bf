"""`python -m segdiff_jax.app`: what goes wrong before there is a page is one line."""

import socket
import subprocess
import sys

import pytest

from segdiff_jax.weights import workdir

_MAIN = "import sys; from segdiff_jax import app, cli; cli.run(app.main, sys.argv[1:])"


@pytest.fixture
def place(tmp_path, tiny_config):
    workdir.write_config(str(tmp_path / "w"), tiny_config())
    return tmp_path


def _one_line(message, *flags, before=""):
    """In a process of its own: Gradio and uvicorn change the logging of theirs."""
    command = [sys.executable, "-c", before + _MAIN, *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2 and ended.stdout.splitlines()[0] == "starting the page"
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("WARNING:absl")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_a_checkpoint_that_is_none(place):
    _one_line(str(place / "x"), "--checkpoint", str(place / "x"))


def test_a_workdir_without_networks_ends_the_server(place):
    _one_line(str(place / "w"), "--checkpoint", str(place / "w"), "--port", "0")


def test_a_port_that_is_taken(place):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        message = f"cannot listen on 127.0.0.1:{port} (Address already in use): choose another"
        _one_line(message, "--checkpoint", str(place / "w"), "--port", port)


def test_without_gradio_it_says_what_to_install(place):
    missing = "import sys; sys.modules['gradio'] = None; "
    message = "pip install 'segdiff_jax[app]'"
    _one_line(message, "--checkpoint", str(place / "w"), before=missing)
