"""What a command may replace or delete: only what an earlier one wrote and listed."""

import json
import os

import pytest
from etils import epath

from segdiff_jax import cli, ownership
from segdiff_jax.config import DiffusionConfig
from segdiff_jax.data import scenes
from segdiff_jax.errors import UserError
from segdiff_jax.weights import pretrained


def save(folder, kind="pretrained", **extra):
    """A small export: the schedule, and `extra` files by name."""
    files = {name.replace("_", "."): text for name, text in extra.items()}
    small = pretrained.Pretrained(schedule=DiffusionConfig())
    pretrained.save(small, folder, extra_files=files, kind=kind)


def tree(folder):
    """Every file below `folder` and what is in it, links as where they point."""
    found = {}
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(root, name)
            if os.path.islink(path):
                found[os.path.relpath(path, folder)] = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[os.path.relpath(path, folder)] = file.read()
            else:
                found[os.path.relpath(path, folder)] = None
    return found


def refused(folder, match, call=save):
    """`call(folder)` is refused in one line and changes nothing beside `folder` or in it."""
    beside = os.path.dirname(os.path.abspath(folder))
    before = tree(beside)
    with pytest.raises(UserError, match=match) as caught:
        call(folder)
    assert "\n" not in str(caught.value)
    assert tree(beside) == before


def test_an_own_folder_is_replaced_and_an_empty_one_filled(tmp_path):
    (tmp_path / "d").mkdir()
    save(tmp_path / "d", README_md="first", extra_txt="of the first")
    save(tmp_path / "d", README_md="second")
    assert (tmp_path / "d" / "README.md").read_text() == "second"
    assert not (tmp_path / "d" / "extra.txt").exists()
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize(
    "put",
    [
        lambda d: (d / "scheduler" / "my thesis.txt").write_text("years"),
        lambda d: (d / "notes").mkdir(),
        lambda d: (d / "weights").symlink_to(d.parent),
        lambda d: (d / ".DS_Store").write_text("x"),
        lambda d: (d / "gone").symlink_to("nowhere"),
        lambda d: ((d / "scheduler").rename(d.parent / "s"), (d / "scheduler").symlink_to("../s")),
        lambda d: ((d / "model_index.json").unlink(), (d / "model_index.json").mkdir()),
    ],
)
def test_a_folder_with_a_file_of_the_user_is_left_alone(tmp_path, put):
    save(tmp_path / "d")
    put(tmp_path / "d")
    refused(tmp_path / "d", "is no part of the export in this folder")


def test_a_file_that_came_while_the_new_export_was_written(tmp_path):
    names = ["a", "b"]
    with ownership.whole_folder(tmp_path / "d", "x", names, last="b") as folder:
        (folder / "a").write_text("1")
    with (
        pytest.raises(UserError, match="no part of the export"),
        ownership.whole_folder(tmp_path / "d", "x", names, last="b") as folder,
    ):
        (folder / "a").write_text("2")
        (tmp_path / "d" / "thesis").write_text("years")
    assert (tmp_path / "d" / "a").read_text() == "1" and (tmp_path / "d" / "thesis").exists()
    assert os.listdir(tmp_path) == ["d"]


def test_a_folder_without_a_list_is_somebody_elses(tmp_path):
    save(tmp_path / "d")
    (tmp_path / "d" / ownership.MARKER).unlink()  # Stable Diffusion's own, or of an older version
    refused(tmp_path / "d", r"has no \.segdiff_files\.json .*remove it yourself")


def test_the_folder_that_one_is_in_is_not_taken_away(tmp_path, monkeypatch):
    save(tmp_path / "d")
    for place, output in (("d", "."), ("d/scheduler", ".."), ("d/scheduler", tmp_path / "d")):
        monkeypatch.chdir(tmp_path / place)
        refused(output, "holds the folder you are in, .*: go to another one")
    monkeypatch.chdir(tmp_path)
    save("d")


