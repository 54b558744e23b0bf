"""Reports of a run: TensorBoard events, a progress bar or log lines, rates.

Reading a metric waits for the device. So the metrics of a step are read one step later, when they
are ready and the next step is already queued: the device never waits for the host.
"""

import contextlib
import logging
import math
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from segdiff_jax.config import Config
from segdiff_jax.errors import UserError
from segdiff_jax.files import is_remote
from segdiff_jax.parallel import chips, processes

log = logging.getLogger(__name__)

WARMUP_STEPS = 2  # whose time is not counted: caches fill, and the first files are opened
UPLOAD_SECONDS = 60.0  # between copies of the event file to an object store


class Telemetry:
    """The reports of one run. Every process makes one, and only the first one's writes anything.

    Args:
      config: of the stage (`stages.of_stage`): its name is the prefix of tags, its steps the end.
      workdir: local or `gs://`; events go to `workdir/tensorboard/<stage>`.
      first_step: steps done before this start of the run. TensorBoard drops what an earlier start
        reported after it, since that is computed again.
      flops: what the networks need for one step over all `devices`.
      devices: that take the step; all of them by default.
    """

    def __init__(
        self,
        config: Config,
        workdir: os.PathLike[str] | str,
        first_step: int = 0,
        flops: float = 0.0,
        devices: Sequence[jax.Device] = (),
    ):
        self.stage, self._settings = config.stage, config.train
        self._flops, self._devices = flops, devices or jax.devices()
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._fetched_steps = 0
        self._interval: tuple[int, float] | None = None  # step and time where the rate starts
        self._waited = 0.0  # seconds of the interval
        self._events: _Events | None = None
        self._bar: tqdm | None = None
        # A folder per stage: when a stage restarts, TensorBoard drops only that stage's events.
        self.folder = epath.Path(workdir) / "tensorboard" / self.stage
        if processes.is_first():
            self._events = _Events(self.folder, first_step)
            if sys.stderr.isatty():
                shown = {"desc": self.stage, "unit": "step", "smoothing": 0.1}
                self._bar = tqdm(total=config.train.steps, initial=first_step, **shown)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the request for a batch, in which the host can queue no step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - started

    def step(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, float] | None:
        """Take the device scalars of the training step that was just dispatched.

        `step` counts steps done (1 … config.train.steps), as checkpoints are numbered.
        Returns the values of the step before, with its number as "step", for the loop to check
        that they are finite; None on the first call.
        """
        values = self.fetch()
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._pending = (step, metrics)
        return values

    def fetch(self) -> dict[str, float] | None:
        """Wait for the step and return its values: before a checkpoint or the end."""
        if self._pending is None:
            return None
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._fetched_steps += 1
        if self._bar is not None:
            self._bar.update(1)
        if step % self._settings.log_every == 0 or step == self._settings.steps:
            self._report(step, values)
        if self._fetched_steps == WARMUP_STEPS:
            self._interval, self._waited = (step, time.perf_counter()), 0.0
        return {"step": step, **values}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of work that is not training, such as evaluation, out of the rates."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self._interval is not None:
                step, since = self._interval
                self._interval = (step, since + time.perf_counter() - started)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write values under their own tags, e.g. {"validation/miou_present": 0.41}.

        Those that are not finite are left out: the loop stops at them and says so.
        """
        if self._events is not None:
            from tensorboardX import summary

            finite = {tag: v for tag, v in values.items() if math.isfinite(v)}
            self._events.add(step, [summary.scalar(tag, v) for tag, v in finite.items()])

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Write uint8 images [N, H, W, 3], side by side, under the tag `name`."""
        if self._events is not None:
            from tensorboardX import summary

            row = np.concatenate(list(images), axis=1)  # [H, N·W, 3]
            self._events.add(step, [summary.image(name, row, dataformats="HWC")])

    def close(self) -> None:
        """Write what is pending and wait for the last upload."""
        try:
            self.fetch()
        finally:
            if self._bar is not None:
                self._bar.close()
            if self._events is not None:
                self._events.close()

    def _report(self, step: int, values: dict[str, float]) -> None:
        rates: dict[str, float] = {}
        if self._interval is not None and step > self._interval[0]:
            rates = self._rates(step)
        everything = {**values, **rates}
        self.scalars(step, {f"{self.stage}/{name}": v for name, v in everything.items()})
        if self._events is None:
            return
        shown = {name: f"{value:.4g}" for name, value in everything.items()}
        if self._bar is not None:
            self._bar.set_postfix(shown)
            return
        total = self._settings.steps
        if rates:
            shown["eta"] = tqdm.format_interval((total - step) / rates["steps_per_second"])
        line = "  ".join(f"{name} {value}" for name, value in shown.items())
        log.info("%s step %d/%d  %s", self.stage, step, total, line)

    def _rates(self, step: int) -> dict[str, float]:
        """Return the rates of the interval that ends with `step`; begin the next one."""
        assert self._interval is not None
        now, (since_step, since) = time.perf_counter(), self._interval
        steps, seconds = step - since_step, max(now - since, 1e-9)
        waited, self._waited, self._interval = self._waited, 0.0, (step, now)
        return {
            "steps_per_second": steps / seconds,
            "images_per_second": steps / seconds * self._settings.batch_size,
            "step_seconds": seconds / steps,
            "data_wait_share": min(1.0, waited / seconds),
            **device_rates(self._flops * steps / seconds, self._devices),
        }


