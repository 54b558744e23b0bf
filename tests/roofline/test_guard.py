"""The small step, compiled for one topology of each generation, against the checked-in figures."""

import json

import pytest
from guard import FILE, TOPOLOGIES, figures


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_flops_bytes_temporaries_and_collectives_are_what_they_were(topology):
    expected = json.loads(FILE.read_text())[topology]
    found = figures(topology)
    print(topology, found)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=0.02), (
            f"{name}: if the change is meant, run python tests/roofline/guard.py and commit"
        )
