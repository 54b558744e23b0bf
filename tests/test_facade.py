"""What `import segdiff_jax` offers."""

import subprocess
import sys

import pytest

import segdiff_jax


def test_every_public_name_is_there_and_documented():
    for name in segdiff_jax.__all__:
        assert getattr(segdiff_jax, name), name
        assert name.startswith("__") or getattr(segdiff_jax, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'segmentor'"):
        _ = segdiff_jax.segmentor


def test_the_package_alone_does_not_load_jax():
    code = "import sys, segdiff_jax, segdiff_jax.cli; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
