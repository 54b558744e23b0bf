import pickle

import numpy as np
import pytest
from PIL import Image

from segdiff_jax.config import DataConfig
from segdiff_jax.data import sources, vocabulary
from segdiff_jax.data.images import UnreadableError
from segdiff_jax.data.sources import open_source
from segdiff_jax.errors import UserError


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)
    return path


def photo(value, size=(6, 8)):
    return np.full((*size, 3), value, np.uint8)


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            write(tmp_path / split / "images" / f"p{i}.png", photo(10 * i))
            write(tmp_path / split / "masks" / f"p{i}.png", np.full((6, 8), i))
    (tmp_path / "classes.txt").write_text("sky\nbuilding, edifice\nroad\n")
    return tmp_path


def folder(root, **options):
    return DataConfig(source="folder", root=str(root), **options)


def test_folder_pairs_images_and_masks_by_stem(root):
    write(root / "train" / "images" / "q.jpg", photo(200))
    write(root / "train" / "images" / "r.JPEG", photo(100))
    write(root / "train" / "images" / "s.webp", photo(90))
    for stem in "qrs":
        write(root / "train" / "masks" / f"{stem}.png", np.full((6, 8), 255))
    (root / "train" / "images" / "notes.txt").write_text("not an image")
    (root / "train" / "images" / "._p0.png").write_bytes(b"left by another system")
    source = open_source(folder(root), "train", 0)
    assert [source[i]["name"] for i in range(len(source))] == ["p0", "p1", "p2", "q", "r", "s"]
    assert source.vocabulary.names == ("sky", "building", "road") and source.novel == ()
    record = source[1]
    assert (record["image"] == 10).all() and record["image"].shape == (6, 8, 3)
    assert (record["labels"] == 1).all() and record["labels"].dtype == np.uint8
    assert (source[4]["labels"] == 255).all()
    with pytest.raises(IndexError):
        source[6]
    assert len(open_source(folder(root), "val", 0)) == 2


def test_folder_without_splits(tmp_path):
    write(tmp_path / "images" / "a.png", photo(5))
    write(tmp_path / "masks" / "a.png", np.zeros((6, 8)))
    config = folder(tmp_path, vocabulary="camvid_11")
    assert open_source(config, "train", 0)[0]["name"] == "a"
    assert len(open_source(config, "val", 0)) == 1


def test_mask_of_sixteen_bits_and_palette_mask_give_the_same_ids(root):
    ids = np.arange(48).reshape(6, 8) % 3
    Image.fromarray(ids.astype(np.uint16)).save(root / "train" / "masks" / "p0.png")
    image = Image.fromarray(ids.astype(np.uint8), "P")
    image.putpalette([7, 7, 7, 200, 0, 0, 0, 200, 0])
    image.save(root / "train" / "masks" / "p1.png")
    source = open_source(folder(root), "train", 0)
    assert (source[0]["labels"] == ids).all() and (source[1]["labels"] == ids).all()


def test_cache_reads_each_file_once_and_stays_out_of_pickles(root):
    source = open_source(folder(root, cache_images=True), "train", 0)
    first = source[2]
    (root / "train" / "images" / "p2.png").unlink()
    assert source[2] is first
    copy = pickle.loads(pickle.dumps(source))
    assert (copy[0]["image"] == source[0]["image"]).all()
    with pytest.raises(UnreadableError, match=r"p2\.png: no such file"):
        copy[2]


def check_error(config, words, split="train", index=None):
    with pytest.raises(UserError) as caught:
        source = open_source(config, split, 0)
        assert index is not None, "opening should have failed"
        source[index]
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_missing_folders_are_named(root):
    check_error(folder(root / "nowhere"), ["nowhere", "no such folder"])
    check_error(folder(root), ["test/images", "no such folder"], split="test")
    (root / "train" / "masks").rename(root / "train" / "labels")
    check_error(folder(root), ["train/masks", "no such folder"])


def test_missing_class_list_is_named(root):
    (root / "classes.txt").unlink()
    check_error(folder(root), ["classes.txt", "config.data.vocabulary"])
    check_error(folder(root, vocabulary="nope"), ["'nope'", "ade20k_150"])


def test_image_without_mask_and_empty_folder_are_named(root):
    write(root / "train" / "images" / "lonely.png", photo(0))
    check_error(folder(root), ["lonely.png", "no mask", "train/masks/lonely.png"])
    for path in (root / "val" / "images").iterdir():
        path.unlink()
    check_error(folder(root), ["no images"], split="val")


def test_two_images_of_one_stem_are_refused(root):
    write(root / "train" / "images" / "p0.jpg", photo(0))
    check_error(folder(root), ["p0", "same stem"])


def test_sizes_that_differ_are_named(root):
    write(root / "train" / "masks" / "p1.png", np.zeros((8, 6)))
    check_error(folder(root), ["p1.png", "6x8", "8x6"], index=1)


