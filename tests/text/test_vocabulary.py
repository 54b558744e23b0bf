import dataclasses

import numpy as np
import pytest

from segdiff_jax.errors import UserError
from segdiff_jax.text import vocabulary

SIZES = {
    "ade20k_150": 150,
    "ade20k_847": 847,
    "camvid_11": 11,
    "cityscapes_19": 19,
    "coco_stuff_171": 171,
    "pascal_context_459": 459,
    "pascal_context_59": 59,
    "pascal_voc_20": 20,
    "pascal_voc_21": 21,
}


def test_every_packaged_vocabulary_loads_with_its_size_and_distinct_names():
    assert {name: len(vocabulary.load(name)) for name in vocabulary.packaged()} == SIZES
    for name in SIZES:
        names = vocabulary.load(name).names
        assert len(set(names)) == len(names), name


def test_ade20k_names_that_repeat_are_told_apart_by_synonyms():
    entries = {entry.name: entry for entry in vocabulary.load("ade20k_847").classes}
    assert entries["bag"].synonyms == ()
    assert "bag" in entries["handbag"].synonyms and "purse" in entries["handbag"].synonyms
    assert entries["traveling bag"].synonyms[0] == "bag"
    assert {"pipe", "tube", "basket", "basketball hoop"} <= set(entries)


def test_names_and_synonyms_are_cut_at_commas():
    vocab = vocabulary.from_names(["sky", " building,  edifice , block,", "#1 sign"])
    assert vocab.names == ("sky", "building", "#1 sign")
    assert [entry.synonyms for entry in vocab.classes] == [(), ("edifice", "block"), ()]


def test_classes_file_keeps_the_order_of_its_lines(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffsky\r\nbuilding, edifice\r\nstraße\r\n\r\n".encode())
    vocab = vocabulary.load(path)
    assert vocab.names == ("sky", "building", "straße")
    assert vocab.classes[1].synonyms == ("edifice",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"\n\n", "an empty file"),
        (b"sky\nroad\nSky\n", "duplicate class name 'Sky'"),
        (b"sky\n\nroad\n", "classes.txt:2: no class name"),
        (b"sky\n, tree\n", "classes.txt:2: no class name"),
        (b"\xff\xfe\x00s", "UTF-8"),
        (b"# my classes\nroad\n", "looks like a comment"),
        (b"#sky\nroad\n", "looks like a comment"),
        (b"sky # the first\nroad\n", "looks like a comment"),
        (b"grass; brick; sky\n", "semicolon"),
    ],
)
def test_bad_class_files_are_named_in_one_line(tmp_path, content, words):
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        vocabulary.load(path)
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_vocabulary_lists_the_packaged_ones():
    with pytest.raises(UserError) as caught:
        vocabulary.load("ade20k")
    assert all(name in str(caught.value) for name in ("ade20k: ", *SIZES))


def test_what_is_no_file_of_names(tmp_path):
    (tmp_path / "folder.json").mkdir()
    for folder in (tmp_path, tmp_path / "folder.json"):
        with pytest.raises(UserError, match=f"{folder}: .*Is a directory"):
            vocabulary.load(folder)
    (tmp_path / "pointer.txt").write_text("version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(UserError, match="pointer.txt: a git-lfs pointer"):
        vocabulary.load(tmp_path / "pointer.txt")


def test_from_names_refuses_lists_and_names_of_nothing():
    with pytest.raises(UserError, match="empty class list"):
        vocabulary.from_names([])
    with pytest.raises(UserError, match="empty name"):
        vocabulary.from_names(["sky", " "])


def test_palette_uses_the_given_colours_and_distinct_ones_where_none_are_given():
    camvid = vocabulary.load("camvid_11").palette()
    assert camvid.shape == (11, 3) and camvid.dtype == np.uint8
    assert camvid[0].tolist() == [128, 128, 128] and camvid[1].tolist() == [128, 0, 0]

    names = [f"class {i}" for i in range(40)]
    palette = vocabulary.from_names(names).palette()
    assert len({tuple(color) for color in palette[:40]}) == 40
    assert palette.max(axis=1).min() > 100, "no class is as dark as *other*"
    assert (vocabulary.from_names(names[:7]).palette() == palette[:7]).all()
    assert vocabulary.load("ade20k_847").palette().shape == (847, 3)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["grass", "brick, wall", "sky"], "3 classes, 1 synonym: grass; brick (= wall); sky"),
        (["grass", "sky, air, heaven"], "2 classes, 2 synonyms: grass; sky (= air, heaven)"),
        (["grass", "sky"], "2 classes: grass; sky"),
        (["grass"], "1 class: grass"),
        (["grass, lawn"], "1 class (grass = lawn)"),
    ],
)
def test_a_list_says_in_one_line_how_it_was_understood(names, said):
    assert vocabulary.from_names(names).summary() == said


def test_what_is_said_of_a_list_is_one_readable_line():
    said = vocabulary.from_names(["grass, brick, sky"]).summary()
    assert said.startswith("1 class (grass = brick = sky): ") and '";"' in said
    assert "more" in vocabulary.from_names([", ".join(f"c{i}" for i in range(99))]).summary()
    said = vocabulary.load("ade20k_847").summary()
    assert said.startswith("847 classes, ") and said.endswith("; and 835 more") and len(said) < 400
    said = vocabulary.from_names(["x" * 10_000, "sky"]).summary()
    assert len(said) < 100 and "…" in said and said.endswith("; sky")


