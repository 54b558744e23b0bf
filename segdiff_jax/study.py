"""The paper's experiments: `python -m segdiff_jax.study NAME --output O`."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdiff_jax import cli, fields, files, ownership
from segdiff_jax.config import Config
from segdiff_jax.errors import UserError
from segdiff_jax.evaluation import findings, tables
from segdiff_jax.evaluation.findings import Measurement
from segdiff_jax.stored import read_object

if TYPE_CHECKING:
    from segdiff_jax.evaluation.studies import Study

NAMES = ("noise", "steps", "ensemble", "start", "codec", "negatives", "panels")
_DEMO = Path(__file__).parents[1] / "configs" / "demo.py"
_DESCRIPTION = f"""Run an experiment of the paper's supplement, and say what it shows.

{", ".join(NAMES[:-1])}: trains what it needs below O/runs, where
other studies find it again, measures, and writes O/NAME.md, .json, .png and .html: a table, a
plot, a verdict.
The same command again goes on where it was stopped.

panels: photos beside the label maps of several methods, with class names drawn in.

--tables FILE: put the results of studies and suites, which are JSON files beside a Markdown
file, into the tables of that file.
"""
_KIND = "study"
_DEFAULT = "the default"  # of a key


def main(argv: list[str]) -> None:
    overrides, rest = cli.split_config_flags(argv)
    args = _parser().parse_args(rest)
    if args.tables:
        for path in tables.rewrite(args.tables, _shown):
            print(f"written into {args.tables}: {path}")
        return
    if not args.name:
        raise UserError(f"name a study: {', '.join(NAMES)}")
    if not args.output:
        raise UserError(f"--output is missing: name a folder for what study {args.name} finds")
    if not args.config and not _DEMO.exists():
        raise UserError("--config is missing: name a file with get_config()")
    if args.name != "panels" and files.is_remote(args.output):
        raise UserError(
            f"--output {args.output}: studies train on a local disk: name a folder there"
        )
    if args.name != "panels" and not importlib.util.find_spec("matplotlib"):
        raise UserError("studies draw with matplotlib: pip install 'segdiff_jax[study]'")
    use = "evaluate" if args.name == "panels" else "train"
    config = cli.load_config(args.config or str(_DEMO), overrides, use)

    from segdiff_jax.parallel import runtime
    from segdiff_jax.training.stop import Stopped

    runtime.start()
    runtime.start_logging(times=True)
    if args.name == "panels":
        _panels(args, config)
        return
    try:
        _study(args, config, argv)
    except Stopped as stopped:
        print(f"{stopped}; run the same command to continue", file=sys.stderr)


def _study(args: argparse.Namespace, config: Config, argv: Sequence[str]) -> None:
    from segdiff_jax.evaluation import studies, trainings

    study = studies.STUDIES[args.name]
    names = [f"{args.name}.{suffix}" for suffix in ("json", "md", "png", "html")]
    runs, path = Path(args.output) / "runs", Path(args.output) / names[0]
    places = {args.output: "O"} | ({config.data.root: "DATA"} if config.data.root else {})
    about: dict[str, Any] = {**tables.origin("segdiff study", argv, places)}
    about |= {"study": args.name, "images": args.limit, "seeds": args.seeds}
    about |= {"config": _not_by_default(config)}
    with ownership.claimed(args.output, _KIND, names):
        known = _earlier(path, about)
        for seed in args.seeds:
            of_seed = trainings.changed(config, {"seed": seed})
            cases = [studies.case(of_seed, setting) for setting in study.settings]
            for case in sorted(cases, key=lambda c: c.training.name):
                if any((m.setting, m.seed) == (case.setting, seed) for m in known):
                    continue
                workdir = trainings.trained(case.training, of_seed, runs)
                figures = studies.measure(case, of_seed, workdir, args.limit)
                known.append(Measurement(case.setting, seed, figures))
                measured = {"measurements": [m._asdict() for m in known]}
                files.write_text(path, tables.to_json(about | measured))
        done = [
            m
            for setting in study.settings
            for m in sorted(known, key=lambda m: m.seed)
            if m.setting == setting and m.seed in args.seeds
        ]
        others = [m for m in known if m not in done]  # of seeds that were asked for before
        about["measurements"] = [m._asdict() for m in done + others]
        print(_write(args, study, about))


def _not_by_default(config: Config) -> dict[str, Any]:
    """Return what a config sets, as JSON values by dotted key. The seed is each measurement's."""
    plain = {key: value for key, _, value in fields.leaves(Config())}
    leaves = ((key, value) for key, _, value in fields.leaves(config) if key != "seed")
    return json.loads(json.dumps({key: value for key, value in leaves if value != plain[key]}))


