"""One name for all commands."""

import pytest

from segdiff_jax import __main__ as segdiff
from segdiff_jax import __version__


def run(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        segdiff.main(list(argv))
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize("command", list(segdiff.COMMANDS))
def test_each_command_is_the_module_of_its_name(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    module = {"data": "check"}.get(command, command)  # segdiff_jax.data is a package
    assert code == 0 and f"python -m segdiff_jax.{module}" in out


def test_without_a_command_they_are_listed(capsys):
    code, out, _ = run(capsys)
    assert code == 0 and all(command in out for command in segdiff.COMMANDS)
    assert run(capsys, "--version")[1].split()[-1] == __version__


def test_bad_input_is_one_line_and_code_2(capsys):
    code, _, err = run(capsys, "segment")
    assert code == 2 and err.startswith("error: segment: no such command") and err.count("\n") == 1
    code, _, err = run(capsys, "predict", "--output", "x")
    assert code == 2 and err.count("\n") == 1
