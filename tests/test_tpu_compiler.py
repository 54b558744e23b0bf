"""The compiler's flags: whose word counts, and what they do to a program for a TPU."""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from segdiff_jax import tpu_compiler
from segdiff_jax.roofline import compile
from segdiff_jax.roofline.chips import CHIPS
from segdiff_jax.roofline.steps import Step

OURS = "--xla_jf_convolution_performance_target=0.95"


@pytest.fixture
def libtpu(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.42.1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, OURS),
        ("--xla_tpu_scoped_vmem_limit_kib=8192", f"--xla_tpu_scoped_vmem_limit_kib=8192 {OURS}"),
        (
            "--xla_jf_convolution_performance_target=1",
            "--xla_jf_convolution_performance_target=1",
        ),
        (OURS, OURS),
    ],
)
def test_the_environment_has_the_last_word(libtpu, given, expected):
    environ = {} if given is None else {"LIBTPU_INIT_ARGS": given}
    tpu_compiler.set_flags(environ)
    assert environ == {"LIBTPU_INIT_ARGS": expected}


def test_a_libtpu_that_may_not_know_the_flag_is_left_alone(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.50")
    environ = {}
    tpu_compiler.set_flags(environ)
    assert environ == {}


def test_without_libtpu_nothing_is_set(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    environ = {}
    tpu_compiler.set_flags(environ)
    assert environ == {}


def convolution(options: dict[str, str]) -> compile.Compiled:
    """Two as in the first level of Stable Diffusion 2, for a v5e."""
    chip = Mesh(np.array(compile.devices(CHIPS["v5e"], "v5e:2x2")[:1]), "x")
    whole = NamedSharding(chip, P())
    image = jax.ShapeDtypeStruct((4, 48, 48, 320), jnp.bfloat16, sharding=whole)
    kernel = jax.ShapeDtypeStruct((3, 3, 320, 320), jnp.bfloat16, sharding=whole)
    layout = ("NHWC", "HWIO", "NHWC")

    def apply(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)

    function = jax.jit(lambda x, w: apply(jax.nn.silu(apply(x, w)), w), compiler_options=options)
    made = compile.compile_step(Step(function, (image, kernel), 1, 0))
    assert isinstance(made, compile.Compiled)
    return made


def test_the_flag_makes_less_code_for_the_same_program():
    ours, fastest = convolution({}), convolution({OURS[2:].split("=")[0]: "1"})
    print(ours.code, fastest.code)
    assert ours.code < 0.9 * fastest.code
    for figure in ("flops", "bytes_accessed", "arguments", "temporaries"):
        assert getattr(ours, figure) == getattr(fastest, figure)
