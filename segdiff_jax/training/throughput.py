"""How well a run uses its chips: time per step, FLOP/s, the wait for data, memory, start-up."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from segdiff_jax import files
from segdiff_jax.parallel.chips import CHIPS, Chip

_KINDS = {  # `jax.Device.device_kind` of the chips in `parallel.chips`
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def chip_of(device: jax.Device) -> Chip | None:
    """The chip that `device` is; None for a CPU, a GPU and a TPU whose peak is not known here."""
    name = _KINDS.get(device.device_kind)
    return CHIPS[name] if name else None


class Throughput:
    """Rates over the steps between two calls of `report`.

    Args:
      flops: of one step over all devices, counted from the architecture (`models.flops`).
      devices: that take the step; all of them by default.
    """

    def __init__(self, flops: float, devices: Iterable[jax.Device] | None = None):
        self._flops = flops
        self._devices = list(jax.devices() if devices is None else devices)
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the request for a batch: time in which the host can queue no step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - started

    def restart(self) -> None:
        """Forgets the waits so far, which belong to the start of the run."""
        self._waited = 0.0

    def report(self, steps: int, seconds: float) -> dict[str, float]:
        """The figures of `steps` steps that took `seconds` together.

        step_seconds, data_wait_share (of the time), tflops_per_chip; on a TPU also mfu, of the
        chip's bfloat16 peak (arXiv 2204.02311, appendix B), and hbm_peak_gib and hbm_share of the
        fullest local device since the start.
        """
        waited, self._waited = self._waited, 0.0
        rate = self._flops * steps / seconds / len(self._devices)
        figures = {
            "step_seconds": seconds / steps,
            "data_wait_share": min(1.0, waited / seconds),
            "tflops_per_chip": rate / 1e12,
        }
        chip = chip_of(self._devices[0])
        if chip is not None:
            figures["mfu"] = rate / chip.flops
        return figures | memory(self._devices)


def memory(devices: Sequence[jax.Device]) -> dict[str, float]:
    """hbm_peak_gib and hbm_share of the fullest of this process's `devices`; {} on a CPU."""
    mine = [device for device in devices if device.process_index == jax.process_index()]
    stats = [found for device in mine if (found := device.memory_stats())]
    if not stats:
        return {}
    fullest = max(stats, key=lambda found: found["peak_bytes_in_use"])
    peak = fullest["peak_bytes_in_use"]
    return {"hbm_peak_gib": peak / 2**30, "hbm_share": peak / fullest["bytes_limit"]}


class StartUp:
    """The time to the first step in parts: `done("data")` ends the part that ran since the last.

    running: seconds that count for the first part although they passed before (`process_age`).
    """

    def __init__(self, running: float = 0.0) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter() - running

    def restart(self) -> None:
        """Before the next stage of the same process: what ran until now was no start."""
        self.seconds.clear()
        self._since = time.perf_counter()

    def done(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now

    def line(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"start-up {sum(self.seconds.values()):.1f} s: {parts}"


def process_age() -> float:
    """Seconds since this process began, imports included; 0 where the system does not tell."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22, since boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


class ProfileWindow:
    """A profiler trace of `steps` steps that begins before step `first`, for TensorBoard or XProf.

    `before(step, state)` is called before each step is queued, with what the step before gives:
    the window waits for it at both ends, so that it shows its own steps and all of them. `close()`
    is for the end of the run. The trace appears in `folder` (local or `gs://`) when the window is
    over. `steps` = 0: none.
    """

    def __init__(self, folder: os.PathLike[str] | str, first: int, steps: int):
        self._folder, self._first, self._last = epath.Path(folder), first, first + steps
        self._trace: str | None = None

    def before(self, step: int, state: Any = None) -> None:
        if self._trace is None and self._first <= step < self._last:
            jax.block_until_ready(state)
            self._trace = tempfile.mkdtemp(prefix="segdiff_profile_")
            jax.profiler.start_trace(self._trace)  # it cannot write to an object store
            self._first = self._last  # once
        elif self._trace is not None and step >= self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self._trace is None:
            return
        trace, self._trace = Path(self._trace), None
        try:
            jax.profiler.stop_trace()
            for path in trace.rglob("*"):
                if path.is_file():
                    target = self._folder / path.relative_to(trace).as_posix()
                    files.write_bytes(target, path.read_bytes())
        finally:
            shutil.rmtree(trace, ignore_errors=True)
