"""COCO's JSON, instances and panoptic, on small trees of exactly that layout."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as masks

from segdiff_jax.config import DataConfig
from segdiff_jax.data.sources.source import open_source
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
    cat, sofa, dogs = (
        compressed(box(4, 3, 6, 5)),
        polygon(2, 1, 10, 9),
        uncompressed(box(0, 11, 12, 16)),
    )
    return [
        {"image_id": 1, "category_id": 3, "segmentation": cat, "iscrowd": 0},
        {"image_id": 1, "category_id": 90, "segmentation": sofa, "iscrowd": 0},
        {"image_id": 1, "category_id": 7, "segmentation": dogs, "iscrowd": 1},
    ]


def write(root, kind, found, categories=CATEGORIES, **photo):
    size = {"height": SIZE[0], "width": SIZE[1]} | photo
    photos = [{"id": i, "file_name": f"{n}.jpg", **size} for i, n in ((2, "b"), (1, "a"))]
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


def test_mistakes_are_named(root):
    with pytest.raises(UserError, match=r"panoptic_val2017\.json: no such file"):
        opened(root, "panoptic")
    with pytest.raises(UserError, match="59 classes, but .* has 3 categories"):
        opened(root, vocabulary="pascal_context_59")
    write(root, "instances", annotations(), width=99)
    with pytest.raises(UserError, match=r"a\.jpg: 16x12 pixels, but .* says 99x12"):
        opened(root)[0]
    write(root, "instances", [{"image_id": 1, "category_id": 3, "segmentation": {"counts": "?"}}])
    with pytest.raises(UserError, match="segmentation is no mask"):
        opened(root)[0]
    write(root, "instances", [annotations()[0] | {"category_id": 4}])
    with pytest.raises(UserError, match="category_id 4 is none"):
        opened(root)[0]
    (root / "annotations" / "instances_val2017.json").write_text("[]")
    with pytest.raises(UserError, match="no COCO annotations"):
        opened(root)
