"""Writes scenes as files: `python -m segdiff_jax.data.scenes --output DIR --count 8`."""

import io
import os

from etils import epath
from PIL import Image

from segdiff_jax import cli, ownership
from segdiff_jax.config import ScenesConfig
from segdiff_jax.data.sources.scenes import ScenesSource
from segdiff_jax.files import write_bytes, write_text


def main(argv: list[str]) -> None:
    """Write validation scenes as a folder dataset: images/, masks/, classes.txt."""
    parser = cli.parser("segdiff_jax.data.scenes", "Write drawn scenes as image files.")
    parser.add_argument(
        "--output", required=True, type=cli.path, metavar="DIR", help="folder to write"
    )
    add, positive = parser.add_argument, cli.positive_int
    add("--count", type=positive, default=8, metavar="N", help="scenes to write; default: 8")
    add("--size", type=positive, default=64, metavar="PIXELS", help="height and width; default: 64")
    add("--seed", type=cli.natural_int, default=0, help="which scenes; default: 0")
    args = parser.parse_args(argv)
    config = ScenesConfig(val_examples=args.count)
    source = ScenesSource(config, (args.size, args.size), train=False, seed=args.seed)
    outputs = ["classes.txt"]
    for folder in ("images", "masks"):
        outputs += [f"{folder}/{source.name(index)}.png" for index in range(len(source))]
    with ownership.claimed(args.output, "scenes", outputs):
        _write(source, epath.Path(args.output))
    print(f"{args.count} scenes written: {os.path.join(args.output, 'images')}")


def _write(source: ScenesSource, output: epath.Path) -> None:
    write_text(output / "classes.txt", "\n".join(source.vocabulary.names) + "\n")
    for index in range(len(source)):
        scene = source[index]
        for folder, array in (("images", scene["image"]), ("masks", scene["labels"])):
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, "PNG")
            write_bytes(output / folder / f"{scene['name']}.png", buffer.getvalue())


if __name__ == "__main__":
    cli.run(main)
