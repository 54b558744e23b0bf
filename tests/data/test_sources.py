import errno
import os

import numpy as np
import pytest
from PIL import Image

from segdiff_jax.config import DataConfig
from segdiff_jax.data.sources import folder as folder_source
from segdiff_jax.data.sources import layouts
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.errors import UserError
from segdiff_jax.text import vocabulary


def write(path, array):
    """A photo or mask; TIFFs are of 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = np.uint16 if path.suffix == ".tif" else np.uint8
    Image.fromarray(np.asarray(array, kind)).save(path)
    return path


def write_all(root, files):
    """Write {path: array}."""
    for path, array in files.items():
        write(root / path, array)


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


def names_of(source):
    return [source[i]["name"] for i in range(len(source))]


def test_what_a_link_leads_to_has_the_name_of_its_own_place(root):
    for name in ("images", "masks"):
        place = root / "train" / name
        (place / "street").mkdir()
        (place / "p0.png").rename(place / "street" / "p0.png")
    (root / "train" / "images" / "again").symlink_to("street")
    (root / "train" / "images" / "loop").symlink_to(".")
    assert names_of(open_source(folder(root), "train", 0)) == ["p1", "p2", "p0"]


def test_a_folder_that_cannot_be_listed_is_not_passed_over(root, monkeypatch):
    locked, scandir = root / "train" / "images" / "locked", os.scandir
    locked.mkdir()

    def refusing(path):
        if str(path) == str(locked):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(
        UserError, match=rf"^{locked}: cannot be listed \(Permission denied\): check"
    ):
        open_source(folder(root), "train", 0)


def test_folder_pairs_images_and_masks_by_stem(root):
    write_all(root / "train/images", {"q.jpg": photo(200), "r.JPEG": photo(9), "s.webp": photo(9)})
    write_all(root / "train/masks", {f"{stem}.png": np.full((6, 8), 255) for stem in "qrs"})
    (root / "train" / "images" / "notes.txt").write_text("not an image")
    (root / "train" / "images" / "._p0.png").write_bytes(b"left by another system")
    source = open_source(folder(root), "train", 0)
    assert names_of(source) == ["p0", "p1", "p2", "q", "r", "s"]
    assert source.vocabulary.names == ("sky", "building", "road") and source.novel == ()
    record = source[1]
    assert (record["image"] == 10).all() and record["image"].shape == (6, 8, 3)
    assert (record["labels"] == 1).all() and record["labels"].dtype == np.uint8
    assert (source[4]["labels"] == 255).all()
    with pytest.raises(IndexError):
        source[6]
    assert len(open_source(folder(root), "val", 0)) == 2


def test_folder_without_splits(tmp_path):
    write_all(tmp_path, {"images/a.png": photo(5), "masks/a.png": np.zeros((6, 8))})
    config = folder(tmp_path, vocabulary="camvid_11")
    assert [names_of(open_source(config, split, 0)) for split in ("train", "val")] == [["a"]] * 2


def check_error(config, words, split="train", index=None):
    with pytest.raises(UserError) as caught:
        source = open_source(config, split, 0)
        assert index is not None, "opening should have failed"
        source[index]
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_what_is_missing_or_twice_is_named(root):
    check_error(folder(root / "nowhere"), ["nowhere", "no such folder"])
    check_error(folder(root), ["test/images", "no such folder"], split="test")
    check_error(folder(root, vocabulary="nope"), ["nope: no such file", "ade20k_150"])
    names = (root / "classes.txt").rename(root / "names.txt")
    check_error(folder(root), ["classes.txt", "config.data.vocabulary"])
    names.rename(root / "classes.txt")
    again = write(root / "train" / "images" / "p0.jpg", photo(0))
    check_error(folder(root), ["p0", "same stem"])
    again.unlink()
    write(root / "train" / "images" / "lonely.png", photo(0))
    check_error(folder(root), ["lonely.png", "no mask", "train/masks/lonely.png"])
    for path in (root / "val" / "images").iterdir():
        path.unlink()
    check_error(folder(root), ["no images"], split="val")
    (root / "train" / "masks").rename(root / "train" / "labels")
    check_error(folder(root), ["train/masks", "no such folder"])


def test_masks_that_do_not_fit_are_named(root):
    path = write(root / "train" / "masks" / "p1.png", np.zeros((8, 6)))
    check_error(folder(root), ["p1.png", "6x8", "8x6"], index=1)
    for bad in (3, 254):
        mask = np.zeros((6, 8))
        mask[5, 7] = bad
        write(path, mask)
        check_error(folder(root), [str(path), f"id {bad} ", "3 classes", "classes.txt"], index=1)
    path.unlink()
    write(path.with_suffix(".tif"), np.full((6, 8), 300))
    check_error(folder(root), ["p1.tif", "id 300 "], index=1)
    no_data = np.full((6, 8), 2**31 - 1, np.int32)  # as GIS writes it
    Image.fromarray(no_data).save(path.with_suffix(".tif"))
    check_error(folder(root), ["p1.tif", "id 2147483647 "], index=1)


def test_many_classes(root, monkeypatch):
    def classes(count):
        (root / "classes.txt").write_text("\n".join(f"c{i}" for i in range(count)))

    classes(255)
    write(root / "train" / "masks" / "p1.png", np.full((6, 8), 254))
    assert (open_source(folder(root), "train", 0)[1]["labels"] == 254).all()
    classes(300)
    check_error(folder(root), ["id 255", "'c255'", "--config.data.ignore_ids=65535"])
    ids = np.array([[0, 254, 255, 256, 299, 65535]])
    write(root / "train" / "masks" / "p0.tif", ids)
    (root / "train" / "masks" / "p0.png").unlink()
    write(root / "train" / "images" / "p0.png", photo(1, (1, 6)))
    record = open_source(folder(root, ignore_ids=(65535,)), "train", 0)[0]
    assert record["labels"].dtype == np.uint16 and record["labels"].tolist() == ids.tolist()
    monkeypatch.setattr(folder_source, "IGNORE_16", 299)  # 65,536 names would take seconds
    check_error(folder(root), ["300 classes", "at most 299"])


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
        assert source.vocabulary.name == "ade20k_150" and names_of(source) == [name]
        assert source[0]["labels"].tolist() == [[255, 0, 1], [148, 149, 255]]
    write(base / "annotations" / "training" / "ADE_train_00000001.png", ids + 1)
    check_error(config, ["id 151 ", "ade20k_150"], index=0)


# Raw ids of COCO-Stuff's PNGs beside the names in its labels.txt (whose numbers are one higher).
COCO_RAW = {0: "person", 10: "fire hydrant", 12: "stop sign", 24: "giraffe", 26: "backpack"}
COCO_RAW |= {89: "toothbrush", 91: "banner", 105: "clouds", 168: "tree", 181: "wood"}


def test_coco_stuff_mapping_matches_the_published_names():
    lookup, vocab = layouts.coco_stuff_lookup(), vocabulary.load("coco_stuff_171")
    assert (lookup[:182] >= 0).sum() == len(vocab) == 182 - 11
    mapped = lookup[:182][lookup[:182] >= 0]
    assert mapped.tolist() == list(range(171))
    assert {raw: vocab.names[lookup[raw]] for raw in COCO_RAW} == COCO_RAW
    assert lookup[255] == layouts.IGNORED and (lookup[182:255] == layouts.OUTSIDE).all()


@pytest.mark.parametrize("layout", ["mmseg", "raw", "downloaded"])
def test_coco_stuff_trees(tmp_path, layout):
    images, masks = {
        "mmseg": ("images/{}", "annotations/{}"),
        "raw": ("images/{}", "stuffthingmaps/{}"),
        "downloaded": ("{}", "stuffthingmaps_trainval2017/{}"),
    }[layout]
    raw = np.array([[0, 12, 91], [181, 255, 26]])
    expected = layouts.to_labels(raw, layouts.coco_stuff_lookup(), 171)
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


def test_sub_folders_are_searched_and_masks_mirror_them(tmp_path):
    for name in ("a/x.PNG", "b c/x.JPG", "b c/deep/y.png", "z.png"):
        write(tmp_path / "train" / "images" / name, photo(1))
        write((tmp_path / "train" / "masks" / name).with_suffix(".Png"), np.ones((6, 8)))
    for clutter in ("images/.ipynb_checkpoints/z.png", "images/__MACOSX/z.png", "masks/._z.png"):
        write(tmp_path / "train" / clutter, photo(0))
    for name in (".DS_Store", "Thumbs.db", "b c/Thumbs.db"):
        (tmp_path / "train" / "images" / name).write_bytes(b"x")
    (tmp_path / "train" / "images" / "a" / "loop").symlink_to(tmp_path / "train" / "images")
    source = open_source(folder(tmp_path, vocabulary="camvid_11"), "train", 0)
    below = [os.path.relpath(image, tmp_path / "train/images") for image, _ in source.pairs]
    assert below == ["a/x.PNG", "b c/deep/y.png", "b c/x.JPG", "z.png"]
    assert all((source[i]["labels"] == 1).all() for i in range(4))


def test_upper_and_lower_case_of_names_may_differ_where_that_is_clear(root):
    write(root / "train" / "images" / "IMG_1.JPG", photo(7))
    write(root / "train" / "masks" / "img_1.png", np.full((6, 8), 2))
    source = open_source(folder(root), "train", 0)
    assert source[0]["name"] == "IMG_1" and (source[0]["labels"] == 2).all()
    write(root / "train" / "images" / "cafe\u0301.png", photo(7))  # as macOS writes "café"
    write(root / "train" / "masks" / "caf\u00e9.png", np.full((6, 8), 2))
    assert len(open_source(folder(root), "train", 0)) == 5
    write(root / "train" / "images" / "img_1.png", photo(8))
    check_error(folder(root), ["IMG_1.JPG", "img_1.png", "upper and lower case", "rename"])


@pytest.mark.parametrize("layout", ["two folders", "beside", "in images", "flat"])
def test_mask_suffix(tmp_path, layout):
    images, masks = {
        "two folders": ("train/images", "train/masks"),
        "beside": ("train", "train"),
        "in images": ("train/images", "train/images"),
        "flat": (".", "."),
    }[layout]
    for name in ("a", "sub/b"):
        write(tmp_path / images / f"{name}.jpg", photo(3))
        write(tmp_path / masks / f"{name}_mask.png", np.ones((6, 8)))
    (tmp_path / "classes.txt").write_text("sky\nroad\n")
    source = open_source(folder(tmp_path, mask_suffix="_mask"), "train", 0)
    assert names_of(source) == ["a", "b"]
    assert (source[0]["labels"] == 1).all()
    if layout != "flat":
        check_error(folder(tmp_path), ["config.data.mask_suffix=_mask"])


def test_images_by_split_are_not_mixed(tmp_path):
    for split, value in (("train", 0), ("val", 1)):
        write(tmp_path / "images" / split / f"{split}.png", photo(1))
        write(tmp_path / "masks" / split / f"{split}.png", np.full((6, 8), value))
    config = folder(tmp_path, vocabulary="camvid_11")
    for split in ("train", "val"):
        assert names_of(open_source(config, split, 0)) == [split]
    check_error(config, ["test"], split="test")


def test_masks_without_image_are_counted(root, caplog):
    for stem in ("x", "y"):
        write(root / "train" / "masks" / f"{stem}.png", np.zeros((6, 8)))
    assert len(open_source(folder(root), "train", 0)) == 3
    assert "2 masks have no image and are left out" in caplog.text and "x.png" in caplog.text


def test_what_lies_nearby_is_said(root, tmp_path):
    for i in range(3):
        (root / "train" / "masks" / f"p{i}.png").rename(root / "train" / "masks" / f"p{i}-gt.png")
    check_error(folder(root), ["3 of 3 images", "*-gt", "config.data.mask_suffix=-gt"])
    (root / "train" / "masks").rename(root / "train" / "labels")
    check_error(folder(root), ["train/masks: no such folder", "train/labels", "rename it to masks"])
    (root / "val" / "images").rename(root / "val" / "pictures")
    check_error(folder(root), ["val/images", "2 images in", "val/pictures"], split="val")
    write(root / "other" / "masks" / "p0.png", photo(0))
    (root / "other" / "images").mkdir()
    (root / "other" / "images" / "p0.heic").write_bytes(b"x")
    check_error(folder(root), ["no images", "1 *.heic", "PNG or JPEG"], split="other")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["leftImg8bit/train/aachen/a.png", "gtFine/train/aachen/b.png"], "source=cityscapes"),
        (["VOC2012/JPEGImages/a.jpg", "VOC2012/SegmentationClass/a.png"], "source=pascal_voc"),
        (["images/training/a.jpg", "annotations/training/a.png"], "source=ade20k"),
        (["ADE20K_2021_17_01/images/ADE/training/x/a.jpg"], "full ADE20K"),
        (["train2017/a.jpg", "annotations/train2017/a.png"], "source=coco_stuff"),
        (["train2017/a.jpg", "annotations/instances_train2017.json"], "source=coco_instances"),
    ],
)
def test_known_data_sets_are_recognised(tmp_path, names, words):
    for name in names:
        path = write((tmp_path / name).with_suffix(".png"), photo(0))
        path.rename(tmp_path / name)
    check_error(folder(tmp_path), ["no such folder", words])


def test_links_to_nothing_are_called_that(root):
    (root / "train" / "images" / "p1.png").unlink()
    (root / "train" / "images" / "p1.png").symlink_to(root / "gone.png")
    check_error(folder(root), ["p1.png: a link to", "gone.png, which does not exist"], index=1)
    (root / "train" / "masks").rename(root / "elsewhere")
    (root / "train" / "masks").symlink_to(root / "moved")
    check_error(folder(root), ["train/masks: a link to", "moved, which does not exist"])


def labels_of(root, mask, **options):
    write(root / "train" / "masks" / "p0.png", mask)
    return open_source(folder(root, **options), "train", 0)[0]["labels"].ravel().tolist()


def test_first_id_says_where_the_classes_begin(root):
    mask = np.array([[0, 1, 2, 3, 255, 1, 1, 1]] * 6)
    assert labels_of(root, mask, first_id=1)[:5] == [255, 0, 1, 2, 255]
    check_error(folder(root), ["p0.png", "id 3 ", "config.data.first_id=1"], index=0)


def test_ignore_ids(root):
    mask = np.array([[0, 1, 2, 7, 255, 1, 1, 1]] * 6)
    assert labels_of(root, mask, ignore_ids=(255, 7))[:5] == [0, 1, 2, 255, 255]
    check_error(folder(root, ignore_ids=()), ["id 7 ", "no id is"], index=0)
    check_error(folder(root, ignore_ids=(2, 255)), ["id 2", "'road'", "ignore_ids=255"])
    write(root / "train" / "masks" / "p0.tif", np.full((6, 8), 65535))
    (root / "train" / "masks" / "p0.png").unlink()
    source = open_source(folder(root, ignore_ids=(65535,)), "train", 0)
    assert (source[0]["labels"] == 255).all() and source[0]["ids"] == {65535: 48}


def test_masks_of_0_and_255_are_two_classes_by_mask_values(root):
    (root / "classes.txt").write_text("background\ncrack\n")
    mask = np.array([[0, 255] * 4] * 6)
    both = {"mask_values": (0, 255)}
    assert labels_of(root, mask, **both, ignore_ids=())[:2] == [0, 1]
    check_error(folder(root, **both), ["id 255", "'crack'", "--config.data.ignore_ids=()"])
    check_error(folder(root, ignore_ids=()), ["--config.data.mask_values=0,255"], index=0)
    check_error(folder(root, mask_values=(0, 1, 2)), ["3 values for the 2 classes"])
    check_error(folder(root, mask_values=(3, 3)), ["a value of its own"])


def stored_and_seen(orientation):
    """A photo's stored pixels, 6 × 8, and the EXIF that turns them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return np.arange(144, dtype=np.uint8).reshape(6, 8, 3), exif


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_may_be_ignored_where_masks_fit_the_stored_pixels(root, orientation):
    stored, exif = stored_and_seen(orientation)
    Image.fromarray(stored).save(root / "train" / "images" / "p0.png", exif=exif)
    labels = np.arange(48).reshape(6, 8) % 3
    assert labels_of(root, labels, exif="ignore") == labels.ravel().tolist()
    assert (open_source(folder(root, exif="ignore"), "train", 0)[0]["image"] == stored).all()
    if orientation == 6:
        check_error(folder(root), ["stored pixels", "set config.data.exif=ignore"], index=0)
        write(root / "train" / "masks" / "p0.png", np.rot90(labels, -1))
        turned = open_source(folder(root), "train", 0)[0]
        assert (turned["image"] == np.rot90(stored, -1)).all()
        check_error(folder(root, exif="ignore"), ["turned pixels", "exif=apply"], index=0)


