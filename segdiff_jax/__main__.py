"""One name for all commands: `segdiff train ...` is `python -m segdiff_jax.train ...`."""

import importlib
import sys

from segdiff_jax import __version__, cli
from segdiff_jax.errors import UserError

COMMANDS = {
    "train": "train a model, or go on with one",
    "evaluate": "score a model on a labelled data set",
    "predict": "paint masks for photos and class names",
    "export": "write a model for diffusers, or as StableHLO",
    "app": "segment photos in a browser",
    "data": "data check: say what a data set holds and what is wrong with it",
    "study": "run an experiment of the paper, and say what it shows",
    "bench": "time this package side by side with what people use instead",
    "aot": "ask the TPU compiler what a training needs, without a TPU",
}


def main(argv: list[str] | None = None) -> None:
    """The entry point of the `segdiff` script; it exits as the command it calls does."""
    arguments = sys.argv[1:] if argv is None else argv
    cli.run(_dispatch, arguments)


def _dispatch(argv: list[str]) -> None:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"segdiff {__version__}")
    elif name in COMMANDS:
        # The command is imported by name: each brings libraries that the others do not need.
        module = "check" if name == "data" else name  # the package `data` is no command
        importlib.import_module(f"segdiff_jax.{module}").main(rest)
    else:
        raise UserError(f"{name}: no such command: choose one of {', '.join(COMMANDS)}")


def _help() -> str:
    lines = [f"  {name:<10}{about}" for name, about in COMMANDS.items()]
    return "\n".join(
        ["usage: segdiff COMMAND ...", "", *lines, "", "segdiff COMMAND --help says more of each."]
    )


if __name__ == "__main__":
    main()
