import dataclasses
import itertools
import logging
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from segdiff_jax.config import AugmentConfig, Config, ScenesConfig, TrainConfig
from segdiff_jax.data.images import UnreadableError
from segdiff_jax.data.pipeline import Draws, draw_classes, train_batches
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.errors import UserError
from segdiff_jax.text import vocabulary

SIZE = (16, 24)


class Numbered:
    """Record i is an image filled with i, so that batches say which records they hold."""

    vocabulary = vocabulary.from_names(["a", "b", "c"])
    novel = ()

    def __init__(self, length=24, unreadable=()):
        self.length, self.unreadable = length, set(unreadable)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.unreadable:
            raise UnreadableError(f"{index}.png: truncated")
        image = np.full((*SIZE, 3), index, np.uint8)
        labels = np.full(SIZE, index % 3, np.uint8)
        return {"image": image, "labels": labels, "name": str(index)}


def make_config(batch_size=4, **codec):
    config = Config()
    config.data.image_size = SIZE
    config.train.batch_size = batch_size
    for key, value in codec.items():
        setattr(config.codec, key, value)
    return config


def take(batches, count):
    return list(itertools.islice(batches, count))


def records(batches):
    return [int(i) for batch in batches for i in batch["image"][:, 0, 0, 0]]


def equal(a, b):
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


@pytest.fixture(scope="module")
def scene_source():
    config = make_config()
    config.data.source = "scenes"
    config.data.scenes = ScenesConfig(train_examples=40)
    return open_source(config.data, "train", 0)


def test_shapes_and_types(scene_source):
    count = len(scene_source.vocabulary)
    for classes_per_pass, slots in ((1, 1), (5, 5), (0, count)):
        config = make_config(classes_per_pass=classes_per_pass)
        batch = next(train_batches(scene_source, config, seed=0))
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            "image": ((4, *SIZE, 3), "uint8"),
            "labels": ((4, *SIZE), "uint8"),
            "class_ids": ((4, slots), "int32"),
        }
    assert (batch["class_ids"] == np.arange(count)).all()


