"""The compiler's flags: whose word counts, and what they do to a program for a TPU."""

import importlib.metadata

import pytest

from segdiff_jax import tpu_compiler

OURS = "--xla_jf_convolution_performance_target=0.95"


@pytest.fixture(autouse=True)
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
def test_the_environment_has_the_last_word(given, expected):
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
