import pytest

from segdiff_jax.errors import UserError
from segdiff_jax.text.prompts import prompts
from segdiff_jax.text.vocabulary import ClassEntry


def test_every_name_appears_in_every_template():
    entry = ClassEntry("building", ("edifice",))
    assert prompts(entry, ("a photo of a {class}", "{class}, a {class} in {braces}")) == [
        "a photo of a building",
        "building, a building in {braces}",
        "a photo of a edifice",
        "edifice, a edifice in {braces}",
    ]


def test_braces_in_a_class_name_are_text():
    assert prompts(ClassEntry("{x} {class}"), ("a {class}",)) == ["a {x} {class}"]


def test_a_single_string_is_one_template():
    assert prompts(ClassEntry("sky"), "the {class}") == ["the sky"]


def test_template_without_placeholder_is_refused_by_name():
    with pytest.raises(UserError, match="'a photo'.*lacks"):
        prompts(ClassEntry("sky"), ("a {class}", "a photo"))
    with pytest.raises(UserError, match="templates is empty"):
        prompts(ClassEntry("sky"), ())
