"""Checkpoints: state and metadata saved together, asynchronously, on local disk or `gs://`.

A checkpoint appears under its step number only when it is complete (Orbax renames the local folder,
or writes a commit marker on object stores), so a killed run leaves at worst a temporary folder.
Leaves are stored under plain names, `params/down_blocks/0/resnets/0/conv1/kernel`: list positions
and named tuples become dictionary keys, so what is read depends on names and shapes only, not on
the Python containers or the mesh of the run that wrote it.
"""

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from segdiff_jax.errors import UserError
from segdiff_jax.files import is_remote
from segdiff_jax.parallel import processes
from segdiff_jax.weights import checksums, step_folders
from segdiff_jax.weights.checksums import by_name
from segdiff_jax.weights.orbax_faults import seen, silence

log = logging.getLogger(__name__)

# TensorStore's words for a store that did not answer: the checkpoint may be perfectly good.
_UNREACHABLE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED")


class Checkpoints:
    """The checkpoints of one run: the last `keep`, and the best by `best_metric` when it is given.

    Every process of a run makes one and calls its methods in the same order. As a context it closes
    at the end, but not after an error among several processes: the others may never come to close.

    Args:
      directory: local or `gs://` folder that holds one folder per step.
      keep: how many of the newest to keep.
      best_metric: name in `metrics` of `save`; the checkpoint where it was highest is kept too.
      read_only: for readers of a finished or still running training; nothing is made or removed.
      guard: called before each save; raises when the folder is no longer ours to write to.

    Raises `UserError` for a path that checkpoints could not be read back from and, if they are to
    be written, where numbered folders hold something else than a complete checkpoint.
    """

    def __init__(
        self,
        directory: os.PathLike[str] | str,
        keep: int = 3,
        best_metric: str | None = None,
        read_only: bool = False,
        guard: Callable[[], None] | None = None,
    ):
        step_folders.check_path(directory)
        path = epath.Path(directory)
        self.directory = path if is_remote(directory) else path.absolute()
        self.used: int | None = None  # the step that was read last
        self._best_metric, self._guard = best_metric, guard
        self._damaged: list[int] = []
        self._noted: int | None = None
        with self._writing():
            silence()
            if not read_only and processes.is_first():
                step_folders.settle(self.directory)
                self.directory.mkdir(parents=True, exist_ok=True)
                _drop_damaged_metrics(self.directory)
            processes.barrier()
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=_options(keep, best_metric, read_only, is_remote(directory)),
                # Named here because a fresh process cannot tell how to read shapes otherwise.
                item_handlers={
                    "state": ocp.PyTreeCheckpointHandler(),
                    "metadata": ocp.JsonCheckpointHandler(),
                },
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or processes.count() == 1:
            self.close()

    def steps(self) -> list[int]:
        """List the steps of the complete checkpoints, oldest first, without those found damaged."""
        if not self.directory.exists():
            return []
        return sorted(set(self._manager.all_steps()) - set(self._damaged))

    def latest_step(self) -> int | None:
        """Return the newest of `steps()`, or None."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Return the step with the highest `best_metric`, the newer of two, or None."""
        metric = self._best_metric
        found = step_folders.scores(self.directory, self.steps(), metric) if metric else {}
        return max(found, key=lambda step: (found[step], step), default=None)

    @seen
    def save(
        self,
        step: int,
        state: Any,
        metadata: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Start saving `state` (a tree of arrays) and `metadata` (JSON values) as `step`.

        Returns when the arrays are copied off the device, which may then reuse them; files are
        written in the background. A step that is already saved is left as it is. Raises `UserError`
        when this or the previous save cannot be written.
        """
        if self._guard is not None:
            self._guard()
        with self._writing():
            for damaged in self._damaged:  # newer than what we resumed from: they would mask it
                self._manager.delete(damaged)
            self._damaged.clear()
            if step in self._manager.all_steps():
                return
            self._finish()
            if processes.is_first():
                step_folders.note(self.directory, step)
                self._noted = step
            leaves = by_name(state)
            described = {"user": metadata, "checksums": checksums.of(leaves)}
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(unflatten_dict(leaves, sep="/")),
                    metadata=ocp.args.JsonSave(described),
                ),
                metrics=metrics or {},  # None would draw a warning from Orbax on every save
                force=True,
            )

    @seen
    def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Restore the state and metadata of `step`, or of the newest readable checkpoint.

        `abstract` is a tree of `ShapeDtypeStruct`s with the shardings wanted (one local device
        where there is none); top-level entries that it leaves out are not read. Without `step`, a
        damaged checkpoint gives a warning and the one before it is used. Raises `UserError` for no
        readable checkpoint, another architecture, or a store that does not answer.
        """
        return self._newest_readable(lambda s: self._read(s, abstract), step)

    @seen
    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """Restore the metadata alone, found as by `restore`: enough to rebuild the config."""
        return self._newest_readable(self._read_metadata, step)

    @seen
    def wait(self) -> None:
        """Return when the save under way is complete. Raise `UserError` if it failed."""
        with self._writing():
            self._finish()

    @seen
    def close(self) -> None:
        """Call `wait`, then release threads. No call may follow."""
        with self._writing():
            self._finish()
            self._manager.close()

    def _finish(self) -> None:
        self._manager.wait_until_finished()
        if self._noted is not None:
            step_folders.forget(self.directory, self._noted)
            self._noted = None

    def _newest_readable(self, read: Any, step: int | None) -> Any:
        self.wait()
        candidates = self.steps()
        if step is not None and step not in candidates:
            held = ", ".join(map(str, candidates)) or "none"
            raise UserError(f"{self.directory}: no checkpoint of step {step} (there are: {held})")
        if not candidates:
            nothing = f"{self.directory}: no readable checkpoint: train first, or check it"
            raise UserError(step_folders.complaint(self.directory) or nothing)
        for candidate in reversed(candidates if step is None else [step]):
            where = self.directory / str(candidate)
            try:
                found = read(candidate)
                self.used = candidate
                return found
            except (UserError, jax.errors.JaxRuntimeError):
                raise
            except Exception as error:  # Orbax and TensorStore raise whatever the file led them to
                reason = _first_line(error)
                if isinstance(error, PermissionError) or any(w in reason for w in _UNREACHABLE):
                    raise UserError(f"{where}: cannot be read now: {reason}") from error
                if step is not None:
                    raise UserError(f"{where}: damaged checkpoint: {reason}") from error
                if processes.is_first():
                    log.warning("%s: damaged checkpoint, trying the one before: %s", where, reason)
                self._damaged.append(candidate)
        raise UserError(
            f"{self.directory}: every checkpoint is damaged: restore them from a copy, "
            "or remove this folder and run the training again"
        )

    def _read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        wanted = by_name(jax.tree.map(_with_sharding, abstract))
        tree = unflatten_dict(wanted, sep="/")
        folder = self.directory / str(step)
        args = ocp.args.PyTreeRestore(
            tree,
            restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
            partial_restore=True,
        )

        def read() -> tuple[Any, Any, Any]:
            stored = flatten_dict(self._manager.item_metadata(step)["state"].tree, sep="/")
            _check_architecture(folder, stored, wanted)
            # Not through the manager, which waits for the other processes when it has read.
            restored = ocp.PyTreeCheckpointHandler().restore(folder / "state", args=args)
            return stored, restored, _read_json(folder)

        stored, restored, metadata = _in_all(read)
        arrays = flatten_dict(restored, sep="/")
        checksums.verify(arrays, metadata["checksums"], stored)
        checksums.check_finite(arrays)
        in_order = [arrays[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract), in_order), metadata["user"]

    def _read_metadata(self, step: int) -> dict[str, Any]:
        return _in_all(lambda: _read_json(self.directory / str(step)))["user"]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a full disk and a forbidden place, however they surface, into a `UserError`."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # of the devices, or of another process that is gone
        except Exception as error:
            # The writer thread's failure arrives as a ValueError that ends in annotations, in any
            # order; the system's error code is one of them.
            system = re.search(r"os_error_code='(\d+)'", str(error))
            reason = os.strerror(int(system[1])) if system else _first_line(error)
            unreachable = any(word in reason for word in _UNREACHABLE)
            if system or unreachable or isinstance(error, OSError):
                kept = max(step_folders.numbered(self.directory), default=None)
                raise UserError(
                    f"{self.directory}: cannot write checkpoints: {reason}"
                    f"{'' if kept is None else f' (checkpoint {kept} is kept)'}: "
                    "free some space, or choose a --workdir that can be written"
                ) from error
            raise


def _in_all(read: Callable[[], Any]) -> Any:
    """Call `read()`; where it raises in one process, raise in all: they try the same step."""
    result, damage = None, None
    try:
        with processes.at_work("reads a checkpoint"):
            result = read()
    except (UserError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        damage = error
    if not processes.all_agree(damage is None):
        raise damage or ValueError("another process cannot read its part")
    return result


def _read_json(folder: epath.Path) -> dict[str, Any]:
    args = ocp.args.JsonRestore()
    return ocp.JsonCheckpointHandler().restore(folder / "metadata", args=args)


def _options(
    keep: int, best_metric: str | None, read_only: bool, remote: bool
) -> ocp.CheckpointManagerOptions:
    def score(metrics: Any) -> float:
        value = metrics.get(best_metric)
        return -math.inf if value is None or math.isnan(value) else value

    policies = ocp.checkpoint_managers
    keepers: list[Any] = [policies.LatestN(keep)]
    if best_metric and not read_only:
        keepers.append(
            policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
        )
    return ocp.CheckpointManagerOptions(
        best_fn=score if best_metric and not read_only else None,
        preservation_policy=policies.AnyPreservationPolicy(keepers),
        # In a bucket it would remove every folder without a marker: see `step_folders.settle`.
        cleanup_tmp_directories=not read_only and not remote,
        read_only=read_only,
        create=False,
        lightweight_initialize=read_only,  # else it reads every metrics file, damaged ones too
        save_interval_steps=0 if read_only else 1,
    )


def _drop_damaged_metrics(directory: epath.Path) -> None:
    """Remove unreadable metrics: Orbax reads all of them when it opens the folder to write."""
    for path in directory.glob("*/metrics/metrics"):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            log.warning("%s: damaged metrics file, removed: %s", path, _first_line(error))
            path.unlink()


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)


def _check_architecture(where: epath.Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    parts = {name.split("/")[0] for name in wanted}
    old = {n: tuple(leaf.shape) for n, leaf in stored.items() if n.split("/")[0] in parts}
    new = {n: tuple(leaf.shape) for n, leaf in wanted.items()}
    for name in new | old:
        if old.get(name) != new.get(name):
            before, now = (f"shape {t[name]}" if name in t else "absent" for t in (old, new))
            raise UserError(
                f"{where}: checkpoint of another architecture: {name} is {before} there "
                f"and {now} here: use the config it was trained with"
            )


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))[:300]
