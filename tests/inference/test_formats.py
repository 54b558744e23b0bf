"""Formats of whole sets, read back by the libraries whose formats they are."""

import io
import json
import zipfile

import numpy as np
import pytest
import supervision
from PIL import Image
from pycocotools.coco import COCO
from scipy import ndimage

from segdiff_jax.config import CodecConfig
from segdiff_jax.errors import UserError
from segdiff_jax.inference import formats, writers
from segdiff_jax.inference.result import from_maps
from segdiff_jax.text import vocabulary
from segdiff_jax.text.vocabulary import ClassEntry, Vocabulary

# Two of one colour and one that is black: no two of CVAT's may be either.
CLASSES = Vocabulary(
    "test",
    (
        ClassEntry("sky, with 'quotes' & ü", (), (10, 20, 30)),
        ClassEntry("road", (), (10, 20, 30)),
        ClassEntry("car", (), (0, 0, 0)),
        ClassEntry("never seen"),
    ),
)


def _result(seed, size=(60, 84), classes=CLASSES):
    """Blobs: classes with holes and several parts, some pixels *other*, of the last class none."""
    rng = np.random.default_rng(seed)
    gray = np.stack([ndimage.gaussian_filter(rng.normal(0, 6, size), 3.0) for _ in classes.names])
    gray[-1] = -1.0
    gray[1, :20, :20], gray[0, 6:14, 6:14] = 1.5, 3.0  # a square with a hole, which is a class
    gray[1, 6:14, 6:14] = -1.0
    photo = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    codec = CodecConfig(threshold=0.5)
    return from_maps(gray.astype(np.float32), None, photo, classes, codec, "stretch")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, results by name): two photos of different sizes in every format."""
    folder, kinds = tmp_path_factory.mktemp("o"), list(formats.FORMATS)
    found = {"a": _result(0), "b c.png": _result(1, (40, 30))}
    for name, result in found.items():
        writers.write(str(folder), name, f"/photos/{name}.jpg", result, {}, kinds)
    writers.write_summaries(str(folder), list(found), CLASSES, kinds)
    return folder, found


def test_coco_is_read_by_its_own_api(written):
    folder, found = written
    coco = COCO(folder / "coco.json")
    assert [c["name"] for c in coco.loadCats(range(4))] == list(CLASSES.names)
    kinds = set()
    for image, (name, result) in zip(coco.loadImgs([1, 2]), found.items(), strict=True):
        assert image["file_name"] == f"{name}.jpg"
        labels = np.full(result.labels.shape, 255)
        for annotation in coco.loadAnns(coco.getAnnIds(image["id"])):
            mask = coco.annToMask(annotation).astype(bool)
            labels[mask] = annotation["category_id"]
            left, top, width, height = annotation["bbox"]
            assert annotation["area"] == mask.sum()
            assert mask[top : top + height, left : left + width].sum() == mask.sum()
            assert mask[top].any() and mask[:, left].any(), "and no larger"
            kinds.add(type(annotation["segmentation"]))
        np.testing.assert_array_equal(labels, result.labels)
    assert dict in kinds


def test_photos_of_one_name_go_by_their_paths_in_coco(tmp_path):
    paths = ["/p/x/a.jpg", "/p/y/a.jpg", "/p/b.jpg"]
    names = writers.names(paths)
    for path, name in names.items():
        writers.write(str(tmp_path), name, path, _result(0), {}, ["coco"])
    writers.write_summaries(str(tmp_path), list(names.values()), CLASSES, ["coco"])
    images = json.loads((tmp_path / "coco.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["/p/x/a.jpg", "/p/y/a.jpg", "b.jpg"]


def test_a_name_of_several_lines_is_one_line_in_lists():
    assert writers.names(["x\ny/a.jpg", "z/a.jpg", "b\r\n\u2028c.png"]) == {
        "x\ny/a.jpg": "x_y_a",
        "z/a.jpg": "z_a",
        "b\r\n\u2028c.png": "b___c",
    }


def test_a_mask_of_one_ring_is_a_polygon_and_still_exact():
    """As `supervision` has it: run lengths where there are holes or parts."""
    labels = np.full((12, 16), -1.0, np.float32)
    labels[3:9, 4:11] = labels[9, 4:6] = 1.0
    photo = np.zeros((12, 16, 3), np.uint8)
    classes = Vocabulary("one", (ClassEntry("step"),))
    found = from_maps(labels[None], None, photo, classes, CodecConfig(threshold=0.5), "stretch")
    coco = COCO()
    coco.dataset = json.loads(formats.coco_json(found))
    coco.createIndex()
    (annotation,) = coco.loadAnns(coco.getAnnIds())
    assert annotation["segmentation"] == [[4, 3, 11, 3, 11, 9, 6, 9, 6, 10, 4, 10]]
    np.testing.assert_array_equal(coco.annToMask(annotation), found.labels == 0)


def test_coco_is_read_by_supervision(written):
    folder, found = written
    read = supervision.DetectionDataset.from_coco(
        str(folder / "yolo" / "images"), str(folder / "coco.json"), force_masks=True
    )
    assert read.classes == list(CLASSES.names)
    for path, detections in read.annotations.items():
        result = found[path.rsplit("/", 1)[1].removesuffix(".jpg")]
        for mask, label in zip(detections.mask, detections.class_id, strict=True):
            np.testing.assert_array_equal(mask, result.labels == label)


def test_yolo_is_read_by_supervision(written):
    folder, found = written
    read = supervision.DetectionDataset.from_yolo(
        str(folder / "yolo" / "images"),
        str(folder / "yolo" / "labels"),
        str(folder / "yolo" / "data.yaml"),
        force_masks=True,
    )
    assert read.classes == list(CLASSES.names) and len(read) == 2
    for path, photo, detections in read:
        result = found[path.rsplit("/", 1)[1].removesuffix(".jpg")]
        assert photo.shape == result.photo.shape
        for label in range(3):
            mask = detections.mask[detections.class_id == label].any(0)
            expected = result.labels == label
            # A pixel for the polygon, one for the whole numbers that it is filled between.
            square = np.ones((5, 5))
            grown = ndimage.binary_dilation(expected, square)
            inner = ndimage.binary_erosion(expected, square)
            assert not (mask & ~grown).any() and not (inner & ~mask).any()
    hole = read.annotations[next(p for p in read.annotations if p.endswith("a.jpg"))]
    road = hole.mask[hole.class_id == 1].any(0)
    assert road[3, 3] and not road[9:11, 9:11].any(), "a hole stays one"


def test_cvat_zip_is_read_as_its_documentation_says(written):
    """Colours of labelmap.txt in SegmentationClass/, for the names in default.txt."""
    folder, found = written
    packed = zipfile.ZipFile(folder / "cvat.zip")
    assert packed.testzip() is None
    assert packed.read("ImageSets/Segmentation/default.txt").decode().split("\n")[:-1] == list(
        found
    )
    lines = packed.read("labelmap.txt").decode().splitlines()
    colors = {}
    for line in lines:
        if not line.startswith("#"):
            label, color, parts, actions = line.split(":")
            colors[tuple(map(int, color.split(",")))] = label
            assert parts == actions == ""
    assert set(colors.values()) == {"background", *CLASSES.names} and len(colors) == 5
    for name, result in found.items():
        picture = np.asarray(Image.open(io.BytesIO(packed.read(f"SegmentationClass/{name}.png"))))
        assert picture.shape == (*result.labels.shape, 3)
        wanted = [*CLASSES.names, "background"]
        labels = np.where(result.labels == 255, 4, result.labels)
        read = np.array([[wanted.index(colors[tuple(c)]) for c in row] for row in picture.tolist()])
        np.testing.assert_array_equal(read, labels)
        assert (folder / "cvat" / "SegmentationClass" / f"{name}.png").exists()


def test_a_class_named_background_is_black_in_cvat():
    classes = vocabulary.from_names(["Background", "ring"])
    lines = formats.summary("cvat", lambda name: b"", [], classes)["cvat/labelmap.txt"]
    assert lines.decode().splitlines()[1] == "Background:0,0,0::" and lines.count(b"\n") == 3


@pytest.mark.parametrize("name", ["a: b", "#1 sign"])
def test_names_that_a_label_map_cannot_hold(name):
    formats.check(["yolo", "coco"], vocabulary.from_names([name]))
    with pytest.raises(UserError, match="--format cvat: the class name .* rename the class"):
        formats.check(["labels", "cvat"], vocabulary.from_names(["road", name]))


def test_all_colours_of_a_large_vocabulary_differ():
    classes = vocabulary.from_names([f"class {i}" for i in range(900)])
    colors = formats.cvat_colors(classes)
    assert len(np.unique(colors, axis=0)) == 900 and colors.any(1).all()


def test_score_maps_and_cut_outs(written):
    folder, found = written
    for name, result in found.items():
        for number in range(4):
            score = Image.open(folder / f"{name}_score_{number}.png")
            assert score.mode == "I;16"
            expected = result.scores[..., number]
            np.testing.assert_allclose(np.asarray(score) / 65535, expected, atol=1e-5)
            cutout = folder / f"{name}_cutout_{number}.png"
            mask = result.labels == number
            assert cutout.exists() == mask.any()
            if mask.any():
                pixels = np.asarray(Image.open(cutout))
                np.testing.assert_array_equal(pixels[..., 3], 255 * mask)
                np.testing.assert_array_equal(pixels[mask][:, :3], result.photo[mask])
                assert not pixels[~mask].any(), "nothing of the rest is hidden in it"
    said = json.loads((folder / "a.json").read_text())["files"]
    assert said["cutouts"] == [f"a_cutout_{number}.png" for number in range(3)]
    assert said["yolo"] == ["yolo/labels/a.txt", "yolo/images/a.jpg"]