@pytest.mark.parametrize(
    "character",
    ["\n", "\t", "\x00", "\x1b", "\x7f", "\x85", "\u2028", "\u200b", "\ufeff", "\u202e", "\u3164"],
)
def test_what_cannot_be_seen_in_a_name_is_refused_and_spelt_out(character, tmp_path):
    for names in ([f"s{character}ky"], ["road, a", f"building, edi{character}fice"]):
        with pytest.raises(UserError) as caught:
            vocabulary.from_names(names)
        message = str(caught.value)
        assert ascii(character)[1:-1] in message and character not in message
    if character != "\n":
        (tmp_path / "classes.txt").write_text(f"road\ns{character}ky\n", "utf-8", newline="")
        with pytest.raises(UserError, match="invisible character"):
            vocabulary.load(tmp_path / "classes.txt")


def test_marks_that_scripts_are_written_with_are_no_fault():
    names = ("می\u200cخواهم", "crème brûlée", "टमाटर", "空", "👩\u200d🌾")
    assert vocabulary.from_names(names).names == names
    with pytest.raises(UserError, match="duplicate class name"):
        vocabulary.from_names(["cre\u0300me", "crème"])
    for name in ("\u0301", "\u200d"):
        with pytest.raises(UserError, match="shows nothing|invisible"):
            vocabulary.from_names([name])


def test_only_line_ends_end_a_line(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes(b"#1 sign\r\nroad\rsky\ntree")
    assert vocabulary.load(path).names == ("#1 sign", "road", "sky", "tree")
    path.write_bytes(b"sky\x0croad\n")
    with pytest.raises(UserError, match="x0c"):
        vocabulary.load(path)


def test_an_entry_is_made_of_texts():
    entry = vocabulary.ClassEntry("building", ["edifice"])
    assert entry.synonyms == ("edifice",) and hash(entry)
    for arguments in (("building", "edifice"), (5,), ("building", (5,))):
        with pytest.raises(TypeError, match="ClassEntry"):
            vocabulary.ClassEntry(*arguments)
    entry = vocabulary.ClassEntry("sky", color=np.array([1, 0, 255]))
    assert entry.color == (1, 0, 255) and hash(entry)
    for color in ([300, 0, 0], "red", (1, 2), (-1, 0, 0), (0.5, 0, 0), 5):
        with pytest.raises(ValueError, match="ClassEntry: color=.* three whole numbers"):
            vocabulary.ClassEntry("sky", color=color)


def test_a_stored_list_is_the_list(tmp_path):
    path = tmp_path / "classes.json"
    given = vocabulary.from_names(["sky", "building, edifice", "straße"])
    path.write_text(vocabulary.to_json(given), "utf-8")
    assert vocabulary.load(path).classes == given.classes and vocabulary.load(path).name == str(
        path
    )
    entry = '{"classes": [{"name": "sky", "synonyms": %s, "color": %s}]}'
    for broken, words in (
        ("{", "not valid JSON"),
        ('{"classes": [{"name": 5, "synonyms": []}], "name": ""}', "5 is no text"),
        ("[]", "no JSON object"),
        (entry % ("[]", "[300, 0, 0]"), "three whole numbers"),
        (entry % ('"abc"', "[0, 0, 0]"), "is one text"),
        ('{"classes": ["sky"]}', "no class list of this program"),
        ('{"classes": [{"name": "sky"}]}', "no 'synonyms'"),
        ('{"classes": %s}' % ("[" * 100_000 + "]" * 100_000), "nested too deeply"),
        ("version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
    ):
        path.write_text(broken)
        with pytest.raises(UserError, match=f"classes.json: .*{words}") as caught:
            vocabulary.load(path)
        assert "\n" not in str(caught.value)


def test_shares_of_classes_are_stored(tmp_path):
    path, trained = tmp_path / "classes.json", vocabulary.from_names(["sky", "building, edifice"])
    for shares in ((), (0.6, 0.4)):
        trained = dataclasses.replace(trained, shares=shares)
        path.write_text(vocabulary.to_json(trained), "utf-8")
        assert vocabulary.load(path).shares == shares


@pytest.mark.parametrize(
    ("trained", "shares", "wanted", "found"),
    [
        (["sky", "building", "pole"], (0.6, 0.3, 0.1), ["Pole", "zebra", "sky"], (0.1, 0.3, 0.6)),
        # A synonym has the share of its class, but a class's own name comes first.
        (["sky", "building, edifice", "x"], (0.05, 0.9, 0.02), ["Edifice", "zebra"], (0.9, 0.05)),
        (["bag", "hand bag, bag", "pole, bag"], (0.6, 0.3, 0.1), ["bag", "zebra"], (0.6, 0.3)),
    ],
)
def test_shares_go_by_name(trained, shares, wanted, found):
    known = dataclasses.replace(vocabulary.from_names(trained), shares=shares)
    assert vocabulary.with_shares(vocabulary.from_names(wanted), known).shares == found
