"""COCO's JSON, instances and panoptic, on small trees of exactly that layout."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as masks

from segdiff_jax.config import DataConfig
from segdiff_jax.data import survey
from segdiff_jax.data.sources.source import files_digest, open_source
from segdiff_jax.errors import UserError

SIZE = (12, 16)
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 90, "name": "sofa"}]


def box(top, left, bottom, right):
    found = np.zeros(SIZE, bool)
    found[top:bottom, left:right] = True
    return found


def polygon(top, left, bottom, right):
    return [[left, top, right, top, right, bottom, left, bottom]]


def uncompressed(mask):
    """COCO's counts: runs of 0 and 1 in turn, down the columns, the first of 0."""
    flat = mask.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    return {"size": list(SIZE), "counts": [0, *runs] if flat[0] else runs}


def compressed(mask):
    found = masks.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(SIZE), "counts": found["counts"].decode()}


@pytest.fixture
def root(tmp_path):
    """Two photos: on "a" a large sofa, a cat on it, a crowd of dogs beside; "b" has nothing."""
    for name in "ab":
        path = tmp_path / "val2017" / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", SIZE[::-1], (9, 9, 9)).save(path)
    (tmp_path / "annotations").mkdir()
    write(tmp_path, "instances", annotations())
    return tmp_path


def annotations():
    cat = {"category_id": 3, "segmentation": compressed(box(4, 3, 6, 5)), "iscrowd": 0}
    sofa = {"category_id": 90, "segmentation": polygon(2, 1, 10, 9), "iscrowd": 0}
    dogs = {"category_id": 7, "segmentation": uncompressed(box(0, 11, 12, 16)), "iscrowd": 1}
    return [{"image_id": 1} | found for found in (cat, sofa, dogs)]


def write(root, kind, found, categories=CATEGORIES, without="", names="ba", **photo):
    size = {"height": SIZE[0], "width": SIZE[1]} | photo
    photos = [{"id": 2 - i, "file_name": f"{n}.jpg", **size} for i, n in enumerate(names)]
    photos[0].pop(without, None)
    about = {"images": photos, "annotations": found, "categories": categories}
    (root / "annotations" / f"{kind}_val2017.json").write_text(json.dumps(about))


def opened(root, kind="instances", **options):
    return open_source(DataConfig(source=f"coco_{kind}", root=str(root), **options), "val", 0)


def expected(rest=255):
    labels = np.full(SIZE, rest)
    labels[box(2, 1, 10, 9)], labels[box(0, 11, 12, 16)], labels[box(4, 3, 6, 5)] = 2, 1, 0
    return labels


def test_polygons_and_run_lengths_become_labels(root):
    source = opened(root)
    assert source.vocabulary.names == ("cat", "dog", "sofa")
    assert [source[i]["name"] for i in range(len(source))] == ["a", "b"]
    labels = source[0]["labels"]
    assert labels.dtype == np.uint8 and (labels == expected()).all(), "the smaller one is seen"
    assert (source[1]["labels"] == 255).all()


def test_the_rest_is_background_where_there_is_such_a_class(root):
    write(root, "instances", annotations(), [*CATEGORIES, {"id": 0, "name": "Background"}])
    assert (opened(root)[0]["labels"] == expected(rest=3)).all()


def test_more_than_255_categories_have_labels_of_16_bits(root):
    many = [{"id": i, "name": f"c{i}"} for i in range(300)]
    one = [{"image_id": 1, "category_id": 299, "segmentation": polygon(0, 0, 5, 5)}]
    write(root, "instances", one, many)
    labels = opened(root)[0]["labels"]
    assert labels.dtype == np.uint16 and set(np.unique(labels)) == {299, 65535}


def test_panoptic_segments(root):
    ids = np.zeros(SIZE, int)
    ids[2:10, 1:9], ids[4:6, 3:5], ids[:, 11:] = 70_000, 5, 300
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1)
    folder = root / "annotations" / "panoptic_val2017"
    folder.mkdir()
    Image.fromarray(colors.astype(np.uint8)).save(folder / "a.png")
    segments = [{"id": 70_000, "category_id": 90}, {"id": 5, "category_id": 3}]
    segments.append({"id": 300, "category_id": 7})
    found = [{"image_id": 1, "file_name": "a.png", "segments_info": segments}]
    write(root, "panoptic", found)
    assert (opened(root, "panoptic")[0]["labels"] == expected()).all()


