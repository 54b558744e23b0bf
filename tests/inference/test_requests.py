"""--images and --classes as a user writes them."""

import os
import re
import shutil

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


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt", "sub/c.png", "sub/d[1].png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def _names(folder, *arguments):
    found = requests.find_images([str(folder / a) if a else str(folder) for a in arguments])
    return [os.path.relpath(p, folder) for p in found]


def test_files_folders_and_patterns(folder):
    assert _names(folder, "") == ["a.JPG", "b.png"]
    assert _names(folder, "sub/c.png", "*.png") == ["sub/c.png", "b.png"]
    assert _names(folder, "**/*.png") == ["b.png", "sub/c.png", "sub/d[1].png"]
    assert _names(folder, "sub/d[1].png") == ["sub/d[1].png"], "a file before a pattern"


def test_each_image_once(folder):
    os.symlink(folder / "b.png", folder / "link.png")
    assert _names(folder, "b.png", "*.png", "sub/../b.png") == ["b.png"]


def test_a_folder_whose_name_has_brackets(tmp_path):
    for name in ("g [x]/a.png", "g [x]/sub/b.png", "g x/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert _names(tmp_path, "g [x]") == ["g [x]/a.png"]
    assert _names(tmp_path, "g [x]/*.png", "g [x]/**/*.png") == ["g [x]/a.png", "g [x]/sub/b.png"]
    assert _names(tmp_path, "g[ ]x/*.png") == ["g x/c.png"]


def test_images_in_sub_folders_are_pointed_at(folder):
    shutil.move(folder / "sub", folder / "other" / "deep" / "sub")
    with pytest.raises(UserError, match=r"other/deep/sub/c.png: name one of those, or all wi") as e:
        _names(folder, "other")
    assert "but 2 in its sub-folders" in str(e.value)
    (pattern,) = re.findall("'(.*)'", str(e.value))
    assert len(requests.find_images([pattern])) == 2


def test_what_is_no_file_is_not_passed_over(folder):
    (folder / "gone.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    assert _names(folder, "*.png") == ["b.png", "gone.png", "pipe.png"]
    assert _names(folder, "") == ["a.JPG", "b.png", "gone.png", "pipe.png"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("x[1].png", r"no file matches this pattern.*\[ and \] enclose"),
        ("gone.png", "gone.png: a link to nowhere, which does not exist"),
        ("b.png/c.png", "b.png/c.png: "),
        ("n" * 300, "no such file or folder"),
        ("none.png", "none.png: no such file or folder"),
        ("*.webp", "no file matches"),
        ("empty", "no images in this folder"),
    ],
)
def test_nothing_found(folder, argument, message):
    (folder / "empty").mkdir()
    (folder / "gone.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=message):
        _names(folder, "b.png", argument)
    with pytest.raises(UserError, match="empty name"):
        requests.find_images([""])
