"""Segment photos: `python -m segdiff_jax.predict --checkpoint W --images a.jpg --output O …`."""

import argparse
import itertools

from segdiff_jax import cli
from segdiff_jax.errors import UserError
from segdiff_jax.inference import requests
from segdiff_jax.progress import working
from segdiff_jax.text import vocabulary

_DESCRIPTION = (
    """Segment photos into the classes you name.

Per image: O/<name>_labels.png (or what --format says), O/<name>_overlay.png with a legend,
O/<name>_uncertainty.png (for an ensemble of two or more) and O/<name>.json; O/index.html over all.
<name> is the image's without its extension, with it where several would be equal or it ends in
coco, and with its folders where these are equal too. The same seed gives the same bytes. The same
command again goes on where it was stopped: what is done with the same settings is skipped.

"""
    + cli.SEVERAL_PROCESSES
)


def main(argv: list[str]) -> None:
    args = _parsed(argv)
    with working("loading libraries"):
        from segdiff_jax.inference import run
        from segdiff_jax.parallel import processes, runtime
    with working("starting"):
        runtime.start()
        processes.join()
        runtime.start_logging()
    run.predict(args)


def _parsed(argv: list[str]) -> argparse.Namespace:
    """Return the arguments. Raise `UserError` for class names that a shell took apart."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if not rest:
        return args
    flag = next(i for i, word in enumerate(argv) if word.split("=")[0] == "--classes")
    words = [argv[flag].partition("=")[2]] if "=" in argv[flag] else []
    words += itertools.takewhile(lambda word: not word.startswith("-"), argv[flag + 1 :])
    if set(rest) <= set(words):
        given = " ".join(word for word in words if word)
        raise UserError(f'--classes {given}: put quotes around the names: --classes "{given}"')
    parser.error(f"unrecognized arguments: {' '.join(rest)}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("segdiff_jax.predict", _DESCRIPTION)
    add = parser.add_argument
    cli.add_checkpoint(parser)
    add(
        "--images",
        required=True,
        nargs="+",
        type=requests.image,
        metavar="IMAGE",
        help="image files, folders with all below them, patterns such as 'dir/*.png', "
        "http(s):// addresses, - for stdin; or clips (mp4, mov, mkv, webm, avi), of which "
        "O/<name>_overlay.mp4 and O/<name>.json are written (needs the extra video)",
    )
    add(
        "--classes",
        required=True,
        metavar="NAMES",
        help='";" between classes, "," between synonyms: "sky; building, edifice; road"; '
        "or @FILE with one class a line; "
        f"or one of {', '.join(vocabulary.packaged())}",
    )
    add(
        "--output",
        required=True,
        type=cli.path,
        metavar="DIR",
        help="folder for the results; of the files there, only earlier results are replaced; "
        "- writes the one file of one image to stdout",
    )
    add(
        "--format",
        nargs="+",
        choices=("labels", "scores", "scoremaps", "masks", "cutouts", "coco", "yolo", "cvat"),
        metavar="FORMAT",
        help="labels (default): class ids as O/<name>_labels.png; scores: O/<name>_scores.npz; "
        "of each class, scoremaps: O/<name>_score_<id>.png, 16 bits; masks: O/<name>_mask_<id>.png;"
        " cutouts: O/<name>_cutout_<id>.png, with alpha; to be imported elsewhere, "
        "coco: O/coco.json and O/<name>_coco.json; yolo: polygons in O/yolo/ with data.yaml; "
        "cvat: O/cvat.zip, segmentation mask 1.1",
    )
    add(
        "--skip-unreadable",
        action="store_true",
        help="leave out images that cannot be read, and list them in index.html",
    )
    add(
        "--max-pixels",
        type=cli.positive_int,
        metavar="N",
        help="refuse larger images; default: as the checkpoint's config says (data.max_pixels)",
    )
    _add_sampling(parser)
    add(
        "--json-lines",
        action="store_true",
        help="also print what <name>.json says, one photo a line, on stdout; the rest on stderr",
    )
    add(
        "--frames",
        action="store_true",
        help="of clips also write each frame as a photo, in the formats of --format: "
        "O/<name>_000001_labels.png and so on",
    )
    add("--quiet", action="store_true", help="say nothing but warnings and errors")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--threshold",
        type=_share,
        metavar="S",
        help="pixels whose best score is below S, 0…1, are *other* (255)",
    )
    other.add_argument(
        "--closed", action="store_true", help="every pixel gets one of the classes, none is *other*"
    )
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--steps",
        type=cli.positive_int,
        metavar="T",
        help="denoising steps; default: as the checkpoint's config says, like the next two",
    )
    add(
        "--ensemble",
        type=cli.positive_int,
        metavar="N",
        help="samples to merge; their spread is the uncertainty",
    )
    add(
        "--shortlist",
        type=cli.natural_int,
        metavar="M",
        help="score all classes in one cheap pass, spend T and N on the M most present; 0 = off",
    )
    add(
        "--tiles",
        type=cli.natural_int,
        metavar="N",
        help="see a large photo also in windows, at most N along each side; 0 = as a whole only",
    )
    add("--seed", type=cli.natural_int, default=0, help="seed of the sampling noise; default: 0")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


if __name__ == "__main__":
    cli.run(main)
