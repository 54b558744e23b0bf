"""The named sets of prompt templates."""

from segdiff_jax.combinations import PLACEHOLDER, TEMPLATE_SETS
from segdiff_jax.text import conditioning
from segdiff_jax.text.prompts import SETS, expanded
from segdiff_jax.text.vocabulary import ClassEntry


def test_every_set_that_a_config_may_name_has_its_templates():
    assert tuple(SETS) == TEMPLATE_SETS
    assert {name: len(set(SETS[name])) for name in SETS} == {
        "single": 1,
        "scene": 1,
        "vild14": 14,
        "clip80": 80,
    }
    assert all(template.count(PLACEHOLDER) == 1 for name in SETS for template in SETS[name])


def test_sets_hold_the_sentences_of_their_authors():
    assert {
        "a photo of a {class}.",
        "There is the {class} in the scene",
        "This is a photo of a medium {class}.",
        "There is a large {class} in the scene.",
    } < set(SETS["vild14"])
    assert {
        "a bad photo of a {class}.",
        "a photo of the hard to see {class}.",
        "graffiti of the {class}.",
        "itap of my {class}.",
        "the {class} in a video game.",
        "a embroidered {class}.",
        "a photo of many {class}.",
    } < set(SETS["clip80"])


def test_names_of_sets_and_templates_may_be_mixed():
    assert expanded(("{class}", "scene")) == ("{class}", "A photo of a {class} in the scene")
    entry = ClassEntry("sky", ("heaven",))
    asked = conditioning.prompts(entry, ("vild14",))
    assert len(asked) == 28 and asked[0] == "a photo of a sky."
    assert asked[14] == "a photo of a heaven."
