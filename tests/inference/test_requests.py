"""--classes as a user writes them."""

import pytest

from segdiff_jax.errors import UserError
from segdiff_jax.inference import requests


def test_classes_and_synonyms():
    classes = requests.parse_classes(" sky; building, edifice ,tower;road;")
    assert classes.names == ("sky", "building", "road")
    assert classes.classes[1].synonyms == ("edifice", "tower")


def test_classes_from_a_file_and_from_the_package(tmp_path):
    (tmp_path / "c.txt").write_text("sky\nbuilding, edifice\n")
    assert requests.parse_classes(f"@{tmp_path / 'c.txt'}").names == ("sky", "building")
    assert len(requests.parse_classes("ade20k_150")) == 150


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--classes: empty class list"),
        (" ; ;", "--classes: empty class list"),
        ("sky; road; Sky", "--classes: duplicate class name 'Sky'"),
        ("sky; , heaven", "--classes: a class has an empty name"),
        ("@/no/such.txt", "/no/such.txt"),
    ],
)
def test_bad_classes(text, message):
    with pytest.raises(UserError, match=message):
        requests.parse_classes(text)
