"""What all entry points share: exit codes, the config file, its overrides and its help text."""

import argparse
import copy
import dataclasses
import errno
import functools
import inspect
import io
import os
import runpy
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from segdiff_jax import config as config_module
from segdiff_jax import fields, files, waiting
from segdiff_jax.config import Config, validate
from segdiff_jax.errors import UserError
from segdiff_jax.stages import check_overridden, get

PREFIX = "--config."

# For the --help of the commands that use all devices of a pod (`parallel.processes.join`).
SEVERAL_PROCESSES = (
    """On a TPU pod run the same command on every worker: they find each other.
Elsewhere, several processes need JAX_COORDINATOR_ADDRESS (host:port of process 0),
JAX_NUM_PROCESSES and JAX_PROCESS_ID in their environment.

"""
    + waiting.HELP
)


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> NoReturn:
    """Call `main` with the command line and exit: 0, or as `_exit_code` says.

    A `UserError`, or a disk that fills up, becomes one line on stderr without a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name, or a terminal, that is no UTF-8 must not end the work.
            stream.reconfigure(errors="backslashreplace")
    code = _exit_code(main, sys.argv[1:] if argv is None else argv)
    if waiting.left_behind():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _exit_code(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Return 0, 2 on bad input, 75 where a wait was given up, 130 on Ctrl-C, 141 as of `| head`."""
    try:
        main(argv)
        print(end="", flush=True)  # nothing where stdout is closed from the start
        return 0
    except UserError as error:
        message, code = str(error), error.exit_code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # of a connection, or of a worker process
        # Python's own end would write what is left once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        message, code = f"the disk is full{where}: free some space and run the command again", 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(f"error: {files.shown(_one_line(message))}", file=sys.stderr)
    return code


