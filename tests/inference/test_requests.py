"""What a user asks of prediction, as it is understood."""

import numpy as np
import pytest

from segdiff_jax.errors import UserError
from segdiff_jax.inference import requests


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("cityscapes", "cityscapes_19"),
        ("ADE20K", "ade20k_150 or ade20k_847"),
        ("coco-stuff", "coco_stuff_171"),
        ("ade20k-150", "ade20k_150"),
    ],
)
def test_a_packaged_list_with_another_name_is_not_taken_for_a_class(text, meant):
    with pytest.raises(UserError, match=f"--classes {text}: .* write {meant}$"):
        requests.parse_classes(text)


@pytest.mark.parametrize("text", ["coco", "city; scapes", "voc", "pascal"])
def test_other_words_are_classes(text):
    assert requests.parse_classes(text).names == tuple(text.split("; "))


def test_an_encoded_image_is_one_short_line_of_a_notebook():
    encoded = requests.Encoded(np.zeros((40, 60, 3), np.uint8), np.zeros((5, 8, 16), np.float32))
    assert repr(encoded) == "Encoded(40 × 60)"