def device_rates(rate: float, devices: Sequence[jax.Device]) -> dict[str, float]:
    """Return how well `devices` are used that make `rate` FLOP/s together.

    tflops_per_chip; on a TPU also mfu, of the chip's bfloat16 peak (arXiv 2204.02311, appendix B);
    and, where devices tell, hbm_peak_gib and hbm_share of the fullest one of this process.
    """
    each = rate / len(devices)
    figures = {"tflops_per_chip": each / 1e12}
    if chip := chips.of_kind(devices[0].device_kind):
        figures["mfu"] = each / chip.flops
    mine = [device for device in devices if device.process_index == jax.process_index()]
    memory = [stats for device in mine if (stats := device.memory_stats())]
    if memory:
        peak, limit = max((m["peak_bytes_in_use"], m["bytes_limit"]) for m in memory)
        figures |= {"hbm_peak_gib": peak / 2**30, "hbm_share": peak / limit}
    return figures


class _Events:
    """One TensorBoard event file, on local disk or on an object store.

    Objects cannot be appended to: the file grows in a local folder, and a thread copies it to the
    store every `UPLOAD_SECONDS`. A failed write is a warning: losing a curve must not end a run.
    """

    def __init__(self, directory: epath.Path, first_step: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter  # 2 s that prediction should not pay

        self._event = Event
        self.directory = directory
        remote = is_remote(directory)
        self._local = Path(tempfile.mkdtemp(prefix="segdiff_events_")) if remote else None
        self._copier = ThreadPoolExecutor(1, "event_upload") if remote else None
        self._copy: Future[None] | None = None
        self._copied = time.perf_counter()
        self._failing: set[str] = set()
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        folder = self._local or Path(directory)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(os.fspath(folder / name))
        except OSError as error:
            raise UserError(
                f"{directory}: cannot write TensorBoard events: {error.strerror}: "
                "choose another --workdir"
            ) from error
        self._write(file_version="brain.Event:2")
        self._write(session_log=SessionLog(status=SessionLog.START), step=first_step + 1)

    def add(self, step: int, summaries: Iterable[Any]) -> None:
        """Append protocol buffers and start a copy when the last one is done and old enough."""
        for summary in summaries:
            self._write(step=step, summary=summary)
        self._attempt(self._records.flush)
        due = time.perf_counter() - self._copied > UPLOAD_SECONDS
        if self._copier is not None and due and (self._copy is None or self._copy.done()):
            self._copied = time.perf_counter()
            self._copy = self._copier.submit(self._attempt, self._upload)

    def close(self) -> None:
        self._attempt(self._records.close)
        if self._copier is not None and self._local is not None:
            self._copier.submit(self._attempt, self._upload)
            self._copier.shutdown(wait=True)
            shutil.rmtree(self._local, ignore_errors=True)

    def _write(self, **fields: Any) -> None:
        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        self._attempt(self._records.write, data)

    def _upload(self) -> None:
        assert self._local is not None
        self.directory.mkdir(parents=True, exist_ok=True)
        for file in self._local.iterdir():
            (self.directory / file.name).write_bytes(file.read_bytes())

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
            self._failing.discard(action.__name__)
        except Exception as error:
            if action.__name__ not in self._failing:  # one warning per outage
                log.warning("%s: cannot write TensorBoard events: %s", self.directory, error)
            self._failing.add(action.__name__)
