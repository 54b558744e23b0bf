"""The documents name files and config keys that exist."""

import re
from pathlib import Path

import pytest

from segdiff_jax import fields
from segdiff_jax.config import Config

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
KEYS = {key for key, *_ in fields.leaves(Config)}

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


@documents
def test_links_lead_to_files(path):
    prose = re.sub(r"(?m)^(?: {4}|```[^`]*```).*$", "", path.read_text())  # code has brackets too
    links = re.findall(r"\]\(([^)#\s]+)", prose)
    assert not [x for x in links if "://" not in x and not (path.parent / x).exists()]


@documents
def test_flags_name_config_keys(path):
    named = set(re.findall(r"--config\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)", path.read_text()))
    assert named <= KEYS


def test_the_documents_have_links_and_flags():
    text = "".join(path.read_text() for path in DOCUMENTS)
    assert text.count("](") > 20 and text.count("--config.") > 20
