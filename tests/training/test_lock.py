"""One training at a time in a workdir, and what becomes of the lock of a dead one."""

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from segdiff_jax.errors import UserError
from segdiff_jax.training import lock

HOLD = """
    import os, signal, sys
    from segdiff_jax.training import lock
    with lock.held(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("survived")
"""


@pytest.fixture
def left(tmp_path):
    """A function of changes: the lock that a holder with these would have left behind."""
    path = tmp_path / "run" / "lock.json"

    def leave(seconds_ago=0.0, **changes):
        with lock.held(path.parent):
            content = json.loads(path.read_text())
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content | changes | {"id": "theirs"}))
        then = time.time() - seconds_ago
        os.utime(path, (then, then))
        return path

    return leave


def test_who_comes_second_is_told_who_holds_it(tmp_path):
    workdir = tmp_path / "new" / "run"
    with lock.held(workdir) as check:
        held = json.loads((workdir / "lock.json").read_text())
        assert held["pid"] == os.getpid()
        with pytest.raises(UserError) as error, lock.held(workdir):
            pytest.fail("two hold it")
        for part in (workdir, f"process {os.getpid()} on {held['host']} since {held['since']}"):
            assert str(part) in str(error.value)
        assert "\n" not in str(error.value)
        check()
    assert not (tmp_path / "new").exists()  # nobody wrote there


def test_it_is_released_after_an_error(tmp_path):
    with pytest.raises(ValueError), lock.held(tmp_path):
        raise ValueError
    assert not os.listdir(tmp_path)


def test_the_lock_of_a_killed_process_is_known_to_be_dead(tmp_path, caplog):
    code = textwrap.dedent(HOLD)
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert ended.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["lock.json"]
    caplog.set_level(logging.INFO, "segdiff_jax")
    begun = time.monotonic()
    with lock.held(tmp_path):
        assert time.monotonic() - begun < 1
    assert "left behind by process" in caplog.text


def test_a_number_that_another_process_has_now_is_not_its_holder(left):
    with lock.held(left(process="1").parent):
        pass


@pytest.mark.parametrize("content", [b"", b'{"i', b'{"id": "1'])
def test_a_lock_that_cannot_be_read_expires_too(tmp_path, content):
    (tmp_path / "lock.json").write_bytes(content)
    os.utime(tmp_path / "lock.json", (0, 0))
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"[]", b'{"packages": {}}', b"mine"])
def test_a_file_of_the_user_is_no_lock(tmp_path, content):
    path = tmp_path / "lock.json"
    path.write_bytes(content)
    os.utime(path, (0, 0))
    with pytest.raises(UserError, match="move it away") as error, lock.held(tmp_path):
        pytest.fail("taken over")
    assert path.read_bytes() == content and "\n" not in str(error.value)


def test_a_lock_of_another_machine_is_waited_for_and_then_taken_over(left, monkeypatch, caplog):
    monkeypatch.setattr(lock, "EXPIRES", 1.5)
    caplog.set_level(logging.INFO, "segdiff_jax")
    path = left(machine="another", host="tpu-7", pid=12)
    begun = time.monotonic()
    with lock.held(path.parent):
        assert 1.5 < time.monotonic() - begun < 10
    messages = [record.getMessage() for record in caplog.records]
    assert "held by process 12 on tpu-7" in messages[0] and "waiting" in messages[0]
    assert "taken over" in messages[1] and len(messages) == 2

    path = left(machine="another", seconds_ago=3600)
    begun = time.monotonic()
    with lock.held(path.parent):
        assert time.monotonic() - begun < 1


def test_a_lock_of_another_machine_that_beats_is_respected(left):
    path, over = left(machine="another", host="tpu-7"), threading.Event()

    def beat():
        while not over.wait(0.3):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="on tpu-7 since"), lock.held(path.parent):
            pytest.fail("two hold it")
    finally:
        over.set()
        thread.join()
    assert json.loads(path.read_text())["host"] == "tpu-7"


def test_it_beats_and_who_lost_it_is_told_and_leaves_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    path = tmp_path / "lock.json"
    with lock.held(tmp_path) as check:
        first = path.stat().st_mtime_ns
        time.sleep(0.5)
        assert path.stat().st_mtime_ns > first
        theirs = json.loads(path.read_text()) | {"id": "theirs", "host": "tpu-7"}
        path.write_text(json.dumps(theirs))
        with pytest.raises(UserError, match="on tpu-7 since .* took over"):
            check()
    assert json.loads(path.read_text())["id"] == "theirs"
    time.sleep(0.2)
    assert json.loads(path.read_text())["id"] == "theirs"
