"""One config on one topology: compiled, measured, searched for the largest batch that fits."""

import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax

from segdiff_jax.config import Config, to_dict
from segdiff_jax.errors import UserError
from segdiff_jax.roofline import chips, compile, plan, report, steps
from segdiff_jax.training import sharding

STEPS = ("train", "sample", "evaluate")


@dataclasses.dataclass(frozen=True)
class Target:
    """What to compile for: `topology` as in "v5e:4x4", `step` one of STEPS.

    `images` and `classes` are of one sampler call; classes of None are the config's vocabulary.
    """

    topology: str
    slices: int = 1
    step: str = "train"
    images: int = 1
    classes: int | None = None


def measure(config: Config, target: Target, *, planned: bool = False) -> dict[str, Any]:
    """The report, as JSON values. Raises `UserError` for what the config or topology cannot be.

    planned: stop at XLA's plan (`plan.py`), which is there early; of a training step only.
    """
    chip, topology, mesh = _mesh(config, target)
    step = _step(config, target, mesh)
    training = target.step == "train"
    batch = config.train.batch_size if training else step.arguments[-2].shape[0]
    made: dict[str, Any] = {
        "topology": topology,
        "slices": target.slices,
        "chips": mesh.size,
        "step": target.step,
        "mesh": " ".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
        "batch_per_chip": batch / _parts(target, mesh),
        "hbm_of_chip": chip.hbm,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "config_values": to_dict(config),
    }
    compiled = plan.plan_step(_make, config, target) if planned else compile.compile_step(step)
    made |= {"compile_seconds": compiled.seconds, "fits": isinstance(compiled, compile.Compiled)}
    made["planned"] = planned
    if isinstance(compiled, compile.OutOfMemory):
        return made | {"why": compiled.message, "largest_buffers": list(compiled.buffers)}
    figures = report.per_chip(
        compiled,
        mesh.size,
        target.slices,
        model_flops=step.model_flops / mesh.size,
        loops=_loops(step.loops, config, target, planned),
    )
    line = report.roofline(figures, chips.in_slice(chip, topology), step.images)
    if training:
        made["run"] = report.whole_run(line, chip, mesh.size, config.train.steps)
    return made | {"per_chip": figures, "roofline": line}


def _mesh(config: Config, target: Target) -> tuple[chips.Chip, str, jax.sharding.Mesh]:
    """The chip, libtpu's name of the slice, and the mesh of stand-ins."""
    chip, topology = chips.parse_topology(target.topology)
    devices = compile.devices(chip, topology, target.slices)
    return chip, topology, sharding.make_mesh(config.mesh, devices)


def _parts(target: Target, mesh: jax.sharding.Mesh) -> int:
    """Into how many parts the batch of a step is cut: the sampler's over all chips."""
    return sharding.batch_parts(mesh) if target.step == "train" else mesh.size


def _step(config: Config, target: Target, mesh: jax.sharding.Mesh) -> steps.Step:
    if target.step == "evaluate":
        return steps.evaluate_step(config, mesh)
    if target.step == "sample":
        classes = target.classes or steps.class_count(config)
        return steps.sample_step(config, mesh, target.images, classes)
    replicas, size = sharding.batch_parts(mesh), config.train.batch_size
    if size % replicas:
        raise UserError(
            f"config.train.batch_size={size} does not divide over {replicas} replicas "
            f"(data × fsdp): set --config.train.batch_size to a multiple of {replicas}"
        )
    if config.optimizer.accumulation > 1:
        raise UserError(
            "config.optimizer.accumulation: XLA counts a loop's body once: set it to 1 and "
            "config.train.batch_size to the micro-batch"
        )
    return steps.train_step(config, mesh)


def _make(config: Config, target: Target) -> steps.Step:
    """For another process, which has the config and the target only."""
    return _step(config, target, _mesh(config, target)[2])


def _make_body(config: Config, target: Target) -> steps.Step:
    loops = _make(config, target).loops
    assert loops is not None
    return loops.body


def _loops(
    loops: steps.Loops | None, config: Config, target: Target, planned: bool
) -> tuple[int, int, compile.Compiled] | None:
    if loops is None:
        return None
    compiled = (
        plan.plan_step(_make_body, config, target) if planned else compile.compile_step(loops.body)
    )
    # It is a part of what was just compiled, so it fits.
    return (*loops[:2], compiled) if isinstance(compiled, compile.Compiled) else None


def search(
    config: Config, target: Target, log: Callable[[str], None] = print, *, planned: bool = False
) -> tuple[Config, dict[str, Any]]:
    """The config with the largest batch per chip that fits, and its report.

    Starts from the config's own batch. Training steps are planned, not compiled, until one is found
    to fit; that one is compiled (unless `planned`), and the next smaller should it not fit after
    all. Raises `UserError` if not even one example per chip fits.
    """
    chip, _, mesh = _mesh(config, target)
    training, parts = target.step == "train", _parts(target, mesh)
    made: dict[int, tuple[Config, dict[str, Any]]] = {}

    def total(batch: int, planned: bool = training) -> float | None:
        resized = _with_batch(config, target, batch * parts)
        found = measure(resized, target, planned=planned)
        used = found["per_chip"]["hbm"]["total"] if found["fits"] else None
        by = "by its plan " if planned else ""
        fits = found["why"] if used is None else f"{by}fits, {used / report.GIB:.2f} GiB"
        log(f"batch {batch} per chip: {fits}")
        made[batch] = resized, found
        return used

    size = config.train.batch_size if training else config.sampler.batch_size
    best = largest_that_fits(total, max(1, size // parts), chip.hbm)
    if training and not planned:
        while best > 0 and total(best, planned=False) is None:
            best -= 1
    if best == 0:
        raise UserError(
            f"{target.topology}: not even a batch of 1 per chip fits ({made[1][1]['why']}): "
            "use more chips with config.mesh.fsdp=-1, or config.model.remat=true"
        )
    return made[best]


def _with_batch(config: Config, target: Target, size: int) -> Config:
    if target.step == "train":
        return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))
    return dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, batch_size=size))


def largest_that_fits(total: Callable[[int], float | None], start: int, capacity: float) -> int:
    """The largest n for which `total(n)` is not None; 0 if it is None for 1.

    `total` is the memory that n takes and grows about linearly, so two sizes that fit predict the
    limit: few evaluations, each of which compiles.
    """
    fitting: dict[int, float] = {}
    low, high, guess = 0, 0, start  # the largest that fits, the smallest that does not (0: unknown)
    while high == 0 or high - low > 1:
        used = total(guess)
        if used is None:
            high = guess
        else:
            low, fitting[guess] = guess, used
        guess = _next(fitting, low, high, capacity)
    return low


def _next(fitting: dict[int, float], low: int, high: int, capacity: float) -> int:
    guess = (low + high) // 2 if high else 2 * low
    if len(fitting) >= 2:
        (a, at_a), (b, at_b) = sorted(fitting.items())[-2:]
        slope = max((at_b - at_a) / (b - a), 1.0)
        predicted = b + int((capacity - at_b) / slope)
        guess = min(max(predicted, low + 1), 4 * low)
        if high and guess >= high:  # memory jumped: the line does not hold there
            guess = (low + high) // 2
    return min(max(guess, low + 1), high - 1) if high else guess
