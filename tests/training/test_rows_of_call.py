"""How many rows a compiled call has."""

import pytest

from segdiff_jax.parallel.placement import rows_of_call


@pytest.mark.parametrize(("most", "devices"), [(1, 1), (4, 1), (25, 1), (32, 1), (32, 8), (5, 4)])
def test_few_sizes_that_waste_little(most, devices):
    largest = -(-most // devices) * devices
    sizes = {count: rows_of_call(count, most, devices) for count in range(1, 3 * largest)}
    assert len(set(sizes.values())) <= 8 and max(sizes.values()) == largest
    for count, size in sizes.items():
        assert size % devices == 0 and size >= min(count, largest)
        assert size <= max(devices, 1.6 * (count + devices - 1))
        assert (size == largest) or count <= size
    assert list(sizes.values()) == sorted(sizes.values())


def test_the_sizes_of_the_default_batch():
    found = sorted({rows_of_call(count, 32, 1) for count in range(1, 100)})
    assert found == [1, 2, 4, 8, 12, 16, 24, 32]
