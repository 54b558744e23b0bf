"""The figures in docs/results.md are those of this code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = (ROOT / "docs" / "results.md").read_text()
# What decides the demo's figures. A change of any of these makes a row old.
DECIDES = [
    "configs/demo.py",
    "segdiff_jax/codec.py",
    *(f"segdiff_jax/{room}" for room in ("diffusion", "models", "text", "data")),
    *(f"segdiff_jax/training/{name}.py" for name in ("losses", "step", "optimizer", "networks")),
]
ROWS = {"miou_trained": "mIoU, trained combinations", "miou_novel": "mIoU, never-trained"}


def documented(row: str) -> list[float]:
    line = next(line for line in RESULTS.splitlines() if line.startswith(f"| {row}"))
    return [float(figure) for figure in re.findall(r"\d\.\d+", line)]


@pytest.mark.slow
def test_the_demo_reaches_what_is_documented(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # it trains for minutes
    for module, *places in (
        ("train", "--workdir", tmp_path / "run"),
        ("evaluate", "--checkpoint", tmp_path / "run", "--output", tmp_path / "out"),
    ):
        command = [sys.executable, "-m", f"segdiff_jax.{module}", "--config", "configs/demo.py"]
        subprocess.run([*command, *map(str, places)], cwd=ROOT, env=environment, check=True)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for key, row in ROWS.items():
        assert metrics[key] == pytest.approx(documented(row)[0], abs=0.05), row


@pytest.mark.slow
def test_no_row_of_the_demo_is_older_than_the_code():
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: nothing says when the code was changed")
    measured = re.search(r"make demo`?[^\n]*at commit `(\w+)`", RESULTS)
    assert measured, "docs/results.md does not say at which commit the demo was measured"
    command = ["git", "log", "--oneline", f"{measured[1]}..HEAD", "--", *DECIDES]
    changes = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not changes, f"changed since the demo was measured at {measured[1]}:\n{changes}"
