"""Where compiled programs are kept."""

import jax
import pytest

from segdiff_jax.parallel import runtime


@pytest.fixture
def settings(monkeypatch):
    """What `start` sets, in place of the settings of this process."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/me/cache")
    return found


@pytest.mark.parametrize(
    ("workdir", "expected"),
    [
        ("", "/home/me/cache/segdiff_jax"),
        ("/tmp/run", "/home/me/cache/segdiff_jax"),
        ("gs://bucket/runs/one", "gs://bucket/runs/one/compile_cache"),
    ],
)
def test_programs_are_kept_where_the_next_start_finds_them(settings, workdir, expected):
    runtime.start(workdir)
    assert settings["jax_compilation_cache_dir"] == expected


@pytest.mark.parametrize("value", ["", "cache", None])
def test_a_cache_that_is_no_absolute_path_is_as_if_not_set(settings, monkeypatch, value):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME")
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    runtime.start()
    assert settings["jax_compilation_cache_dir"] == "/home/me/.cache/segdiff_jax"


def test_the_environment_decides_first(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "shared"))
    runtime.start("gs://bucket/runs/one")
    assert "jax_compilation_cache_dir" not in settings
