"""Measure where time goes: the parts of a start-up, and a profiler trace of some steps."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from etils import epath

from segdiff_jax import files
from segdiff_jax.config import TrainConfig
from segdiff_jax.parallel import processes


class StartUp:
    """The time to the first step in parts: `done("data")` ends the part that ran since the last.

    running: seconds that count for the first part although they passed before (`process_age`).
    """

    def __init__(self, running: float = 0.0) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter() - running

    def restart(self) -> None:
        """Restart the clock before the next stage of the same process."""
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
    """Return the seconds since this process began, imports included; 0 if unknown."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22, since boot
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


class ProfileWindow:
    """A profiler trace of `profile_steps` steps from `profile_start` on, for TensorBoard or XProf.

    `before(step, state)` is called before each step is queued, with what the step before gives:
    the window waits for it at both ends, so that it shows its own steps and all of them. `close()`
    is for the end of the run. The trace appears in `folder` (local or `gs://`) when the window is
    over. Only the first process makes one.
    """

    def __init__(self, config: TrainConfig, folder: epath.Path):
        length = config.profile_steps if processes.is_first() else 0
        self._folder, self._first = folder, config.profile_start
        self._last = self._first + length
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
