"""From a compiled step to the figures a user rents by: fit, roofline, MFU, images per second."""

from collections.abc import Sequence
from typing import Any

from segdiff_jax.roofline import hlo, traffic
from segdiff_jax.roofline.chips import Chip
from segdiff_jax.roofline.compile import Compiled

GIB = 2**30
_TIMES = {"memory": "memory, all bytes", "hbm": "memory, HBM's", "least": "step with HBM's"}


def per_chip(
    compiled: Compiled,
    chips: int,
    slices: int,
    *,
    model_flops: float,
    loops: tuple[int, int, Compiled] | None = None,
) -> dict[str, Any]:
    """The figures of one chip and one call.

    XLA counts the body of a loop once. `loops`: see `steps.Loops`; the body of the first costs what
    the program does without that of the others.
    model_flops: what the networks need (`flops.py`) for this chip's share of the call.
    """
    kernels = hlo.kernel_flops(compiled.text)
    flops, accessed = compiled.flops, compiled.bytes_accessed
    if loops is not None:
        length, times, body = loops
        flops = times * body.flops + length * (flops - body.flops)
        if accessed is not None and body.bytes_accessed is not None:
            accessed = times * body.bytes_accessed + length * (accessed - body.bytes_accessed)
    exchanged = hlo.collectives(compiled.text, chips, slices)
    total = compiled.arguments + compiled.outputs - compiled.aliased + compiled.temporaries
    return {
        "hbm": {
            "arguments": compiled.arguments,
            "temporaries": compiled.temporaries,
            "outputs": compiled.outputs,
            "reused": compiled.aliased,
            "code": compiled.code,
            "total": total + (compiled.code or 0),
        },
        "flops": {"xla": flops, "kernels": kernels, "total": flops + kernels, "model": model_flops},
        "bytes_accessed": accessed,
        "hbm_traffic": traffic.hbm_bytes(compiled.text),
        "estimated_cycles": hlo.estimated_cycles(compiled.text),
        "collectives": [
            {
                "kind": c.kind,
                "network": c.network,
                "count": c.count,
                "payload": c.payload,
                "moved": c.moved,
            }
            for c in exchanged
        ],
    }


def roofline(figures: dict[str, Any], chip: Chip, images: float) -> dict[str, Any]:
    """Seconds per call if compute, memory and network overlapped perfectly: the slowest of them.

    "memory" takes every byte that XLA counts for HBM's. Many are not (`traffic.py`), so a second
    bound, "least", takes the traffic with HBM alone: no step is faster than that. Where XLA has not
    counted (`plan.py`), both are the latter.
    """
    accessed, hbm_traffic = figures["bytes_accessed"], figures["hbm_traffic"]
    moved = {"ici": 0.0, "dcn": 0.0}
    for exchange in figures["collectives"]:
        moved[exchange["network"]] += exchange["moved"]
    times = {
        "compute": figures["flops"]["total"] / chip.flops,
        "memory": (hbm_traffic if accessed is None else accessed) / chip.hbm_bandwidth,
        "network": moved["ici"] / chip.ici_bandwidth + moved["dcn"] / chip.dcn_bandwidth,
    }
    bound = max(times, key=lambda name: times[name])
    step, hbm = times[bound], hbm_traffic / chip.hbm_bandwidth
    return {
        **{f"{name}_seconds": seconds for name, seconds in times.items()},
        "hbm_seconds": hbm,
        "least_seconds": max(times["compute"], hbm, times["network"]),
        "step_seconds": step,
        "bound": bound,
        "mfu": figures["flops"]["model"] / (step * chip.flops),
        "images_per_second": images / step,
    }


