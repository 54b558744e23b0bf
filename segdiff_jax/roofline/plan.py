"""Compiles a step as far as XLA's plan of memory, a quarter of it all: the rest is generating code.

XLA writes the scheduled program and its plan to files when it has them. A process of its own
compiles until then, because a compilation cannot be stopped otherwise.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import jax
from jaxlib import _hlo, _jax  # type: ignore[attr-defined]  # not public, and so jax is pinned

from segdiff_jax.errors import UserError
from segdiff_jax.roofline.compile import Compiled, OutOfMemory, compile_step
from segdiff_jax.roofline.steps import Step

_PLAN = "*.after_optimizations-buffer-assignment.txt"
_PROGRAM = "*.after_optimizations_after_buffer_assignment.txt"  # written last
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*):$", re.MULTILINE)
_POLL = 0.5  # seconds


def plan_step(make: Callable[..., Step], *arguments: object) -> Compiled | OutOfMemory:
    """The step `make(*arguments)`, which is to be importable, planned and not compiled.

    Without the size of the code and the bytes accessed, which XLA counts at the very end. The
    finished program was seen to hold a little more in temporaries (docs/performance.md).
    """
    with tempfile.TemporaryDirectory() as folder, _dumping(folder):
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_compile, args=(theirs, make, arguments), daemon=True)
        start = time.monotonic()
        process.start()
        theirs.close()
        try:
            failed = _wait(process, ours, Path(folder))
        finally:
            process.kill()
            process.join()
        seconds = time.monotonic() - start
        if failed is not None:
            return failed
        (plan,), (program,) = (list(Path(folder).glob(name)) for name in (_PLAN, _PROGRAM))
        return read(plan.read_text("utf-8"), program.read_text("utf-8"), seconds)


@contextlib.contextmanager
def _dumping(folder: str) -> Iterator[None]:
    """XLA_FLAGS for processes started here: files of TPU programs go to `folder`."""
    before = os.environ.get("XLA_FLAGS")
    asked = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
    os.environ["XLA_FLAGS"] = f"{before} {asked}" if before else asked
    try:
        yield
    finally:
        if before is None:
            del os.environ["XLA_FLAGS"]
        else:
            os.environ["XLA_FLAGS"] = before


def _compile(results: Connection, make: Callable[..., Step], arguments: tuple) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # of what is there no files are made
    made = compile_step(make(*arguments))
    results.send(made if isinstance(made, OutOfMemory) else None)


def _wait(process, results: Connection, folder: Path) -> OutOfMemory | None:
    """Until the files are whole (None), or the process has found that there is no plan."""
    size = -1
    while True:
        written = [file.stat().st_size for file in folder.glob(_PROGRAM)]
        if written and written[0] == size:
            return None
        size = written[0] if written else -1
        if results.poll(_POLL):
            try:
                return results.recv()
            except EOFError:
                process.join()
                raise _ended(process.exitcode) from None


def _ended(code: int) -> Exception:
    """For a compiler that left nothing: negative exit codes are signals."""
    if code == -signal.SIGKILL:
        return UserError(
            "the compiler was killed, as Linux does where memory runs out: a plan of Stable "
            "Diffusion 2 takes 5 GB; free some, or plan on a larger machine"
        )
    return RuntimeError(f"the compiler ended with exit code {code}: see its messages above")


def read(plan: str, program: str, seconds: float) -> Compiled:
    """What XLA's files say: its buffer assignment, and the program as it will be."""
    sizes = {"arguments": 0, "outputs": 0, "aliased": 0, "temporaries": 0}
    for size, kind in _ALLOCATION.findall(plan):
        if re.search(r"\bcolor [1-9]", kind):  # a memory of the chip's, not HBM
            continue
        argument, output = "parameter " in kind, "maybe-live-out" in kind
        sizes["arguments"] += int(size) * argument
        sizes["outputs"] += int(size) * output
        sizes["aliased"] += int(size) * (argument and output)
        sizes["temporaries"] += int(size) * (not argument and not output)
    module = _hlo.hlo_module_from_text(program)
    costs = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
    return Compiled(
        **sizes, code=None, flops=costs["flops"], bytes_accessed=None, text=program, seconds=seconds
    )