def test_same_seed_same_batches_and_other_seed_other_batches(scene_source):
    config = make_config(classes_per_pass=3)
    config.data.augment = AugmentConfig(True, 0.8, 1.5, 0.3)
    first, again, other = (take(train_batches(scene_source, config, s), 4) for s in (3, 3, 4))
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any((a["image"] == b["image"]).all() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", ["scenes", "unreadable"])
@pytest.mark.parametrize(("start", "size"), [(42, 6), (138, 6), (12, 3), (12, 12)])
def test_a_run_goes_on_from_any_example_with_any_batch_size(scene_source, kind, start, size):
    """The examples follow each other without gap or repeat, over epochs and skipped records."""
    source = scene_source if kind == "scenes" else Numbered(24, {3, 4, 20})
    config = make_config(batch_size=6, classes_per_pass=2)
    config.data.augment = AugmentConfig(True, 0.8, 1.5, 0.3)
    config.data.max_unreadable = 0.2
    whole = take(train_batches(source, config, 0), start // 6 + 2)
    then = dataclasses.replace(config, train=TrainConfig(batch_size=size))
    resumed = take(train_batches(source, then, 0, start), 12 // size)
    for key in ("image", "labels", "class_ids"):
        parts = [np.concatenate([b[key] for b in part]) for part in (whole[-2:], resumed)]
        np.testing.assert_array_equal(*parts)


SHARES = [
    [range(0, 8, 2), range(1, 8, 2)],  # where the mesh does not follow the processes
    [[0, 5], [1, 2], [3, 4], [6, 7]],
]


@pytest.mark.parametrize("shares", SHARES)
def test_processes_together_hold_the_same_global_batch(scene_source, shares):
    config = make_config(batch_size=8)
    whole = take(train_batches(scene_source, config, 0, 16), 3)
    for rows in shares:
        part = take(train_batches(scene_source, config, 0, 16, rows), 3)
        for mine, batch in zip(part, whole, strict=True):
            assert equal(mine, {key: batch[key][list(rows)] for key in batch})


def test_every_record_once_per_epoch_in_an_order_of_its_own():
    orders = set()
    for seed in (0, 1):
        seen = records(take(train_batches(Numbered(), make_config(batch_size=8), seed), 9))
        epochs = [tuple(seen[start : start + 24]) for start in (0, 24, 48)]
        assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
        orders |= set(epochs)
    assert len(orders) == 6
    seen = records(take(train_batches(Numbered(10), make_config(batch_size=4), 0), 5))
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)), "not whole batches"


WITH_WORKERS = """
if __name__ == "__main__":
    import itertools
    from segdiff_jax.config import Config
    from segdiff_jax.data.pipeline import train_batches
    from segdiff_jax.data.sources.source import open_source

    config = Config()
    config.data.source, config.data.workers, config.train.batch_size = "scenes", 2, 4
    batches = train_batches(open_source(config.data, "train", 0), config, 0)
    kept = list(itertools.islice(batches, 3))  # as JAX keeps those that it computes from
    batches.close()
    assert next(batches, None) is None
"""


def test_worker_processes_leave_nothing_behind(tmp_path):
    (tmp_path / "run.py").write_text(WITH_WORKERS)
    done = subprocess.run([sys.executable, tmp_path / "run.py"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_unreadable_records_are_replaced_counted_and_logged_once(caplog):
    """By threads and by worker processes, which deliver the same batches."""
    delivered = []
    for workers in (0, 1):
        config = make_config(batch_size=6, classes_per_pass=2)
        config.data.workers = workers
        config.data.max_unreadable = 0.1
        batches = train_batches(Numbered(24, {5, 11}), config, 0)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            delivered.append(take(batches, 12))  # three epochs
        assert set(batches.unreadable) == {5, 11}
        assert len([r for r in caplog.records if "truncated" in r.getMessage()]) == 2
    assert all(equal(a, b) for a, b in zip(*delivered, strict=True))
    counts = np.bincount(records(delivered[0]), minlength=24)
    assert counts[5] == counts[11] == 0 and counts[6] == counts[12] == 6
    assert (np.delete(counts, [5, 6, 11, 12]) == 3).all()


def test_records_that_are_kept_in_memory_are_read_once():
    class Counting(Numbered):
        reads = []

        def __getitem__(self, index):
            self.reads.append(index)
            return super().__getitem__(index)

    config, source = make_config(batch_size=8), Counting(24)
    plain = take(train_batches(source, config, 0), 9)
    config.data.cache_images = True
    batches = train_batches(source, config, 0)
    kept = take(batches, 40)  # more than threads read ahead, each for itself
    count = len(source.reads)
    take(batches, 40)
    assert len(source.reads) == count
    assert all(equal(a, b) for a, b in zip(kept, plain, strict=False))


@pytest.mark.parametrize(
    ("length", "unreadable", "share"), [(24, {7}, 0.0), (24, {1, 9, 17}, 0.1), (5, range(5), 1.0)]
)
def test_too_many_unreadable_records_stop_training(length, unreadable, share):
    """So do all of them, whatever is allowed."""
    config = make_config(batch_size=6)
    config.data.max_unreadable = share
    with pytest.raises(UserError) as caught:
        take(train_batches(Numbered(length, unreadable), config, 0), 4)
    message = str(caught.value)
    assert "png: truncated" in message and "config.data.max_unreadable" in message
    assert f"of {length} pairs unreadable" in message and "\n" not in message


@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_masks_are_errors_at_once_with_threads_and_workers(tmp_path, workers):
    for kind, value in (("images", 9), ("masks", 3)):
        (tmp_path / kind).mkdir()
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / kind / "a.png")
    (tmp_path / "classes.txt").write_text("x\ny\n")
    config = make_config()
    config.data.root, config.data.workers, config.data.max_unreadable = str(tmp_path), workers, 1
    with pytest.raises(UserError, match=r"a\.png: id 3 is none of the 2 classes"):
        next(train_batches(open_source(config.data, "train", 0), config, 0))


@pytest.mark.parametrize("classes_per_pass", [1, 4])
def test_novel_classes_are_never_asked_in_training(scene_source, classes_per_pass):
    config = make_config(batch_size=40, classes_per_pass=classes_per_pass, negatives=0.9)
    batches = take(train_batches(scene_source, config, 0), 8)
    asked = np.concatenate([batch["class_ids"].ravel() for batch in batches])
    assert not np.isin(asked, scene_source.novel).any()
    trained = len(scene_source.vocabulary) - len(scene_source.novel)
    assert len(np.unique(asked)) > 0.8 * trained


def drawn(labels, classes, count, negatives, times=1, dtype=np.uint8):
    """What `draw_classes` gives [times, count]."""
    rng, labels = np.random.default_rng(0), np.array(labels, dtype)
    classes = np.arange(classes)
    return np.stack([draw_classes(labels, classes, count, negatives, rng) for _ in range(times)])


@pytest.mark.parametrize("negatives", [0.0, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("count", [1, 3])
def test_absent_classes_fill_the_configured_share_of_slots(negatives, count):
    found = drawn([[0, 1, 2, 3, 255]], 12, count, negatives, 2000)
    assert abs((found > 3).mean() - negatives) < 0.03
    assert found.min() >= 0 and found.max() < 12 and found.dtype == np.int32
    assert all(len(set(row)) == count for row in found.tolist())


def test_present_classes_are_drawn_evenly_whatever_their_area():
    labels = np.zeros((20, 20), np.uint8)
    labels[0, 0], labels[0, 1], labels[1] = 4, 7, 255
    found = drawn(labels, 9, 1, 0.0, 1500).ravel()
    shares = np.bincount(found, minlength=9) / 1500
    assert set(found) == {0, 4, 7} and np.abs(shares[[0, 4, 7]] - 1 / 3).max() < 0.05


def test_examples_and_fixed_views_are_drawn_from_different_streams():
    draws = Draws(Numbered(), make_config(), 3)
    streams = [
        *(draws.generator(i) for i in range(20)),
        *(draws.view_generator(i, view) for i in range(20) for view in range(2)),
    ]
    assert len({stream.random() for stream in streams}) == 60
    again = Draws(Numbered(), make_config(), 3).view_generator(5, 1).random()
    assert again == draws.view_generator(5, 1).random()


def test_slot_order_is_random():
    first = drawn([[0, 1, 2, 3]], 8, 4, 0.5, 900)[:, 0]
    assert set(first) == set(range(8)) and abs(np.mean(first < 4) - 0.5) < 0.06


def test_classes_beyond_255_are_drawn_from_labels_of_16_bits():
    labels = [[300, 846, 65535]]
    assert sorted(drawn(labels, 847, 2, 0.0, dtype=np.uint16)[0]) == [300, 846]
    assert drawn(labels, 847, 1, 1.0, dtype=np.uint16)[0, 0] not in (300, 846)


def test_where_one_kind_runs_out_the_other_fills_in():
    nothing, everything = [[255]], [[0, 1, 2]]
    assert drawn(nothing, 3, 1, 0.0)[0, 0] in (0, 1, 2)
    assert drawn(everything, 3, 1, 1.0)[0, 0] in (0, 1, 2)
    padded = drawn(everything, 3, 5, 0.5)[0]
    assert sorted(padded[:3].tolist()) == [0, 1, 2] and (padded[3:] == -1).all()


def test_class_ids_are_drawn_for_the_augmented_view():
    """With every slot a present class, each class asked must be visible after the crop."""

    class Wide(Numbered):
        def __getitem__(self, index):
            labels = np.repeat(np.arange(3, dtype=np.uint8), 40)[None].repeat(16, axis=0)
            return {"image": np.zeros((16, 120, 3), np.uint8), "labels": labels, "name": ""}

    config = make_config(batch_size=8, negatives=0.0)
    config.data.augment = AugmentConfig(True, 1.5, 3.0)
    views = 0
    for batch in take(train_batches(Wide(), config, 0), 6):
        for labels, (class_id,) in zip(batch["labels"], batch["class_ids"], strict=True):
            assert (labels == class_id).any()
            views += len(np.unique(labels[labels < 3])) < 3
    assert views > 20, "crops should have hidden classes in many views"