def whole_run(line: dict[str, Any], chip: Chip, chips: int, steps: int) -> dict[str, Any]:
    """Hours and on-demand dollars of `steps` steps at both bounds of `roofline`, least first.

    Of steps alone: start-up, compilation, validation and preemptions come on top.
    """
    hours = [steps * line[name] / 3600 for name in ("least_seconds", "step_seconds")]
    dollars = None if chip.dollars is None else [h * chips * chip.dollars for h in hours]
    return {"steps": steps, "hours": hours, "dollars": dollars}


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Reports side by side, a column each; with two, a third column of ratios."""
    columns = [rows(report) for report in reports]
    names = list(dict.fromkeys(name for column in columns for name in column))
    lines = []
    for name in names:
        cells = [column.get(name, ("", None)) for column in columns]
        line = f"{name:<34}" + "".join(f"{shown:>26}" for shown, _ in cells)
        if len(cells) == 2 and all(cells[i][1] for i in (0, 1)):
            line += f"{cells[1][1] / cells[0][1]:>9.2f}×"
        lines.append(line.rstrip())
    for report in reports:
        for buffer in report.get("largest_buffers", []):
            lines.append(f"  {buffer}")
    return "\n".join(lines)


def rows(report: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Name → (what to print, the number to compare or None)."""
    slices = f" × {report['slices']}" if report["slices"] > 1 else ""
    shown: dict[str, tuple[str, Any]] = {
        "topology": (f"{report['topology']}{slices}", None),
        "step": (report["step"], None),
        "mesh": (report["mesh"], None),
        "batch per chip": (f"{report['batch_per_chip']:g}", report["batch_per_chip"]),
        "fits": ("yes" if report["fits"] else "NO", None),
    }
    if not report["fits"]:
        return shown | {"why": (report["why"], None)}
    figures, line = report["per_chip"], report["roofline"]
    if report.get("planned"):
        shown["planned, not compiled"] = ("no code, no bytes", None)
    for name, size in figures["hbm"].items():
        if size is not None:
            shown[f"HBM {name}, GiB"] = (f"{size / GIB:.2f}", size)
    shown["HBM of the chip, GiB"] = (f"{report['hbm_of_chip'] / GIB:.0f}", None)
    for name, count in figures["flops"].items():
        shown[f"FLOPs {name}, T"] = (f"{count / 1e12:.3f}", count)
    accessed = figures["bytes_accessed"]
    if accessed is not None:
        shown["bytes accessed, GB"] = (f"{accessed / 1e9:.2f}", accessed)
    if "hbm_traffic" in figures:  # not in reports of the first version
        moved = figures["hbm_traffic"]
        shown["of these with HBM, GB"] = (f"{moved / 1e9:.2f}", moved)
    cycles = figures.get("estimated_cycles")
    if cycles:
        shown["cycles that XLA estimates, M"] = (f"{cycles / 1e6:.1f}", cycles)
    for exchange in figures["collectives"]:
        name = f"{exchange['kind']} ({exchange['network']})"
        shown[f"{name}, count"] = (f"{exchange['count']:g}", exchange["count"])
        shown[f"{name}, GB"] = (f"{exchange['payload'] / 1e9:.3f}", exchange["payload"])
    for name in ("compute", "memory", "hbm", "network", "step", "least"):
        if f"{name}_seconds" in line and not (name == "memory" and report.get("planned")):
            seconds = line[f"{name}_seconds"]
            shown[f"{_TIMES.get(name, name)}, ms"] = (f"{1e3 * seconds:.2f}", seconds)
    shown["bound by"] = (line["bound"], None)
    shown["MFU at the roofline"] = (f"{line['mfu']:.1%}", line["mfu"])
    shown["images/s, all chips"] = (f"{line['images_per_second']:.2f}", line["images_per_second"])
    if "run" in report:
        run = report["run"]
        for name in ("hours", "dollars"):
            if run[name]:
                shown[f"{name} for {run['steps']:,} steps"] = _between(*run[name]), run[name][1]
    shown["compile time, s"] = (f"{report['compile_seconds']:.0f}", report["compile_seconds"])
    return shown


def _between(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}"
