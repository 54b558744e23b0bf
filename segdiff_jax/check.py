"""Check a data set: `segdiff data check --config FILE`, `python -m segdiff_jax.check`."""

import argparse
import os

import numpy as np

from segdiff_jax import cli
from segdiff_jax.config import Config
from segdiff_jax.errors import UserError

_DESCRIPTION = """Read every pair of a data set, and say what it holds and what is wrong with it.

Counts, ids, pixels and images of each class, broken files, masks that do not fit, copies whose ids
are shifted by one. With --output, a page for each split, with ten photos under their labels. Exits
1 if something is wrong.
"""
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
    from segdiff_jax.progress import reporter

    source = open_source(config.data, split, config.seed)
    count = min(args.limit or len(source), len(source))
    numbers = evenly(count, len(source))
    checked = survey.check(source, config.data, numbers, reporter(f"check {split}", "pair"))
    lookup = getattr(source, "lookup", None)
    shifted = "" if lookup is None else survey.shift(checked.ids, lookup)
    names, total = source.vocabulary.names, max(1, sum(checked.pixels.values()))
    rows = [
        (name, checked.images[i], checked.pixels[i], checked.pixels[i] / total)
        for i, name in enumerate(names)
    ]
    known = sum(checked.pixels[i] for i in range(len(names)))
    ids = sorted(checked.ids)
    lines = [
        f"{split}: {checked.pairs} of {len(source)} pairs read, {len(checked.faults)} with faults",
        f"  ids {ids[0]} to {ids[-1]}, {len(ids)} different" if ids else "  no ids",
        f"  {1 - known / total:.1%} of the pixels have no class",
        f"  absent: {', '.join(n for n, images, _, _ in rows if not images) or 'no class'}",
        *(f"  {fault}" for fault in checked.faults[:_FAULTS]),
    ]
    if len(checked.faults) > _FAULTS:
        lines.append(f"  and {len(checked.faults) - _FAULTS} more faults")
    if shifted:
        lines.append(f"  {shifted}")
    width = max(map(len, names))
    lines += [f"    {n:<{width}}  {images:>7}  {share:7.2%}" for n, images, _, share in rows]
    print("\n".join(lines))
    if args.output:
        _write(args.output, split, source, rows, numbers, [*checked.faults, shifted])
    return bool(checked.faults)  # ids that are no class are among them


def _write(output, split, source, rows, numbers, faults) -> None:
    """Write check_SPLIT.html: what was printed, and photos under their labels."""
    from segdiff_jax import ownership
    from segdiff_jax.inference import page, pictures

    names, palette = source.vocabulary.names, source.vocabulary.palette()
    colors = dict(zip(names, palette.tolist(), strict=True))
    shown = []
    for number in numbers[:: max(1, len(numbers) // _OVERLAYS)]:
        try:
            record = source[number]
        except UserError:
            continue  # it is among the faults
        image, labels = record["image"], record["labels"].astype(np.int32)
        overlay = pictures.overlay(image, labels, palette, names, legend=False)
        overlay.thumbnail((_SIDE, _SIDE))
        legend = {names[i]: colors[names[i]] for i in pictures.present(labels, palette)}
        cells = {"labels": pictures.encode(overlay, photo=True)}
        shown.append(page.Row(record["name"], cells, legend))
        if len(shown) == _OVERLAYS:
            break
    name = f"check_{split}.html"
    columns = ["class", "images", "pixels", "share"]
    with ownership.claimed(output, _KIND, [name]):
        page.page(
            os.path.join(output, name),
            f"Data check: {split}",
            tables=[
                page.Table("Classes", columns, rows, bar=3, colors=list(colors.values())),
                page.Table("Faults", ["fault"], [[fault] for fault in faults if fault]),
            ],
            rows=shown,
        )
    print(f"written: {os.path.join(output, name)}")


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
