import contextlib
import io
import logging
import os
import signal
import sys
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from written import read_events, read_scalars

from segdiff_jax.config import Config, TrainConfig
from segdiff_jax.errors import UserError
from segdiff_jax.training import telemetry as module
from segdiff_jax.training.stop import GracefulStop
from segdiff_jax.training.telemetry import Telemetry, device_rates


def reports(workdir, first_step=0, stage="diffusion", **train):
    return Telemetry(Config(stage=stage, train=TrainConfig(**train)), workdir, first_step)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)
    return clock


def metrics(step):
    return {"loss": jnp.asarray(1.0 / step), "learning_rate": jnp.asarray(0.5)}


def run(telemetry, clock, seconds, first=1):
    """Steps that take `seconds` each: the device is done with step n when n + 1 is dispatched."""
    for step, duration in enumerate(seconds, first):
        clock.now += duration
        telemetry.step(step, metrics(step))
    telemetry.close()


def test_values_are_written_at_the_log_interval_and_at_the_end(tmp_path, clock):
    run(reports(tmp_path, steps=7, batch_size=2, log_every=3), clock, [1.0] * 7)
    scalars = read_scalars(tmp_path)
    assert scalars["diffusion/loss"] == pytest.approx({3: 1 / 3, 6: 1 / 6, 7: 1 / 7})
    assert scalars["diffusion/learning_rate"] == {3: 0.5, 6: 0.5, 7: 0.5}


def test_rates_leave_out_compilation_and_pauses(tmp_path, clock):
    telemetry = reports(tmp_path, steps=20, batch_size=16, log_every=5)
    for step in range(1, 21):
        clock.now += 300.0 if step <= 3 else 0.25  # steps 1 and 2 end when 2 and 3 are dispatched
        telemetry.step(step, metrics(step))
        if step == 12:
            with telemetry.paused():
                clock.now += 1000.0
    telemetry.close()
    scalars = read_scalars(tmp_path)
    assert set(scalars["diffusion/steps_per_second"]) == {5, 10, 15, 20}
    for step in (5, 10, 15):
        assert scalars["diffusion/steps_per_second"][step] == pytest.approx(4.0)
        assert scalars["diffusion/images_per_second"][step] == pytest.approx(64.0)


def test_a_log_line_per_interval_without_a_terminal(tmp_path, clock, caplog):
    with caplog.at_level(logging.INFO, "segdiff_jax"):
        telemetry = reports(tmp_path, steps=3610, batch_size=4, log_every=5, stage="vae")
        run(telemetry, clock, [2.0] * 11)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "vae step 10/3610" in lines[1]
    for part in ("loss 0.1", "steps_per_second 0.5", "images_per_second 2", "eta 2:00:00"):
        assert part in lines[1]


def test_a_progress_bar_on_a_terminal(tmp_path, clock, monkeypatch, caplog):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with caplog.at_level(logging.INFO, "segdiff_jax"):
        telemetry = reports(tmp_path, steps=8, batch_size=4, log_every=2, first_step=2)
        run(telemetry, clock, [60.0] * 6, first=3)
        shown = sys.stderr.getvalue()
    assert "8/8" in shown and "loss=" in shown
    assert not caplog.records


def test_other_processes_write_nothing_and_see_the_same_values(
    tmp_path, clock, caplog, monkeypatch
):
    monkeypatch.setattr(module.processes, "is_first", lambda: False)
    with caplog.at_level(logging.INFO, "segdiff_jax"):
        telemetry = reports(tmp_path, steps=4, batch_size=4, log_every=1)
        telemetry.step(1, metrics(1))
        assert telemetry.step(2, metrics(2)) == {"step": 1, "loss": 1.0, "learning_rate": 0.5}
        telemetry.scalars(2, {"x": 1.0})
        telemetry.images(2, "y", np.zeros((1, 2, 2, 3), np.uint8))
        telemetry.close()
    assert not list(tmp_path.iterdir()) and not caplog.records


def test_scalars_and_images_read_back(tmp_path):
    telemetry = reports(tmp_path, steps=4, batch_size=4)
    telemetry.scalars(3, {"validation/miou_present": 0.25})
    pictures = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    telemetry.images(3, "samples", pictures)
    telemetry.close()
    assert read_scalars(tmp_path)["validation/miou_present"] == {3: 0.25}
    (image,) = [
        value.image.encoded_image_string
        for event in read_events(tmp_path / "tensorboard")
        for value in event.summary.value
        if event.step == 3 and value.HasField("image")
    ]
    side_by_side = np.concatenate(list(pictures), axis=1)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), side_by_side)


