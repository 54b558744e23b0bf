"""Checkpoint folders in a bucket: what is removed, what never, and the lock of a run there."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segdiff_jax.config import Config, DataConfig, VAEConfig
from segdiff_jax.errors import UserError
from segdiff_jax.training import lock, origin
from segdiff_jax.weights.checkpoint import Checkpoints

MARKER = "commit_success.txt"
SHAPE = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}


@pytest.fixture
def saved(gcs, bucket):
    """The folder of checkpoints 2 and 4."""
    folder = f"{bucket}/a run %1 é/checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, {"x": jnp.full(3, step, jnp.float32)}, {"at": step})
    assert not [name for name in gcs.objects() if name.endswith(".writing")]
    return folder


def strip(gcs, step=""):
    """As a copy would be that left the markers out."""
    for name in gcs.objects():
        if name.endswith(MARKER) and f"checkpoints/{step}" in name:
            gcs.delete(name)


def test_numbered_folders_without_markers_are_never_deleted(gcs, saved):
    strip(gcs)
    before = gcs.objects()
    for options in ({}, {"read_only": True}):
        with pytest.raises(UserError, match=f"no {MARKER} in 2, 4") as error:
            Checkpoints(saved, **options).restore(SHAPE)
        assert saved in str(error.value) and "\n" not in str(error.value)
    assert gcs.objects() == before

    for step in (2, 4):  # as the message says
        gcs.put(f"a%20run%20%251%20%C3%A9/checkpoints/{step}/{MARKER}", b" ")
    with Checkpoints(saved) as checkpoints:
        restored, metadata = checkpoints.restore(SHAPE)
    np.testing.assert_array_equal(restored["x"], [4, 4, 4])
    assert metadata == {"at": 4}


def test_one_folder_without_marker_stops_the_run_as_well(gcs, saved):
    strip(gcs, 4)
    before = gcs.objects()
    with pytest.raises(UserError, match=f"no {MARKER} in 4"):
        Checkpoints(saved)
    assert gcs.objects() == before
    assert Checkpoints(saved, read_only=True).latest_step() == 2


def test_what_a_killed_run_left_is_removed_and_nothing_else(gcs, saved, caplog):
    caplog.set_level(logging.INFO, "segdiff_jax")
    root = "a%20run%20%251%20%C3%A9/checkpoints"
    kept = gcs.objects()
    # Killed before Orbax wrote a word about it, and after.
    gcs.put(f"{root}/6.writing", b" ")
    gcs.put(f"{root}/6/state/d/1", b"half")
    begun = {"init_timestamp_nsecs": 1, "commit_timestamp_nsecs": None}
    gcs.put(f"{root}/8/_CHECKPOINT_METADATA", json.dumps(begun).encode())
    gcs.put(f"{root}/my%20notes/1.txt", b"mine")
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [2, 4]
    kept["a run %1 é/checkpoints/my notes/1.txt"] = b"mine"
    assert gcs.objects() == kept
    assert caplog.text.count("left unfinished") == 2


def test_a_finished_save_whose_marker_a_copy_lost_is_not_taken_for_unfinished(gcs, saved):
    strip(gcs, 4)
    gcs.put("a%20run%20%251%20%C3%A9/checkpoints/4.writing", b" ")  # killed a moment later
    before = gcs.objects()
    with pytest.raises(UserError, match=f"no {MARKER} in 4"):
        Checkpoints(saved)
    assert gcs.objects() == before


@pytest.mark.parametrize("name", ["a [x]", "b*", "c?", "d#1", "e;f", "g\nh"])
def test_names_that_a_bucket_cannot_take_are_refused_before_anything_is_written(gcs, bucket, name):
    with pytest.raises(UserError, match="cannot be kept in a bucket under a path with"):
        Checkpoints(f"{bucket}/{name}/checkpoints")
    assert not gcs.objects()


def test_the_lock_of_a_run_in_a_bucket(gcs, bucket, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "EXPIRES", 1.0)
    with lock.held(f"{bucket}/run") as check:
        mine = json.loads(gcs.objects()["run/lock.json"])
        named = pytest.raises(UserError, match=f"process {mine['pid']} on {mine['host']}")
        with named, lock.held(f"{bucket}/run"):
            pytest.fail("two hold it")
        check()
    assert not gcs.objects()
    gcs.put("run/lock.json", json.dumps(mine | {"machine": "another"}).encode())
    monkeypatch.setattr(lock, "BEAT", 60.0)  # none may come between a look and what is put there
    with lock.held(f"{bucket}/run") as check:
        check()
        theirs = json.loads(gcs.objects()["run/lock.json"]) | {"id": "theirs"}
        gcs.put("run/lock.json", json.dumps(theirs).encode())
        with pytest.raises(UserError, match="took over"):
            check()
    assert json.loads(gcs.objects()["run/lock.json"])["id"] == "theirs"


def test_a_run_in_a_bucket_takes_no_name_of_the_user(gcs, bucket):
    config = Config(data=DataConfig(source="scenes"), vae=VAEConfig(steps=1))
    gcs.put("run/notes.txt", b"mine")
    gcs.put("run/tensorboard/notes.txt", b"mine")
    new = origin.names(config, f"{bucket}/run")
    assert {"config.json", "checkpoints", "compile_cache"} <= new and "tensorboard" not in new
    gcs.put("run/classes.json", b"mine")
    with pytest.raises(UserError, match="classes.json: would be replaced"):
        origin.names(config, f"{bucket}/run")
    gcs.put("run/config.json", b"{}")  # as of a version that kept no list
    gcs.put("run/latents/0", b"ours")
    assert {"classes.json", "latents", "tensorboard"} <= origin.names(config, f"{bucket}/run")
