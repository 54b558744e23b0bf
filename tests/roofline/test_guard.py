"""The small step, compiled for one topology of each generation, against the checked-in figures."""

import json

import pytest
from guard import FILE, TOPOLOGIES, figures

# One generation in every run, the others on demand: each takes the compiler most of a minute.
EVERY_RUN = "v5e:2x2"


@pytest.mark.parametrize(
    "topology",
    [pytest.param(t, marks=[] if t == EVERY_RUN else pytest.mark.slow) for t in TOPOLOGIES],
)
def test_flops_bytes_temporaries_and_collectives_are_what_they_were(topology):
    expected = json.loads(FILE.read_text())[topology]
    found = figures(topology)
    print(topology, found)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=0.02), (
            f"{name}: if the change is meant, run python tests/roofline/guard.py and commit"
        )
