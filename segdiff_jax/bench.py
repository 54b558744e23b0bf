"""Time this package side by side with what people use instead: `segdiff bench SUITE`.

suite ─► equal outputs asserted ─► rounds in turn ─► ratios, with machine, versions, commit ─► JSON
                                                     against an older JSON: what got worse
"""

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from segdiff_jax import aot, cli, files
from segdiff_jax import config as configs
from segdiff_jax.benchmarks.timing import Figure, NotRun, Ratio, Result, Spread
from segdiff_jax.errors import UserError
from segdiff_jax.parallel import chips, mesh, roofline, runtime
from segdiff_jax.stored import read_object
from segdiff_jax.version import code_version

SUITES = {  # what each needs beside the package's own libraries
    "cpu": ("torch", "diffusers"),
    "predict": ("torch", "diffusers", "transformers"),
    "input": (),
    "gpu": ("torch", "diffusers"),
    "tpu": ("libtpu",),
}
WORSE = 1.15  # of an earlier ratio
_TOPOLOGY = "v5e:2x2"
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "pillow", "grain", "torch", "diffusers")

_DESCRIPTION = """Time this package side by side with what people use instead. A ratio is our time
over theirs in the same round, as median (least to most). Equal outputs are asserted first.

cpu      Stable Diffusion 2's networks on two cores in float32, against diffusers (10 GB of memory)
predict  the paper's pipeline of diffusers modules; start-up; many photos, a large one, many classes
input    training examples a core makes, from JPEGs and from the latent cache
gpu      training step, sampler, attention and VAE on one NVIDIA card, against diffusers
tpu      what the TPU compiler says of a training step (segdiff aot); nothing is timed

docs/performance.md says what the figures mean."""


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    missing = [name for name in SUITES[args.suite] if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join("'jax[tpu]'" if name == "libtpu" else name for name in missing)
        raise UserError(
            f"bench {args.suite}: {' and '.join(missing)} not installed: pip install {packages}"
        )
    old = _read(args.compare, args) if args.compare else {}
    if args.json:
        files.check_writable(os.path.dirname(args.json) or ".")  # now, not after the work
    # Two libraries share a card, and JAX would take most of its memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    runtime.start()
    before = _load()
    results = []
    for result in _suite(args.suite)(args.small):
        print(line(result), flush=True)
        results.append(result)
    made = _report(args, results, before)
    if args.json:
        files.write_json(args.json, made)
    worse = compare(made["ratios"], old)
    if worse:
        print("\n".join(worse))
    if worse or any(isinstance(result, NotRun) and result.failed for result in results):
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("segdiff_jax.bench", _DESCRIPTION)
    add = parser.add_argument
    add("suite", choices=SUITES, metavar="SUITE", help=", ".join(SUITES))
    add("--small", action="store_true", help="narrow networks, in seconds: says that it runs")
    add("--json", type=cli.file, metavar="FILE", help="also write everything here")
    worse = f"exit 1 if a ratio is more than {WORSE - 1:.0%} above the one in this --json of before"
    add("--compare", type=cli.path, metavar="OLD.json", help=worse.replace("%", "%%"))
    return parser


def _suite(name: str) -> Any:
    # By name: each imports libraries that the others do not need.
    return _tpu if name == "tpu" else importlib.import_module(f"segdiff_jax.benchmarks.{name}").run


def _read(path: str, args: argparse.Namespace) -> dict[str, Any]:
    """Read the ratios of an earlier report of the same suite and size, by name."""
    old = read_object(path, "name a file that bench --json wrote")
    try:
        found = {name: ratio["ratio"][0] + 0.0 for name, ratio in old["ratios"].items()}
        kind = old["suite"], old["small"]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"--compare {path}: is no file that bench --json wrote") from error
    if kind != (args.suite, args.small):
        size = " --small" if kind[1] else ""
        raise UserError(f"--compare {path}: is of `bench {kind[0]}{size}`: name one of this suite")
    return found