def test_twelve_bit_photos_and_large_ones_by_key(root):
    Image.fromarray(np.full((6, 8), 800, np.uint16)).save(root / "train" / "images" / "p0.png")
    source = open_source(folder(root, max_value=4095), "train", 0)
    assert (source[0]["image"] == 50).all()
    check_error(folder(root, max_pixels=47), ["p0.png: more than 47 pixels", "max_pixels"], index=0)


@pytest.mark.parametrize("inside", ["VOCdevkit/VOC2012", ""])
def test_pascal_voc_tree(tmp_path, inside):
    base = tmp_path / inside
    ids = np.array([[0, 1], [20, 255]])
    for name in ("2007_000032", "2007 033"):
        write(base / "JPEGImages" / f"{name}.jpg", photo(3, (2, 2)))
    image = Image.fromarray(ids.astype(np.uint8), "P")
    image.putpalette(list(range(256)) * 3)
    (base / "SegmentationClass").mkdir()
    image.save(base / "SegmentationClass" / "2007_000032.png")
    write(base / "SegmentationClassAug" / "2007 033.png", ids[::-1])
    write(base / "JPEGImages" / "in_no_list.jpg", photo(3))
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_bytes(b"2007_000032\r\n2007 033 \r\n\r\n")
    (lists / "val.txt").write_text("2007_000032\n")
    config = DataConfig(source="pascal_voc", root=str(tmp_path))
    source = open_source(config, "train", 0)
    assert len(source.vocabulary) == 21
    assert source.vocabulary.names[:2] == ("background", "aeroplane")
    assert names_of(source) == ["2007_000032", "2007 033"]
    assert source[0]["labels"].tolist() == ids.tolist()
    assert source[1]["labels"].tolist() == ids[::-1].tolist()
    assert len(open_source(config, "val", 0)) == 1
    twenty = DataConfig(source="pascal_voc", root=str(tmp_path), vocabulary="pascal_voc_20")
    source = open_source(twenty, "train", 0)
    assert source[0]["labels"].tolist() == [[255, 0], [19, 255]]
    assert source.vocabulary.names[0] == "aeroplane" and source.vocabulary.names[19] == "tvmonitor"
    twenty.vocabulary = "camvid_11"
    check_error(twenty, ["11 classes", "20, or 21 with background"])
    check_error(config, ["trainaug.txt: no such file", "train, val"], split="trainaug")
    (lists / "val.txt").write_text("2007_000032\nmissing\n")
    check_error(config, ["JPEGImages", "'missing'", "list of 'val'"], split="val")


