"""`python -m segdiff_jax.app`: what goes wrong before there is a page is one line."""

import socket
import sys

import pytest

from segdiff_jax import app, cli
from segdiff_jax.weights import workdir


@pytest.fixture
def place(tmp_path, tiny_config):
    workdir.write_config(str(tmp_path / "w"), tiny_config())
    return tmp_path


def _run(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        cli.run(app.main, list(argv))
    return caught.value.code, capsys.readouterr()


def _one_line(capsys, message, *argv):
    code, output = _run(capsys, *argv)
    assert code == 2 and output.err.startswith("error: ") and output.err.count("\n") == 1
    assert message in output.err
    assert output.out.splitlines()[0] == "starting the page"


def test_a_checkpoint_that_is_none(place, capsys):
    _one_line(capsys, str(place / "x"), "--checkpoint", str(place / "x"))


def test_a_workdir_without_networks_ends_the_server(place, capsys):
    _one_line(capsys, str(place / "w"), "--checkpoint", str(place / "w"), "--port", "0")


def test_a_port_that_is_taken(place, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        message = f"cannot listen on 127.0.0.1:{port} (Address already in use): choose another"
        _one_line(capsys, message, "--checkpoint", str(place / "w"), "--port", port)


def test_without_gradio_it_says_what_to_install(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.startswith("segdiff_jax.web.")]:
        monkeypatch.delitem(sys.modules, name)
    _one_line(capsys, "pip install 'segdiff_jax[app]'", "--checkpoint", str(place / "w"))
