"""The figures CI holds a small step to: `python tests/roofline/guard.py` writes them anew.

Run it only when a change of the step is meant to change them, and say in the commit by how much.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from small_config import get_config

from segdiff_jax.config import validate
from segdiff_jax.roofline import measure

FILE = Path(__file__).with_name("guard.json")
TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")  # one of each generation, 4 chips


def figures(topology: str) -> dict[str, float]:
    """What is guarded, per chip. Nothing timed."""
    made = measure.measure(validate(get_config()), measure.Target(topology))
    chip = made["per_chip"]
    return {
        "flops": chip["flops"]["total"],
        "bytes_accessed": chip["bytes_accessed"],
        "temporaries": chip["hbm"]["temporaries"],
        "collectives": sum(c["count"] for c in chip["collectives"]),
    }


if __name__ == "__main__":
    values = {topology: figures(topology) for topology in TOPOLOGIES}
    FILE.write_text(json.dumps(values, indent=2) + "\n")
    print(FILE.read_text())