# labelIds of Cityscapes beside the names in its labels.py.
CITYSCAPES = {7: "road", 8: "sidewalk", 17: "pole", 23: "sky", 26: "car", 31: "train"}
CITYSCAPES |= {33: "bicycle"}


@pytest.mark.parametrize("inside", ["", "leftImg8bit"])
def test_cityscapes_tree(tmp_path, inside):
    ids = np.array([[*CITYSCAPES, 0, 3, 6, 29, 30]])
    stems = {"train": "aachen/aachen_000000_000019", "val": "ulm/ulm_000001_000019"}
    for split, stem in stems.items():
        write(tmp_path / f"leftImg8bit/{split}/{stem}_leftImg8bit.png", photo(1, ids.shape))
        for kind in ("labelIds", "instanceIds"):
            write(tmp_path / f"gtFine/{split}/{stem}_gtFine_{kind}.png", ids)
        write(tmp_path / f"gtFine/{split}/{stem}_gtFine_color.png", photo(9))
    config = DataConfig(source="cityscapes", root=str(tmp_path / inside))
    source = open_source(config, "train", 0)
    assert source.vocabulary.name == "cityscapes_19" and len(source) == 1
    labels = source[0]["labels"][0].tolist()
    assert labels[len(CITYSCAPES) :] == [255] * 5
    assert [source.vocabulary.names[i] for i in labels[: len(CITYSCAPES)]] == [*CITYSCAPES.values()]
    trained = np.array([[0, 18, 255, *[5] * 9]])
    write(tmp_path / f"gtFine/train/{stems['train']}_gtFine_labelTrainIds.png", trained)
    assert open_source(config, "train", 0)[0]["labels"].tolist() == trained.tolist()
    assert open_source(config, "val", 0)[0]["labels"][0].tolist() == labels
    config.vocabulary = "camvid_11"
    check_error(config, ["11 classes", "have 19", "config.data.vocabulary"])
    config.vocabulary = ""
    check_error(config, ["leftImg8bit/test: no such folder", "found train, val"], split="test")