def _reader_is_gone() -> bool:
    """Return whether stdout is a pipe whose reader has had enough."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def parser(prog: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Make an argument parser for `python -m {prog}` whose errors are `UserError`s."""
    return _Parser(
        prog=f"python -m {prog}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see {self.prog} --help")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every command that reads a trained model."""
    add = parser.add_argument
    checkpoint = (
        "workdir of a training run, or an exported folder: local, gs://, or OWNER/NAME of "
        "Hugging Face; or demo, the model of drawn scenes that comes with this package"
    )
    add("--checkpoint", required=True, type=path, metavar="DIR", help=checkpoint)
    which = "newest, best (by the mIoU of the training's validation) or a step; default: newest"
    add("--which", type=_which, default="newest", metavar="CHECKPOINT", help=which)


def _which(text: str) -> str:
    if text in ("newest", "best") or text.isdecimal():
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither newest nor best nor a step")


def path(text: str) -> str:
    """Expand `~` in an argument that names a file or folder, as its `type=`.

    An empty name would mean the current folder: nearly always a shell variable that is not set.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path: is a shell variable in it not set?")
    try:
        files.check_scheme(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    # The shell expands `--output ~/x` itself, but not `--output=~/x`.
    place = text if os.path.lexists(text.split("/")[0]) else os.path.expanduser(text)
    if broken := files.dangling(place):
        raise argparse.ArgumentTypeError(broken)
    return place


def file(text: str) -> str:
    """`path` for a file that is written at the end, as its `type=`: hours later it is too late."""
    place = path(text)
    if os.path.isdir(place):
        raise argparse.ArgumentTypeError(f"{place!r} is a folder: name a file in it")
    return place


def natural_int(text: str, low: int = 0) -> int:
    """Read 0, 1, 2, … from an argument, as its `type=`."""
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value < 2**31:  # JAX's own integers and seeds end there
        what = f"a whole number from {low} to {2**31 - 1}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def positive_int(text: str) -> int:
    """Read 1, 2, … from an argument, as its `type=`."""
    return natural_int(text, 1)


def split_config_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate `--config.a.b=v` from the other arguments.

    Also takes `--config.a.b v` and, for booleans, `--config.a.b` and `--noconfig.a.b`.

    Returns:
      (overrides, all as `--config.a.b=v`; the other arguments in their order).

    Raises:
      UserError: a key does not exist, or has no value.
    """
    overrides: list[str] = []
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            rest += [argument, *arguments]
        elif argument.startswith("--noconfig."):
            key = argument.removeprefix("--noconfig.")
            if _field(key).type is not bool:
                raise UserError(f"{argument}: only a boolean key can be switched off with --no")
            overrides.append(f"{PREFIX}{key}=false")
        elif not argument.startswith(PREFIX):
            rest.append(argument)
        elif "=" in argument:
            overrides.append(argument)
        elif _field(argument.removeprefix(PREFIX)).type is bool:
            overrides.append(f"{argument}=true")
        else:
            value = next(arguments, None)
            if value is None:
                raise UserError(f"{argument} needs a value: {_example(argument[len(PREFIX) :])}")
            overrides.append(f"{argument}={value}")
    return overrides, rest


def load_config(
    path_or_spec: str,
    overrides: Sequence[str] = (),
    use: str = "train",
    trained: Config | None = None,
) -> Config:
    """Return the config that a file's `get_config()` returns, overridden and validated.

    Args:
      path_or_spec: a Python file, or `file.py:argument` to call `get_config("argument")`.
      overrides: `--config.a.b=v` strings, as from `split_config_flags`. A tuple is written
        `96,128`. A tuple of strings takes one string per flag; repeat the flag for several.
      use: what for, one of `config.USES`.
      trained: of a checkpoint, for a `get_config(trained)` that says only what differs from it.

    Raises:
      UserError: the file or its result is no config; a key does not exist (with the nearest one
        that does); a value has the wrong type (with an example); `validate` finds a bad value.
    """
    config = _read_config_file(path_or_spec, trained)
    _check_fields(config, "", path_or_spec)
    return override_config(config, overrides, use)


def override_config(config: Config, overrides: Sequence[str], use: str = "train") -> Config:
    """Apply `--config.a.b=v` strings to `config` and validate it. Raise as `load_config` does."""
    texts: dict[str, list[str]] = {}
    for override in overrides:
        key, separator, text = override.removeprefix(PREFIX).partition("=")
        if not separator or not override.startswith(PREFIX):
            raise UserError(f"{override}: write it as {PREFIX}KEY=VALUE")
        texts.setdefault(key, []).append(text)
    for key in texts:
        config = _override(config, key, texts[key])
    check_overridden(config, list(texts))
    return validate(config, use)


def _override(config: Config, key: str, texts: list[str]) -> Config:
    """Set one key of `config` to the last of `texts`; those of a tuple of strings add up."""
    kind = _field(key).type
    if kind == tuple[str, ...]:
        texts = [repr(fields.texts_from(text)) for text in texts]
    else:
        # ml_collections would join repeated tuples of numbers, and no shell expands ~ behind "=".
        last = texts[-1]
        texts = [os.path.expanduser(last) if key in config_module.PATHS else last]
    arguments = ["segdiff_jax", *(f"{PREFIX}{key}={text}" for text in texts)]
    own_flags = flags.FlagValues()
    try:
        holder = config_flags.DEFINE_config_dataclass(
            "config", config, flag_values=own_flags, sys_argv=arguments
        )
        own_flags(arguments)
        if not fields.has_type(get(holder.value, key), kind):
            raise TypeError
    except (flags.Error, ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        text = texts[-1] if len(texts[-1]) <= 100 else f"{texts[-1][:100]}..."
        wanted = f"must be {fields.type_name(kind)}"
        raise UserError(f"{PREFIX}{key}={text}: {wanted}: {_example(key)}") from error
    return holder.value


def _read_config_file(spec: str, trained: Config | None) -> Config:
    path, *arguments = [spec] if Path(spec).is_file() else spec.split(":", 1)
    if not Path(path).is_file():
        raise UserError(f"--config {path}: no such file: give one of configs/*.py")
    try:
        get_config = runpy.run_path(path, run_name="segdiff_jax_config").get("get_config")
        if not callable(get_config):
            raise UserError(f"{path}: has no get_config(): define one that returns a Config")
        if trained is not None and "trained" in inspect.signature(get_config).parameters:
            get_config = functools.partial(get_config, trained=copy.deepcopy(trained))
        config = get_config(*arguments)
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}, line {frames[-1].lineno}" if frames else path
        what = _one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{where}: {what}: mend the config file") from error
    if not isinstance(config, Config):
        name = type(config).__name__
        raise UserError(f"{path}: get_config() returned {name}: return a segdiff_jax.config.Config")
    return config


def _check_fields(node: Any, prefix: str, path: str) -> None:
    """Find assignments in a config file that a dataclass lets pass: misspelt keys, wrong types."""
    declared = {item.name: item for item in dataclasses.fields(node)}
    for name, value in vars(node).items():
        key = f"{prefix}{name}"
        if name not in declared:
            raise UserError(f"{path}: config.{key}: no such key{_suggestion(key)}")
        item = declared[name]
        if not fields.is_group(item.type):
            fields.check(f"{path}: config.{key}", item, value)
        elif not isinstance(value, item.type):  # type: ignore[arg-type]
            wanted = fields.type_name(item.type)
            raise UserError(f"{path}: config.{key}={fields.shown(value)}: must be {wanted}")
        else:
            _check_fields(value, f"{key}.", path)


def _field(key: str) -> dataclasses.Field[Any]:
    """Return the field of a dotted key. Raise `UserError` for none, or a group of them."""
    known = {name: item for name, item, _ in fields.leaves(Config)}
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        raise UserError(f"{PREFIX}{key} is a group of keys: set one, such as {PREFIX}{inside[0]}")
    if key not in known:
        raise UserError(f"{PREFIX}{key}: no such key{_suggestion(key)}")
    return known[key]


def _suggestion(key: str) -> str:
    return fields.suggestion(Config, key, "config.") or ": --help lists them all"


def _example(key: str) -> str:
    value = get(Config(), key)
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return f"for example {PREFIX}{key}={str(value).lower() if isinstance(value, bool) else value}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


@functools.cache
def config_help() -> str:
    """List every config key with its type, default and comment, for the end of `--help`."""
    first = "config keys, each set with --config.KEY=VALUE (type, default, meaning, choices):"
    return "\n".join([first, *fields.help_lines(Config)])
