"""Single objects: large ones go up in chunks, of which any can fail."""

import io
import logging

import numpy as np
import pytest
from emulator import Fault
from etils import epath
from PIL import Image

from segdiff_jax import files
from segdiff_jax.config import DataConfig
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.errors import UserError
from segdiff_jax.evaluation import parts

pytestmark = pytest.mark.usefixtures("impatient")

LARGE = np.random.default_rng(0).bytes(12 << 20)  # gcsfs sends chunks of 5 MiB


def chunks(method, path):
    return "upload_id=" in path


@pytest.mark.parametrize("kind", ["503", "drop"])
def test_a_chunk_that_fails_is_sent_again(kind, gcs, bucket):
    fault = Fault(kind, chunks, times=2)
    with gcs.failing(fault):
        files.write_bytes(f"{bucket}/x/large", LARGE)
    assert len(fault.seen) == 2
    assert gcs.objects() == {"x/large": LARGE}
    assert epath.Path(f"{bucket}/x/large").read_bytes() == LARGE


@pytest.mark.parametrize("kind", ["lost", "cut"])
def test_a_chunk_whose_receipt_is_lost(kind, gcs, bucket):
    """The emulator refuses a chunk it has; Google's store ignores bytes that it has."""
    fault = Fault(kind, chunks)
    with gcs.failing(fault), pytest.raises(UserError, match="cannot write gs://bucket/x/large: "):
        files.write_bytes(f"{bucket}/x/large", LARGE)
    assert len(fault.seen) == 1
    assert gcs.objects() in ({}, {"x/large": LARGE})
    files.write_bytes(f"{bucket}/x/large", LARGE)
    assert gcs.objects() == {"x/large": LARGE}


def test_an_upload_that_fails_leaves_the_object_as_it_was(gcs, bucket, caplog):
    files.write_bytes(f"{bucket}/large", b"earlier")
    refuse = Fault("503", chunks, times=float("inf"))
    caplog.set_level(logging.WARNING)
    with gcs.failing(refuse), pytest.raises(UserError) as caught:
        files.write_bytes(f"{bucket}/large", LARGE)
    assert str(caught.value).startswith("cannot write gs://bucket/large: ")
    assert gcs.objects() == {"large": b"earlier"}
    # One line for the user, no traceback beside it; the emulator, a thread here, logs requests.
    assert not [r for r in caplog.records if not r.name.startswith("gcp_storage_emulator")]


def test_check_writable_names_the_bucket(gcs, bucket):
    files.check_writable(f"{bucket}/run")
    assert gcs.objects() == {}
    with pytest.raises(UserError, match="cannot write gs://no-such-bucket/run"):
        files.check_writable("gs://no-such-bucket/run")


def test_what_another_process_writes_is_seen(gcs, bucket):
    folder = epath.Path(f"{bucket}/folder")
    files.write_text(folder / "a", "1")
    assert [p.name for p in folder.iterdir()] == ["a"]
    gcs.put("folder/b", b"2")
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b"]
    gcs.delete("folder/a")
    assert not (folder / "a").exists()


def test_a_folder_of_pairs_with_sub_folders(gcs, bucket):
    picture = io.BytesIO()
    Image.fromarray(np.ones((4, 4), np.uint8)).save(picture, "png")
    for name in ("a", "sub.1/b", "sub/deep/c", ".hidden/d"):
        gcs.put(f"data/train/images/{name}.png", picture.getvalue())
        gcs.put(f"data/train/masks/{name}_mask.png", picture.getvalue())
    gcs.put("data/train/images/README", b"x")
    gcs.put("data/classes.txt", b"sky\nroad\n")
    config = DataConfig(source="folder", root=f"{bucket}/data", mask_suffix="_mask")
    source = open_source(config, "train", 0)
    assert [source[i]["name"] for i in range(len(source))] == ["a", "b", "c"]
    config.mask_suffix = ""
    with pytest.raises(UserError, match=r"gs://bucket/.*a\.png: no mask .*mask_suffix=_mask"):
        open_source(config, "train", 0)
    gcs.put("other/images/train/a.png", picture.getvalue())
    with pytest.raises(UserError, match=r"gs://bucket/other/masks/train: no such folder"):
        open_source(DataConfig(source="folder", root=f"{bucket}/other"), "train", 0)
    with pytest.raises(UserError, match=r"found 1 images in gs://bucket/other/images/train"):
        open_source(DataConfig(source="cityscapes", root=f"{bucket}/other"), "train", 0)


def test_the_parts_of_an_evaluation_that_is_done_leave_nothing_behind(gcs, bucket):
    folder = parts.folder_of(f"{bucket}/o")
    parts.Parts(folder, {}, range(1)).save(0, parts.nothing(2))
    assert gcs.objects()
    parts.remove(folder)
    assert gcs.objects() == {}
    parts.remove(folder)