@pytest.mark.parametrize("bad", [3, 254])
def test_ids_outside_the_class_list_are_named(root, bad):
    mask = np.zeros((6, 8))
    mask[5, 7] = bad
    path = write(root / "train" / "masks" / "p1.png", mask)
    check_error(folder(root), [str(path), f"id {bad} ", "3 classes", "classes.txt"], index=1)


def test_wide_ids_outside_the_class_list_are_named(root):
    Image.fromarray(np.full((6, 8), 300, np.uint16)).save(root / "train" / "masks" / "p1.png")
    check_error(folder(root), ["p1.png", "id 300 "], index=1)


def test_more_classes_than_a_label_map_holds(root):
    (root / "classes.txt").write_text("\n".join(f"c{i}" for i in range(256)))
    check_error(folder(root), ["256 classes", "at most 255"])
    (root / "classes.txt").write_text("\n".join(f"c{i}" for i in range(255)))
    write(root / "train" / "masks" / "p1.png", np.full((6, 8), 254))
    assert (open_source(folder(root), "train", 0)[1]["labels"] == 254).all()


@pytest.mark.parametrize("inside", ["", "ADEChallengeData2016"])
def test_ade20k_tree(tmp_path, inside):
    base = tmp_path / inside
    ids = np.array([[0, 1, 2], [149, 150, 0]])
    for part, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        write(base / "images" / part / f"{stem}.jpg", photo(3, (2, 3)))
        write(base / "annotations" / part / f"{stem}.png", ids)
    (base / "sceneCategories.txt").write_text("ADE_train_00000001 bathroom\n")
    config = DataConfig(source="ade20k", root=str(tmp_path))
    for split, name in (("train", "ADE_train_00000001"), ("val", "ADE_val_00000001")):
        source = open_source(config, split, 0)
        assert source.vocabulary.name == "ade20k_150" and source[0]["name"] == name
        assert source[0]["labels"].tolist() == [[255, 0, 1], [148, 149, 255]]
    write(base / "annotations" / "training" / "ADE_train_00000001.png", ids + 1)
    check_error(config, ["id 151 ", "ade20k_150"], index=0)


# Raw ids of COCO-Stuff's PNGs beside the names in its labels.txt (whose numbers are one higher).
COCO_RAW = {
    0: "person",
    10: "fire hydrant",
    12: "stop sign",
    24: "giraffe",
    26: "backpack",
    89: "toothbrush",
    91: "banner",
    105: "clouds",
    168: "tree",
    181: "wood",
}


def test_coco_stuff_mapping_matches_the_published_names():
    lookup, vocab = sources.coco_stuff_lookup(), vocabulary.load("coco_stuff_171")
    assert (lookup[:182] >= 0).sum() == len(vocab) == 182 - 11
    mapped = lookup[:182][lookup[:182] >= 0]
    assert mapped.tolist() == list(range(171))
    assert {raw: vocab.names[lookup[raw]] for raw in COCO_RAW} == COCO_RAW
    assert lookup[255] == 255 and (lookup[182:255] < 0).all()


@pytest.mark.parametrize("layout", ["mmseg", "raw", "downloaded"])
def test_coco_stuff_trees(tmp_path, layout):
    images, masks = {
        "mmseg": ("images/{}", "annotations/{}"),
        "raw": ("images/{}", "stuffthingmaps/{}"),
        "downloaded": ("{}", "stuffthingmaps_trainval2017/{}"),
    }[layout]
    raw = np.array([[0, 12, 91], [181, 255, 26]])
    expected = sources.coco_stuff_lookup()[raw]
    for part in ("train2017", "val2017"):
        write(tmp_path / images.format(part) / "000000000009.jpg", photo(3, (2, 3)))
        folder_of_masks = tmp_path / masks.format(part)
        if layout == "mmseg":
            write(folder_of_masks / "000000000009_labelTrainIds.png", expected)
            write(folder_of_masks / "000000000009.png", raw)  # the converter leaves these there
        else:
            write(folder_of_masks / "000000000009.png", raw)
    config = DataConfig(source="coco_stuff", root=str(tmp_path))
    for split in ("train", "val"):
        source = open_source(config, split, 0)
        assert len(source) == 1 and source.vocabulary.name == "coco_stuff_171"
        assert (source[0]["labels"] == expected).all()
    if layout == "raw":
        write(tmp_path / "stuffthingmaps" / "train2017" / "000000000009.png", raw * 0 + 11)
        check_error(config, ["id 11 ", "coco_stuff_171"], index=0)


def test_coco_stuff_without_labels_lists_where_it_looked(tmp_path):
    write(tmp_path / "images" / "train2017" / "1.jpg", photo(0))
    config = DataConfig(source="coco_stuff", root=str(tmp_path))
    check_error(config, [str(tmp_path), "annotations/train2017", "stuffthingmaps/train2017"])


def test_unknown_source_lists_the_known(root):
    check_error(DataConfig(source="zip", root=str(root)), ["'zip'", "folder", "scenes"])