@pytest.mark.parametrize("inside", ["", "ADE20K_2021_17_01"])
def test_ade20k_847_tree(tmp_path, inside):
    base = tmp_path / inside
    ids = [[0, 255, 256, 846, 65535]]
    name = "annotations_detectron2/validation/ADE_val_00000001.tif"
    other = "images/ADE/validation/street/ADE_val_00000001.tif"
    write_all(base, {name: ids, other: ids})
    write(base / "images_detectron2/validation/ADE_val_00000001.jpg", photo(3, (1, 5)))
    config = DataConfig(source="ade20k_847", root=str(tmp_path))
    source = open_source(config, "val", 0)
    assert source.vocabulary.name == "ade20k_847" and len(source) == 1
    assert source[0]["labels"].tolist() == ids and source[0]["labels"].dtype == np.uint16
    assert source.vocabulary.names[0] == "wall"
    check_error(config, ["images_detectron2/training", "prepare", "docs/data.md"], split="train")
    write(base / name, [[0, 1, 2, 3, 847]])
    check_error(config, ["00000001.tif: id 847 ", "847 classes", "65535"], split="val", index=0)


@pytest.mark.parametrize("inside", ["", "VOCdevkit/VOC2010"])
def test_pascal_context_trees(tmp_path, inside):
    base = tmp_path / inside
    prepared = base / "annotations_detectron2"
    for name in ("2008_000002", "2008_000003", "2008_000004"):  # those of the training, too
        write(base / "JPEGImages" / f"{name}.jpg", photo(3, (1, 5)))
    if inside:
        write(base.parent / "VOC2012" / "JPEGImages" / "2012_000001.jpg", photo(3))
    write(prepared / "pc59_val" / "2008_000003.png", [[0, 1, 58, 255, 255]])
    write(prepared / "pc459_val" / "2008_000002.tif", [[0, 255, 458, 459, 65535]])
    config = DataConfig(source="pascal_context_59", root=str(tmp_path))
    source = open_source(config, "val", 0)
    assert names_of(source) == ["2008_000003"]
    assert source[0]["labels"].tolist() == [[0, 1, 58, 255, 255]]
    assert source[0]["labels"].dtype == np.uint8 and source.vocabulary.names[0] == "aeroplane"
    config.source = "pascal_context_459"
    source = open_source(config, "val", 0)
    assert source[0]["labels"].tolist() == [[0, 255, 458, 65535, 65535]]
    assert len(source) == 1 and len(source.vocabulary) == 459
    check_error(config, ["pc459_train: no such folder", "prepare"], split="train")
    (base / "JPEGImages" / "2008_000002.jpg").unlink()
    check_error(config, ["2008_000002.tif: no image", "1 of 1 masks"], split="val")


@pytest.mark.parametrize("prepared", [True, False])
def test_pascal_voc_20b_tree(tmp_path, prepared):
    base = tmp_path / "VOCdevkit" / "VOC2012"
    ids = np.array([[0, 1, 20, 255]])  # as VOC's own masks have them
    for name in ("2007_000033", "2007_000042"):
        write(base / "JPEGImages" / f"{name}.jpg", photo(3, (1, 4)))
    if prepared:
        folder_of_masks = base / "annotations_detectron2_bg" / "val"
        write(folder_of_masks / "2007_000033.png", [[20, 0, 19, 255]])
    else:
        write(base / "SegmentationClass" / "2007_000033.png", ids)
        lists = base / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (lists / "val.txt").write_text("2007_000033\n")
    source = open_source(DataConfig(source="pascal_voc_20b", root=str(tmp_path)), "val", 0)
    assert len(source) == 1 and source[0]["labels"].tolist() == [[20, 0, 19, 255]]
    names, asked = source.vocabulary.names, source.asked.names
    assert len(names) == 21 and names[20] == "background"
    assert len(asked) == 59 and asked[:20] == names[:20] and "background" not in asked
    assert set(asked) == set(vocabulary.load("pascal_context_59").names)
