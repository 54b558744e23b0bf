"""`python -m segdiff_jax.app`: what goes wrong before there is a page is one line."""

import re
import signal
import socket
import subprocess
import sys

import pytest

from segdiff_jax import app
from segdiff_jax.errors import UserError
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
    return tmp_path


def test_a_checkpoint_that_is_none(place):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(UserError, match=re.escape(str(place / "x"))):
            app.main(["--checkpoint", str(place / "x")])
    finally:
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