def test_a_restart_marks_where_it_takes_over(tmp_path, clock):
    run(reports(tmp_path, steps=9, batch_size=1, log_every=1), clock, [1.0] * 6)
    again = reports(tmp_path, steps=9, batch_size=1, log_every=1, first_step=4)
    run(again, clock, [1.0] * 5, first=5)
    starts = [e.step for e in read_events(tmp_path / "tensorboard") if e.session_log.status == 1]
    assert starts == [1, 5]  # TensorBoard drops earlier events from that step on
    assert sorted(read_scalars(tmp_path)["diffusion/loss"]) == list(range(1, 10))


def test_object_stores_get_whole_files(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(module, "is_remote", lambda _: True)
    telemetry = reports(tmp_path / "w", steps=99, batch_size=1, log_every=1)
    telemetry.scalars(1, {"a": 1.0})
    assert not (tmp_path / "w").exists()  # not yet due
    clock.now += module.UPLOAD_SECONDS + 1
    telemetry.scalars(2, {"a": 2.0})
    while not list((tmp_path / "w").rglob("events*")):  # copied by a thread, before the end
        time.sleep(0.01)
    telemetry.scalars(3, {"a": 3.0})
    telemetry.close()
    assert read_scalars(tmp_path / "w")["a"] == {1: 1.0, 2: 2.0, 3: 3.0}


def test_a_failing_upload_is_one_warning(tmp_path, clock, monkeypatch, caplog):
    monkeypatch.setattr(module, "is_remote", lambda _: True)
    (tmp_path / "w").write_text("")
    telemetry = reports(tmp_path / "w", steps=9, batch_size=1)
    with caplog.at_level(logging.WARNING, "segdiff_jax"):
        for step in (1, 2):
            clock.now += module.UPLOAD_SECONDS + 1
            telemetry.scalars(step, {"a": 1.0})
        telemetry.close()
    assert caplog.text.count("cannot write TensorBoard events") == 1


def test_a_workdir_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "w").write_text("")
    with pytest.raises(UserError, match=str(tmp_path / "w")):
        reports(tmp_path / "w", steps=9, batch_size=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_interrupt_insists(number, capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with GracefulStop() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # a supervisor that repeats itself
        if number == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert signal.Signals(number).name in capfd.readouterr().err


def test_a_full_disk_loses_the_curve_and_not_the_run(tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    telemetry = reports(tmp_path, steps=9, batch_size=1, log_every=1)
    monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
    with caplog.at_level(logging.WARNING, "segdiff_jax"):
        for step in range(1, 9):
            telemetry.step(step, metrics(step))
        assert telemetry.fetch()["step"] == 8
        telemetry.close()
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1


def test_what_is_not_finite_is_no_scalar(tmp_path):
    with contextlib.closing(
        reports(tmp_path, steps=3, batch_size=1, log_every=1, stage="vae")
    ) as telemetry:
        for step, loss in enumerate([1.0, float("nan"), float("inf")], 1):
            telemetry.step(step, {"loss": jnp.asarray(loss), "rate": jnp.asarray(0.5)})
        telemetry.scalars(3, {"validation/a": float("-inf"), "validation/b": 0.25})
    found = read_scalars(tmp_path)
    assert found["vae/loss"] == {1: 1.0} and set(found["vae/rate"]) == {1, 2, 3}
    assert "validation/a" not in found and found["validation/b"] == {3: 0.25}


def device(kind, peak=None, limit=16 * 2**30, process=0):
    stats = {"peak_bytes_in_use": peak, "bytes_limit": limit} if peak else None
    return SimpleNamespace(device_kind=kind, process_index=process, memory_stats=lambda: stats)


def test_rates_of_devices_against_arithmetic_by_hand():
    devices = [device("TPU v5 lite", peak) for peak in (2 * 2**30, 4 * 2**30)]
    devices += [device("TPU v5 lite", 9 * 2**30, process=1)] * 2
    assert device_rates(197e12 * 2, devices) == {
        "tflops_per_chip": pytest.approx(98.5),
        "mfu": pytest.approx(0.5),
        "hbm_peak_gib": 4.0,
        "hbm_share": 0.25,
    }
    assert device_rates(1e12, [device("cpu")]) == {"tflops_per_chip": 1.0}
