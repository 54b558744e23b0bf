"""From class names to the sentences that CLIP reads."""

from collections.abc import Sequence

from segdiff_jax.errors import UserError
from segdiff_jax.text.vocabulary import ClassEntry

PLACEHOLDER = "{class}"


def prompts(entry: ClassEntry, templates: Sequence[str]) -> list[str]:
    """Every name of the class in every template: name first, then synonyms, each over templates.

    Raises `UserError` when there is no template or one lacks "{class}".
    """
    # replace, not format: other braces in a template are text.
    return [template.replace(PLACEHOLDER, name) for name, template in asked(entry, templates)]


def asked(entry: ClassEntry, templates: Sequence[str]) -> list[tuple[str, str]]:
    """The (name, template) of each of `prompts`, in their order. Raises as `prompts` does."""
    if isinstance(templates, str):
        templates = (templates,)
    if not templates:
        raise UserError(
            'config.prompts.templates is empty: name one, such as "a photo of a {class}"'
        )
    for template in templates:
        if PLACEHOLDER not in template:
            raise UserError(f"config.prompts.templates: {template!r} lacks {PLACEHOLDER}, add it")
    return [(name, template) for name in entry.names for template in templates]