def test_another_kind_is_not_replaced(tmp_path):
    save(tmp_path / "d", kind="pretrained")
    refused(tmp_path / "d", "holds pretrained files", lambda d: save(d, kind="diffusers"))
    ownership.claim(tmp_path / "e", "evaluation", ["index.html"])
    (tmp_path / "e" / "index.html").write_text("scores")
    refused(tmp_path / "e", "holds evaluation files")
    refused(
        tmp_path / "e",
        "index.html: is part of the evaluation here",
        lambda d: ownership.claim(d, "prediction", ["index.html"]),
    )


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"files": ["a"]}', '{"files": {"pretrained": ["../a"]}}']
    + ['{"files": {"pretrained": ["/etc/passwd"]}}', '{"files": {"pretrained": [1]}}'],
)
def test_a_damaged_list_is_named(tmp_path, text):
    save(tmp_path / "d")
    (tmp_path / "d" / ownership.MARKER).write_text(text)
    refused(tmp_path / "d", "segdiff_files.json: damaged")


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/empty")
    for _ in range(2):  # also over the export that is then there
        save(f"{tmp_path}/link/")
        assert os.readlink(tmp_path / "link") == "disk/empty"
        assert (tmp_path / "disk" / "empty" / "model_index.json").exists()
    assert os.listdir(tmp_path / "disk") == ["empty"]


@pytest.mark.parametrize("below", ["", "/a", "/a/b"])
def test_a_dangling_link_is_refused(tmp_path, below):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    message = "link: a link to .*/unmounted, which does not exist"
    refused(f"{tmp_path}/link{below}", message)
    refused(f"{tmp_path}/link{below}", message, lambda d: ownership.claim(d, "x", ["a"]))


def test_places_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    refused(tmp_path / "file", "it is a file, not a directory")
    refused(tmp_path / "file" / "d", "part of the path is a file")
    refused(f"{tmp_path}/file/", "it is a file, not a directory")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as it is of others than root
    refused(tmp_path / "shut", "permission denied", lambda d: ownership.check(d, "x", ["a"]))


def test_claims_add_up_and_settle_to_what_was_written(tmp_path):
    with ownership.claimed(tmp_path, "x", ["a", "sub/b", "never"]):
        assert ownership.owned(tmp_path)["x"] == {"a", "sub/b", "never"}, "before they are written"
        (tmp_path / "a").write_text("1")
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "b").write_text("1")
    assert ownership.owned(tmp_path) == {"x": {"a", "sub/b"}}
    (tmp_path / "never").write_text("of the user")
    with pytest.raises(UserError, match="never: would be replaced"):
        ownership.claim(tmp_path, "x", ["a", "never"])
    ownership.claim(tmp_path, "y", ["c"])
    assert set(ownership.owned(tmp_path)) == {"x", "y"}
    assert ownership.is_ours(tmp_path / "a") and not ownership.is_ours(tmp_path / "never")
    with pytest.raises(KeyError), ownership.claimed(tmp_path / "new", "x", ["a"]):
        raise KeyError
    assert os.listdir(tmp_path / "new") == [], "nothing was written, nothing is ours"


def test_a_result_that_became_a_link_is_not_written_through(tmp_path):
    ownership.claim(tmp_path / "o", "x", ["a"])
    (tmp_path / "thesis").write_text("years")
    (tmp_path / "o" / "a").symlink_to("../thesis")
    refused(tmp_path / "o", "a: a link", lambda d: ownership.claim(d, "x", ["a"]))


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("m", "m"),
        ("m/", "m"),
        ("./m/../m", "m"),
        ("m/sub/new", "m"),
        ("link", "m"),
        ("link/new", "m"),
        ("m", "link"),
    ],
)
def test_apart_through_links_and_dots(tmp_path, monkeypatch, inner, outer):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "link").symlink_to("m")
    with pytest.raises(UserError, match="which is only read"):
        ownership.check_apart(inner, "--checkpoint", outer)
    if os.path.exists(inner):
        with pytest.raises(UserError, match="which is only read"):
            ownership.check_apart(outer, "--checkpoint", inner)
    for other in ("mm", "n", "someone/sd-2"):
        ownership.check_apart(other, "--checkpoint", "m")
        ownership.check_apart("m", "init_from", other)


def test_scenes_leave_the_files_of_the_user(tmp_path, capsys):
    def write(output, *more):
        with pytest.raises(SystemExit) as caught:
            cli.run(scenes.main, ["--output", str(output), "--count=2", "--size=16", *more])
        return caught.value.code, capsys.readouterr().err

    for flag in ("--count=-1", "--count=0", "--size=0", "--seed=-1"):
        code, error = write(tmp_path / "o", flag)
        assert code == 2 and flag.split("=")[0] in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()
    assert write(tmp_path / "o") == write(tmp_path / "o") == (0, "")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "classes.txt").write_text("crack\n")
    code, error = write(tmp_path / "mine")
    assert code == 2 and "classes.txt: would be replaced" in error and error.count("\n") == 1
    assert tree(tmp_path / "mine") == {"classes.txt": b"crack\n"}
    assert json.loads((epath.Path(tmp_path) / "o" / ownership.MARKER).read_text())["files"].keys()
