import numpy as np
import pytest

from segdiff_jax.data import vocabulary
from segdiff_jax.errors import UserError

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
        (b"", "empty class list"),
        (b"\n\n", "empty class list"),
        (b"sky\nroad\nSky\n", "duplicate class name 'Sky'"),
        (b"sky\n\nroad\n", "classes.txt:2: no class name"),
        (b"sky\n, tree\n", "classes.txt:2: no class name"),
        (b"\xff\xfe\x00s", "UTF-8"),
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
    assert all(name in str(caught.value) for name in ("'ade20k'", *SIZES))


def test_from_names_refuses_nothing_and_repeated_names():
    with pytest.raises(UserError, match="empty class list"):
        vocabulary.from_names([])
    with pytest.raises(UserError, match="duplicate class name 'sky'"):
        vocabulary.from_names(["sky", "sky, heaven"])
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
