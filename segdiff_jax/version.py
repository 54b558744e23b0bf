"""Which code this is, for what is measured and stored with it."""

import subprocess
from pathlib import Path

from segdiff_jax import __version__


def code_version() -> str:
    """Return the package's version; in a checkout also its commit, and "dirty" if files changed."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return __version__
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{found.stdout.strip()}"
