"""Check a data set: `segdiff data check --config FILE`, `python -m segdiff_jax.check`."""

import argparse
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from segdiff_jax import cli, ownership
from segdiff_jax.config import Config
from segdiff_jax.errors import UserError
from segdiff_jax.progress import reporter

if TYPE_CHECKING:  # slow to import, which --help need not wait for
    from segdiff_jax.data.sources.source import Source
    from segdiff_jax.inference import page

_DESCRIPTION = """Read every pair of a data set, and say what it holds and what is wrong with it.

Counts, ids, pixels and images of each class, broken files, masks that do not fit, what a training
would warn of, copies whose ids are shifted by one. With --output, a page for each split, with ten
photos under their labels. Exits 1 if there are faults or warnings.
"""
_Row = tuple[str, int, int, float]  # class, images and pixels that show it, its share
_KIND, _OVERLAYS, _FAULTS, _SIDE = "data check", 10, 10, 2048


def main(argv: list[str]) -> None:
    overrides, rest = cli.split_config_flags(argv)
    args = _parser().parse_args(rest)
    config = cli.load_config(args.config, overrides, "evaluate")
    wrong = False
    for split in [args.split] if args.split else [config.data.train_split, config.data.val_split]:
        wrong = _check(config, split, args) or wrong
    if wrong:
        raise SystemExit(1)


def _check(config: Config, split: str, args: argparse.Namespace) -> bool:
    """Print, and write the page of a split; return whether something is wrong with it."""
    from segdiff_jax.data import survey
    from segdiff_jax.data.sources.source import evenly, open_source
    from segdiff_jax.inference import page

    source = open_source(config.data, split, config.seed)
    numbers = evenly(min(args.limit or len(source), len(source)), len(source))
    progress = reporter(f"check {split}", "pair")
    found = survey.survey(source, numbers, whole=True, progress=progress)
    warnings = list(survey.warnings(source, config.data, split, found))
    pixels = survey.pixels_of_classes(found.ids, getattr(source, "lookup", None))
    total = max(1, sum(pixels.values()))
    rows = [
        (name, found.images[i], pixels[i], pixels[i] / total)
        for i, name in enumerate(source.vocabulary.names)
    ]
    print(
        f"{split}: {found.pairs} of {len(source)} pairs read, {len(found.faults)} with faults, "
        f"{len(warnings)} warning{'s' * (len(warnings) != 1)}"
    )
    print(f"  ids {survey.ranges(found.ids)}" if found.ids else "  no ids")
    noted = [doubt] if (doubt := survey.suspicion(source, config.data, found)) else []
    print("\n".join(_lines(rows, found.faults, [*warnings, *noted])))
    if args.output:
        wrong = [[str(fault)] for fault in (*found.faults, *warnings, *noted)]
        columns, colors = ["class", "images", "pixels", "share"], source.vocabulary.palette()
        classes = page.Table("Classes", columns, rows, bar=3, colors=colors.tolist())
        tables = [classes, page.Table("Faults", ["fault"], wrong)]
        name = f"check_{split}.html"
        place, shown = os.path.join(args.output, name), _overlays(source, numbers)
        with ownership.claimed(args.output, _KIND, [name]):
            page.page(place, f"Data check: {split}", tables=tables, rows=shown)
        print(f"written: {place}")
    return bool(found.faults or warnings)


def _lines(
    rows: Sequence[_Row], faults: Sequence[UserError], warnings: Sequence[str]
) -> Iterator[str]:
    """Yield what is printed of classes, faults and warnings."""
    yield f"  {1 - sum(share for *_, share in rows):.1%} of the pixels have no class"
    yield f"  absent: {', '.join(name for name, images, *_ in rows if not images) or 'none'}"
    yield from (f"  {fault}" for fault in faults[:_FAULTS])
    if len(faults) > _FAULTS:
        yield f"  and {len(faults) - _FAULTS} more faults"
    yield from (f"  {warning}" for warning in warnings)
    width = max(len(name) for name, *_ in rows)
    yield f"  {'class':<{width + 2}}  {'images':>7}  {'pixels':>7}"
    yield from (f"    {name:<{width}}  {n:>7}  {share:7.2%}" for name, n, _, share in rows)


def _overlays(source: "Source", numbers: Sequence[int]) -> "list[page.Row]":
    """Return ten photos of these pairs under their labels, as rows of a page."""
    from segdiff_jax.inference import page, pictures

    names, palette = source.vocabulary.names, source.vocabulary.palette()
    shown: list[page.Row] = []
    for number in numbers[:: max(1, len(numbers) // _OVERLAYS)]:
        try:
            record = source[number]
        except UserError:
            continue  # it is among the faults
        image, labels = record["image"], record["labels"].astype(np.int32)
        overlay = pictures.overlay(image, labels, palette)
        overlay.thumbnail((_SIDE, _SIDE))
        legend = {names[i]: palette[i].tolist() for i in pictures.present(labels, palette)}
        cells = {"labels": pictures.encode(overlay, photo=True)}
        shown.append(page.Row(record["name"], cells, legend))
        if len(shown) == _OVERLAYS:
            break
    return shown


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("segdiff_jax.check", _DESCRIPTION, cli.config_help())
    add = parser.add_argument
    add("action", nargs="?", choices=["check"], help=argparse.SUPPRESS)  # of `segdiff data check`
    add("--config", required=True, type=cli.path, metavar="FILE", help="file with get_config()")
    add("--split", help="one split; default: those of training and of validation")
    add("--limit", type=cli.positive_int, metavar="N", help="N pairs, evenly spread; default: all")
    add("--output", type=cli.path, metavar="DIR", help="folder for check_SPLIT.html")
    return parser


if __name__ == "__main__":
    cli.run(main)
