"""Which code wrote a checkpoint or a result: version, commit, and whether files were changed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import segdiff_jax

PACKAGE = Path(segdiff_jax.__file__).parent


@pytest.fixture
def copy(tmp_path):
    """A folder with the two modules that tell the version, and git in it as a function."""
    for name in ("__init__.py", "version.py"):
        (tmp_path / "segdiff_jax").mkdir(exist_ok=True)
        shutil.copy(PACKAGE / name, tmp_path / "segdiff_jax" / name)
    (tmp_path / ".gitignore").write_text("__pycache__\n")

    def git(*words):
        identity = ["-c", "user.name=A", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    return tmp_path, git


def version_in(folder):
    code = "from segdiff_jax.version import code_version; print(code_version())"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def test_a_checkout_names_its_commit_and_what_was_changed(copy):
    folder, git = copy
    assert version_in(folder) == segdiff_jax.__version__, "of an installed package"
    git("init", "--quiet")
    assert version_in(folder) == segdiff_jax.__version__, "there is no commit yet"
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert version_in(folder) == f"{segdiff_jax.__version__}+{commit}"
    git("tag", "v9")
    assert version_in(folder) == f"{segdiff_jax.__version__}+{commit}", "tags do not hide it"
    (folder / "segdiff_jax" / "__init__.py").open("a").write("# changed\n")
    assert version_in(folder) == f"{segdiff_jax.__version__}+{commit}-dirty"
