"""Rates against arithmetic done by hand, on devices that say what they are."""

import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from segdiff_jax.training.throughput import ProfileWindow, StartUp, Throughput, chip_of


def device(kind, peak=None, limit=16 * 2**30, process=0):
    stats = {"peak_bytes_in_use": peak, "bytes_limit": limit} if peak else None
    return SimpleNamespace(device_kind=kind, process_index=process, memory_stats=lambda: stats)


def test_rates_on_a_tpu():
    devices = [device("TPU v5 lite", peak) for peak in (2 * 2**30, 4 * 2**30)]
    devices.append(device("TPU v5 lite", 9 * 2**30, process=1))
    devices.append(device("TPU v5 lite", 9 * 2**30, process=1))
    figures = Throughput(197e12 * 4, devices).report(steps=10, seconds=20.0)
    assert figures == {
        "step_seconds": 2.0,
        "data_wait_share": 0.0,
        "tflops_per_chip": pytest.approx(98.5),
        "mfu": pytest.approx(0.5),
        "hbm_peak_gib": 4.0,
        "hbm_share": 0.25,
    }


def test_a_cpu_has_no_peak():
    figures = Throughput(1e9).report(steps=1, seconds=0.5)
    assert set(figures) == {"step_seconds", "data_wait_share", "tflops_per_chip"}
    assert chip_of(jax.devices()[0]) is None


def test_the_wait_is_counted_once():
    throughput = Throughput(1.0)
    with throughput.waiting():
        time.sleep(0.02)
    share = throughput.report(steps=1, seconds=0.1)["data_wait_share"]
    assert 0.2 <= share <= 1.0
    assert throughput.report(steps=1, seconds=0.1)["data_wait_share"] == 0.0


def test_start_up_parts_sum_to_the_whole():
    begun = time.perf_counter()
    startup = StartUp()
    for part in ("imports", "weights", "imports"):
        time.sleep(0.01)
        startup.done(part)
    whole = time.perf_counter() - begun
    assert list(startup.seconds) == ["imports", "weights"]
    assert startup.seconds["imports"] >= 0.02
    assert sum(startup.seconds.values()) == pytest.approx(whole, abs=0.01)
    assert startup.line().startswith("start-up ") and "weights 0.0" in startup.line()


def test_the_profile_covers_its_window_only(tmp_path, monkeypatch):
    events = []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "start_trace", lambda f: (events.append("on"), start(f)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (events.append("off"), stop()))
    window = ProfileWindow(tmp_path / "profile", first=2, steps=2)
    for step in range(1, 7):
        window.before(step)
        events.append(step)
        jnp.ones(step).sum().block_until_ready()
    window.close()
    assert events == [1, "on", 2, 3, "off", 4, 5, 6]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("first", [1, 9])
def test_a_profile_at_the_end_or_never(first, tmp_path):
    window = ProfileWindow(tmp_path / "profile", first=first, steps=5)
    for step in (1, 2):
        window.before(step)
    window.close()
    assert (tmp_path / "profile").exists() == (first == 1)
