"""`segdiff data check`: what it says of data sets that are whole, broken, and shifted by one."""

import numpy as np
import pytest
from PIL import Image

from segdiff_jax import __main__ as command

CONFIG = """
from segdiff_jax.config import Config, DataConfig

def get_config():
    return Config(data=DataConfig(source={source!r}, root={root!r}, vocabulary={vocabulary!r}))
"""


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)


@pytest.fixture
def folder(tmp_path):
    """12 pairs of 3 classes, of which "road" is never shown."""
    rng = np.random.default_rng(0)
    for i in range(12):
        save(tmp_path / "images" / f"p{i:02}.png", rng.integers(0, 256, (8, 8, 3), np.uint8))
        save(
            tmp_path / "masks" / f"p{i:02}.png",
            np.repeat([[0, 1, 1, 255]], 4, 0).repeat(2, 0).repeat(2, 1).astype(np.uint8),
        )
    (tmp_path / "classes.txt").write_text("sky\nbuilding\nroad\n")
    return tmp_path


def checked(tmp_path, capsys, root, *more, source="folder", vocabulary=""):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(source=source, root=str(root), vocabulary=vocabulary))
    with pytest.raises(SystemExit) as caught:
        command.main(["data", "check", "--config", str(path), *more])
    output = capsys.readouterr()
    return caught.value.code, output.out, output.err


def test_counts_ids_and_classes(folder, tmp_path, capsys):
    code, out, _ = checked(
        tmp_path, capsys, folder, "--split", "val", "--output", str(tmp_path / "o")
    )
    assert code == 0
    assert "val: 12 of 12 pairs read, 0 with faults" in out
    assert "ids 0–1, 255\n" in out and "25.0% of the pixels have no class" in out
    assert "absent: road" in out and out.splitlines().count("  class        images   pixels") == 1
    lines = {
        line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("    ")
    }
    assert lines == {"sky": ["12", "25.00%"], "building": ["12", "50.00%"], "road": ["0", "0.00%"]}
    page = (tmp_path / "o" / "check_val.html").read_text()
    assert page.count("<figcaption>labels") == 10


def test_broken_files_are_counted_and_named(folder, tmp_path, capsys):
    (folder / "images" / "p03.png").write_bytes(b"\x89PNG nothing more")
    save(folder / "masks" / "p05.png", np.zeros((4, 4), np.uint8))
    save(folder / "masks" / "p07.png", np.full((8, 8), 9, np.uint8))
    code, out, _ = checked(tmp_path, capsys, folder, "--split", "val")
    assert code == 1 and "12 of 12 pairs read, 3 with faults" in out
    for words in ("p03.png", "p05.png: 4x4 pixels", "p07.png: id 9 is none of the 3 classes"):
        assert words in out
    assert "one too" not in out


def test_ids_that_begin_with_one_are_recognised(folder, tmp_path, capsys):
    for path in (folder / "masks").iterdir():
        save(path, np.arange(64, dtype=np.uint8).reshape(8, 8) % 3 + 1)
    code, out, _ = checked(tmp_path, capsys, folder, "--split", "val")
    assert code == 1
    assert "every id may be one too high: 3 is no class; one lower, it would be" in out


@pytest.mark.parametrize(
    ("ids", "names", "words", "wrong"),
    [
        ([255], "sky", "every labelled pixel of split 'val' is ignored (ids 255)", True),
        ([0, 255], "sky", "the masks hold only 0 and 255", True),
        ([0, 0, 0, 1, 2], "sky", "the commonest id is 0, which is 'sky'", False),  # it may well be
        ([0, 0, 0, 1, 2], "sky", "config.data.first_id=1", False),
        *(([0, 0, 0, 1, 2], name, "", False) for name in ("Void", "no road", "other_things")),
        ([1, 2, 2, 255], "sky", "", False),
    ],
)
def test_what_training_stops_at_or_warns_of_is_said(
    folder, tmp_path, capsys, ids, names, words, wrong
):
    (folder / "classes.txt").write_text(f"{names}\nbuilding\nroad\n")
    for path in (folder / "masks").iterdir():
        save(path, np.resize(np.array(ids, np.uint8), (8, 8)))
    code, out, _ = checked(tmp_path, capsys, folder, "--split", "val")
    assert code == wrong and words in out and ("commonest" in out) == (not wrong and words != "")
    assert f"0 with faults, {int(wrong)} warning" in out and "one too" not in out


def test_photos_that_may_be_read_wrong_are_counted(folder, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 3
    image = folder / "images" / "p00.png"
    Image.open(image).save(image, exif=exif)
    save(folder / "images" / "p01.png", np.full((8, 8), 4000, np.uint16))
    code, out, _ = checked(tmp_path, capsys, folder, "--split", "val")
    assert code == 1 and "1 of 12 photos are turned by an EXIF tag" in out
    assert "1 of 12 photos have 16-bit files" in out and "0 with faults, 2 warnings" in out
    flags = ("--config.data.exif=ignore", "--config.data.max_value=4095")
    assert all(flag.removeprefix("--") in out for flag in flags), "the mends"
    code, out, _ = checked(tmp_path, capsys, folder, "--split", "val", *flags)
    assert code == 0 and "EXIF" not in out and "16-bit" not in out


def test_coco_stuff_with_ids_from_one(tmp_path, capsys):
    """11 of 182 ids were never annotated; in a shifted copy their neighbours are missing."""
    unused = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
    ids = np.array([i for i in range(182) if i not in unused])
    for name, shift in (("plain", 0), ("shifted", 1)):
        root = tmp_path / name
        save(root / "images" / "val2017" / "1.jpg", np.zeros((1, 171, 3), np.uint8))
        save(root / "annotations" / "val2017" / "1.png", (ids + shift)[None].astype(np.uint8))
        options = {"source": "coco_stuff", "vocabulary": "coco_stuff_171"}
        code, out, _ = checked(tmp_path, capsys, root, "--split", "val", **options)
        words = "every id may be one too high: 11, 25 and 28 are no classes; one lower, they"
        assert code == shift and (words in out) == bool(shift)


def test_ade20k_whose_ids_were_shifted_already(tmp_path, capsys):
    """On disk 0 is *other* and classes are 1 to 150; detectron2's copies have 0 to 149 and 255."""
    for name, ids in (("plain", range(151)), ("prepared", [*range(150), 255])):
        root = tmp_path / name
        save(root / "images" / "validation" / "1.jpg", np.zeros((1, 151, 3), np.uint8))
        save(root / "annotations" / "validation" / "1.png", np.array([list(ids)], np.uint8))
        options = {"source": "ade20k", "vocabulary": "ade20k_150"}
        code, out, _ = checked(tmp_path, capsys, root, "--split", "val", **options)
        doubtful = name == "prepared"
        assert code == doubtful and ("ids may be one too low" in out) == doubtful


def test_scenes(tmp_path, capsys):
    code, out, _ = checked(tmp_path, capsys, "", "--limit", "3", source="scenes")
    assert code == 0 and "train: 3 of 4096 pairs" in out and "val: 3 of 64 pairs" in out
