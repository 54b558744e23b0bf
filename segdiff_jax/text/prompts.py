"""The sets of prompt templates that the field compares itself by, and how a config names them."""

from collections.abc import Iterable, Sequence

from segdiff_jax.combinations import PLACEHOLDER


def expanded(templates: Sequence[str]) -> tuple[str, ...]:
    """Replace each name of a set in `templates` by the set."""
    return tuple(template for one in templates for template in SETS.get(one, (one,)))


def _of_either(nouns: Iterable[str]) -> tuple[str, ...]:
    """Make "a sketch of a {class}." and "a sketch of the {class}." of "sketch"."""
    return tuple(f"{noun} of {article} {{class}}." for noun in nouns for article in ("a", "the"))


def _of_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """Make "a photo of a clean {class}." and "a photo of the clean {class}." of "clean"."""
    articles = ("a", "the")
    return tuple(
        f"a photo of {article} {kind} {{class}}." for kind in kinds for article in articles
    )


# OpenAI's 80 for ImageNet (arXiv 2103.00020), in another order: they are averaged.
_CLIP = (
    *_of_either(f"a {kind} photo" for kind in ("bad", "low resolution", "cropped", "bright")),
    *_of_either(f"a {kind} photo" for kind in ("dark", "close-up", "black and white", "blurry")),
    *_of_either(f"a {kind} photo" for kind in ("pixelated", "jpeg corrupted", "good")),
    *_of_either(("a photo", "a sculpture", "a rendering", "a tattoo", "a drawing", "a painting")),
    *_of_either(("a doodle", "a sketch", "a rendition", "graffiti", "art", "itap")),
    *_of_kinds(("hard to see", "clean", "dirty", "cool", "nice", "weird", "small", "large")),
    *("a photo of many {class}.", "a photo of my {class}.", "a photo of one {class}."),
    "itap of my {class}.",
    *("a {class} in a video game.", "the {class} in a video game."),
    *(
        f"{article} {kind} {{class}}."
        for kind in ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")
        for article in ("a", "the")
    ),
)

# Those of FC-CLIP and SAN, after ViLD (arXiv 2104.13921).
_SIZES = ("small", "medium", "large")
_VILD = (
    "a photo of a {class}.",
    "This is a photo of a {class}",
    "There is a {class} in the scene",
    "There is the {class} in the scene",
    "a photo of a {class} in the scene",
    *(f"a photo of a {size} {{class}}." for size in _SIZES),
    *(f"This is a photo of a {size} {{class}}." for size in _SIZES),
    *(f"There is a {size} {{class}} in the scene." for size in _SIZES),
)

SETS: dict[str, tuple[str, ...]] = {
    "single": (f"a photo of a {PLACEHOLDER}",),
    "scene": (f"A photo of a {PLACEHOLDER} in the scene",),  # of CAT-Seg
    "vild14": _VILD,
    "clip80": _CLIP,
}