def test_what_labelling_tools_export(root):
    beside = root / "val"
    (root / "val2017").rename(beside)
    (root / "annotations" / "instances_val2017.json").rename(beside / "_annotations.coco.json")
    assert (opened(root)[0]["labels"] == expected()).all()


def test_annotations_without_an_area_are_left_out_and_counted(root, caplog):
    cat = {"image_id": 1, "category_id": 3}
    flat = [cat | {"segmentation": found} for found in ([], [[]], [[1, 1, 6, 1]])]
    write(root, "instances", [*annotations(), cat | {"bbox": [0, 0, 2, 2]}, *flat])
    assert (opened(root)[0]["labels"] == expected()).all()
    assert "4 of 7 annotations have no area" in caplog.text


def test_photos_of_the_same_name_in_two_folders_keep_their_folders(root):
    for name in "xy":
        (root / "val2017" / name).mkdir()
        shutil.copy(root / "val2017" / "a.jpg", root / "val2017" / name)
    write(root, "instances", annotations(), names=("y/a", "x/a"))
    assert [opened(root)[i]["name"] for i in range(2)] == ["x/a", "y/a"]


def test_a_photo_that_exif_turns_is_read_as_the_key_says(root, caplog):
    exif = Image.Exif()
    exif[0x0112] = 3
    stored = np.arange(SIZE[0] * SIZE[1] * 3, dtype=np.uint8).reshape(*SIZE, 3)
    Image.fromarray(stored).save(root / "val2017" / "a.png", exif=exif)
    write(root, "instances", annotations())
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace("a.jpg", "a.png"))
    assert (opened(root, exif="ignore")[0]["image"] == stored).all()
    assert (opened(root)[0]["image"] == stored[::-1, ::-1]).all()
    config = DataConfig(source="coco_instances", root=str(root))
    assert len(survey.report(opened(root), config, "val")) == 3, "shares, for logit_adjustment"
    assert "1 of 2 photos are turned by an EXIF tag" in caplog.text


def test_the_digest_of_its_files_knows_the_pngs(root):
    """A corrected PNG makes a latent cache stale."""
    test_panoptic_segments(root)
    before = files_digest(opened(root, "panoptic"))
    Image.new("RGB", SIZE).save(root / "annotations" / "panoptic_val2017" / "a.png")
    assert files_digest(opened(root, "panoptic")) != before


CAT = {"image_id": 1, "category_id": 3, "segmentation": polygon(2, 1, 10, 9)}
TWINS = [{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 99}, r"json \(a\.jpg\): 99x12 pixels, but its image has 16x12"),
        ({"found": [CAT | {"segmentation": {"counts": "?"}}]}, "segmentation is no mask"),
        ({"found": [CAT | {"category_id": 4}]}, "category_id 4 is none"),
        ({"found": [CAT | {"image_id": "1"}]}, r"json: annotations\[0\] is of image '1', which"),
        ({"found": [], "categories": TWINS}, "several categories have the 'id' 3: give each"),
        ({"without": "height"}, r"json: images\[0\] has no 'height': export"),
        ({"without": "file_name"}, r"json: images\[0\] has no 'file_name': export"),
    ],
)
def test_mistakes_in_the_file_are_named(root, changes, says):
    write(root, "instances", **{"found": [CAT]} | changes)
    with pytest.raises(UserError, match=says):
        opened(root)[0]


def test_other_mistakes_are_named(root):
    with pytest.raises(UserError, match=r"panoptic_val2017\.json: no such file"):
        opened(root, "panoptic")
    with pytest.raises(UserError, match="59 classes, but the masks of .*coco_instances have 3"):
        opened(root, vocabulary="pascal_context_59")
    lfs = "version https://git-lfs.github.com/spec/v1"
    for text, says in (("[]", "no COCO annotations"), (lfs, "git-lfs pointer"), ("", "empty file")):
        (root / "annotations" / "instances_val2017.json").write_text(text)
        with pytest.raises(UserError, match=rf"instances_val2017\.json: .*{says}"):
            opened(root)