def _earlier(path: Path, about: dict[str, Any]) -> list[Measurement]:
    """Read what an earlier run of the study has measured.

    Raises `UserError` where that was of another config, or on another number of images.
    """
    if not path.exists():
        return []
    stored = read_object(path, "remove it, and all is measured again")
    now = about["config"] | {"--limit": about["images"]}
    had = stored.get("config", about["config"]) | {"--limit": stored["images"]}
    for key in sorted(had.keys() | now.keys()):
        if had.get(key, _DEFAULT) != now.get(key, _DEFAULT):
            name = key if key == "--limit" else f"config.{key}"
            raise UserError(
                f"{path}: was measured with {name}={had.get(key, _DEFAULT)}, now it is "
                f"{now.get(key, _DEFAULT)}: choose another --output, or remove this file"
            )
    return [Measurement(**m) for m in stored["measurements"]]


def _shown(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with table and verdict as they are made today, where it is a study's."""
    from segdiff_jax.evaluation import studies

    if about.get("study") not in studies.STUDIES:
        return dict(about)
    study, measured = studies.STUDIES[about["study"]], _measured(about)
    columns, cells = findings.table(findings.rows(measured), study.axis, study.figures)
    verdict = "\n".join(f"- {line}" for line in findings.verdict(study.claims, measured))
    return {**about, "columns": columns, "cells": cells, "verdict": verdict}


def _measured(about: Mapping[str, Any]) -> list[Measurement]:
    """Return what a result has of the seeds that were asked for."""
    every = [Measurement(**m) for m in about["measurements"]]
    return [m for m in every if m.seed in about.get("seeds", [m.seed])]


def _write(args: argparse.Namespace, study: "Study", about: dict[str, Any]) -> str:
    """Write table, plot and verdict as JSON, Markdown, PNG and a page; return the Markdown."""
    from segdiff_jax.inference import page

    about = _shown(about | {"title": f"Study: {study.about}"})
    found = findings.rows(_measured(about))
    drawn = findings.plot(found, study.axis, study.figures[: study.plotted], about["title"])
    start = os.path.join(args.output, args.name)
    text = f"# {about['title']}\n\n{tables.section(about)}"
    files.write_text(f"{start}.json", tables.to_json(about))
    files.write_text(f"{start}.md", text)
    files.write_bytes(f"{start}.png", drawn)
    page.page(
        f"{start}.html",
        about["title"],
        tables=[
            page.Table("Measured", about["columns"], about["cells"]),
            page.Table("Claims", ["seen"], [[line] for line in about["verdict"].split("\n")]),
        ],
        rows=[page.Row("", {"plot": drawn})],
        note=f"Measured at commit {about['commit']} on {about['date']}.",
    )
    return text


def _panels(args: argparse.Namespace, config: Config) -> None:
    from segdiff_jax.evaluation import panels

    if not args.checkpoint:
        raise UserError("study panels: name the model that is shown with --checkpoint")
    columns = dict(_column(text) for text in args.column)
    with ownership.claimed(args.output, _KIND, ["panels.png", "panels.html"]):
        panels.write(args.output, args.checkpoint, config, columns, args.rows)
    print(f"written: {os.path.join(args.output, 'panels.png')} and panels.html")


def _column(text: str) -> tuple[str, str]:
    name, separator, folder = text.partition("=")
    if not separator or not os.path.isdir(folder):
        raise UserError(f"--column {text}: write it as NAME=FOLDER, a folder of label maps")
    return name, folder


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("segdiff_jax.study", _DESCRIPTION, cli.config_help())
    add = parser.add_argument
    add("name", nargs="?", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    output = "folder for results and, in runs/, trainings"
    add("--output", type=cli.path, metavar="DIR", help=output)
    add("--config", type=cli.path, metavar="FILE", help="default: configs/demo.py, drawn scenes")
    add("--seeds", nargs="+", type=cli.natural_int, default=[0], metavar="S", help="default: 0")
    add("--limit", type=cli.positive_int, metavar="N", help="images to measure on; default: all")
    add("--checkpoint", type=cli.path, metavar="DIR", help="panels: the model to show")
    column = "panels: another method's label maps, PNGs of class ids named as the photos"
    add("--column", action="append", default=[], metavar="NAME=DIR", help=column)
    add("--rows", type=cli.positive_int, default=6, metavar="N", help="panels: photos; default: 6")
    add("--tables", type=cli.path, metavar="FILE", help="a Markdown file whose tables to renew")
    return parser


if __name__ == "__main__":
    cli.run(main)
