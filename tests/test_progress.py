"""Progress lines where stderr is no terminal."""

import io
import time

import pytest

from segdiff_jax import progress


@pytest.fixture
def clock(monkeypatch):
    """[the time in seconds]."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_lines_show_rate_and_remaining_time(capsys, clock):
    report = progress.reporter("evaluate")
    report(0, 100)
    clock[0] = 60.0  # compilation: no part of the rate
    for done in range(1, 101):
        report(done, 100)
        clock[0] += 0.5
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluate: 1/100 images"
    assert lines[1] == "evaluate: 21/100 images, 2.00 images/s, ETA 00:39"
    assert lines[-1] == "evaluate: 100/100 images, 2.00 images/s, ETA 00:00"
    assert len(lines) == 6


def test_a_line_counts_whole_pieces_and_a_rate_without_needless_digits(capsys, clock):
    report = progress.reporter("predict")
    report(0, 6)
    report(1.5, 6)
    clock[0] = 12.5
    report(3.99, 6)
    clock[0] += 0.005
    report(6, 6)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "predict: 3/6 images, 0.20 images/s, ETA 00:10"
    assert last.startswith("predict: 6/6 images, 0.36 images/s")
    report = progress.reporter("check")
    report(1, 1001)
    clock[0] += 0.5
    report(1001, 1001)
    assert "1001/1001 images, 2000 images/s" in capsys.readouterr().err


def test_short_work_is_one_line_and_of_a_single_piece_the_part_that_is_done(capsys, monkeypatch):
    report = progress.reporter("predict")
    for done in range(3):
        report(done, 2)
    assert capsys.readouterr().err.startswith("predict: 2/2 images")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    progress.reporter("predict")(0.37, 1)
    assert capsys.readouterr().err == "predict: 0.37/1 images\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_that_something_goes_on(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_TICK", 0.01)
    with progress.working("loading x"):
        time.sleep(0.2)
    written = terminal.getvalue()
    assert written.startswith("\rloading x .  ") and written.count("\r") > 5
    assert written.endswith("\r\x1b[K"), "and leaves the line empty"
    report = progress.reporter("predict")
    report(0, 2)
    time.sleep(0.2)
    assert terminal.getvalue().count("0/2") > 5, "the clock moves while nothing is finished"
    report(0.25, 2)
    report(2, 2)
    assert "0.25/2" in terminal.getvalue() and "2/2" in terminal.getvalue()


def test_nothing_moves_where_nobody_looks(capsys):
    with progress.working("loading x"), progress.working("y", enabled=False):
        pass
    assert capsys.readouterr() == ("", "")