def compare(ratios: dict[str, Any], old: dict[str, float]) -> list[str]:
    """Return a line for each ratio that got worse by more than `WORSE`."""
    return [
        f"worse: {name}: {ratios[name]['ratio'][0]:.3g}, it was {before:.3g}"
        for name, before in old.items()
        if name in ratios and ratios[name]["ratio"][0] > WORSE * before
    ]


def line(result: Result) -> str:
    if isinstance(result, NotRun):
        return f"{result.name}: not run: {result.why}"
    if isinstance(result, Figure):
        return f"{result.name}: {_shown(result.value)} {result.unit}"
    aim = f", aim ≤ {result.aim:g}" if result.aim is not None else ""
    sides = f"; {result.ours.median:.3g} s to {result.theirs.median:.3g} s"
    notes = "".join(f"; {name} {value:.3g}" for name, value in result.notes.items())
    cpu = f"; processor time {_shown(result.cpu)}"
    return f"{result.name}: {_shown(result.ratio)}{aim}{cpu}{sides}{notes}"


def _shown(spread: Spread) -> str:
    return f"{spread.median:.3g} ({spread.low:.3g} to {spread.high:.3g})"


def _report(args: argparse.Namespace, results: list[Result], before: list[float]) -> dict[str, Any]:
    def of(kind: type) -> dict[str, Any]:
        chosen = [dataclasses.asdict(result) for result in results if isinstance(result, kind)]
        return {values.pop("name"): values for values in chosen}

    return {
        "suite": args.suite,
        "small": args.small,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": code_version(),
        "machine": _machine() | {"load before": before, "load after": _load()},
        "versions": _versions(),
        "ratios": of(Ratio),
        "figures": of(Figure),
        "not run": of(NotRun),
    }


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [text.split(":")[1].strip() for text in names if text.startswith("model name")]
    devices = [device.device_kind for device in jax.devices()]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "devices": devices,
    }


def _load() -> list[float]:
    """Return how many processes wanted a core, on average over 1, 5 and 15 minutes."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else []


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in (*_LIBRARIES, "libtpu"):
        if importlib.util.find_spec("PIL" if name == "pillow" else name) is not None:
            found[name] = importlib.metadata.version(name)
    return found


def _tpu(small: bool) -> Iterator[Result]:
    """Ask the compiler for the anchor of docs/performance.md: FLOPs to the analytic, memory."""
    jax.config.update("jax_platforms", "cpu")  # the compiler needs no device
    jax.config.update("jax_enable_compilation_cache", False)  # only devices can load what it holds
    config = configs.Config(
        data=configs.DataConfig(root="unused", image_size=(384, 384), cache_latents=True),
        model=configs.ModelConfig(preset="sd2", dtype="bfloat16"),
        train=configs.TrainConfig(batch_size=16),
    )
    if small:
        config.model.preset, config.data.image_size = "tiny", (32, 32)
    chip, devices = chips.stand_ins(_TOPOLOGY)
    step = aot.make_step(config, mesh.make_mesh(config.mesh, devices))
    made = roofline.measure(step, chip, len(devices), None)
    name = f"training step of {config.model.preset} on {_TOPOLOGY}, 4 a chip"
    if not made["fits"]:
        yield NotRun(name, made["why"])
        return
    counted = made["per_chip"]["flops"]
    once = lambda value: Spread(value, value, value)  # noqa: E731
    ratio = once(counted["total"] / counted["analytic"])
    none = once(0.0)
    yield Ratio(f"FLOPs to the analytic count, {name}", ratio, none, none, none, none, 1.04)
    for part, size in made["per_chip"]["hbm"].items():
        yield Figure(f"{part}, {name}", once(size / 2**30), "GiB")
    yield Figure(f"MFU at the roofline, {name}", once(made["roofline"]["mfu"]), "of the peak")


if __name__ == "__main__":
    cli.run(main)
