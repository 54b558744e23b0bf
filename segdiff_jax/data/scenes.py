"""Writes scenes as files: `python -m segdiff_jax.data.scenes --output DIR --count 8`."""

import io

from etils import epath
from PIL import Image

from segdiff_jax import cli, ownership
from segdiff_jax.config import ScenesConfig
from segdiff_jax.data.sources.scenes import ScenesSource
from segdiff_jax.files import write_bytes, write_text


def main(argv: list[str]) -> None:
    """Write validation scenes as a folder dataset: images/, masks/, classes.txt."""
    parser = cli.parser("segdiff_jax.data.scenes", "Write procedural scenes as image files.")
    parser.add_argument(
        "--output", required=True, type=cli.path, metavar="DIR", help="folder to write"
    )
    parser.add_argument("--count", type=int, default=8, help="scenes to write (default 8)")
    parser.add_argument("--size", type=int, default=64, help="height and width (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="which scenes (default 0)")
    args = parser.parse_args(argv)
    config = ScenesConfig(val_examples=args.count)
    source = ScenesSource(config, (args.size, args.size), train=False, seed=args.seed)
    outputs = ["classes.txt"]
    for folder in ("images", "masks"):
        outputs += [f"{folder}/{source.name(index)}.png" for index in range(len(source))]
    with ownership.claimed(args.output, "scenes", outputs):
        _write(source, epath.Path(args.output))


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
