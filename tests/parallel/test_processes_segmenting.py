"""Evaluation and prediction by two processes with four devices each, against one with eight."""

import json
import textwrap

import numpy as np
import pytest
from commands import Started
from PIL import Image

from segdiff_jax import ownership

CLASSES = "sky; striped blue triangle; red disc, red circle"

# `python -m segdiff_jax.predict`, with something done to it from inside.
PATCHED = """
    import os, signal, sys
    from segdiff_jax import cli, predict
    from segdiff_jax.inference import photos
    from segdiff_jax.inference.segmenter import Segmenter

    me, calls = int(os.environ["JAX_PROCESS_ID"]), []
    {patch}
    cli.run(predict.main)
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, size in (("a", (20, 28)), ("b", (24, 18))):
        photo = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(photo).save(folder / f"{name}.png")
    return folder


def asked(trained, photos, output):
    places = ["--checkpoint", trained, "--images", str(photos), "--output", str(output)]
    return [*places, "--classes", CLASSES, "--ensemble", "2", "--steps", "2", "--threshold", "0.3"]


def contents(folder):
    names = (path for path in folder.iterdir() if path.name != ownership.MARKER)
    return {path.name: path.read_bytes() for path in names}


@pytest.mark.slow
def test_two_processes_predict_the_same_bytes_as_one(trained, photos, tmp_path):
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = ["-m", "segdiff_jax.predict", *asked(trained, photos, folder / "o")]
        folder.mkdir()
        with Started(arguments, folder / "log", processes) as run:
            run.finished()
        assert "2 images segmented" in run.output()
    assert run.output(1) == ""
    alone, together = (contents(tmp_path / name / "o") for name in "12")
    assert len(alone) == 9 and alone.keys() == together.keys()
    for name in alone.keys() - {"index.html"}:  # which names --output
        assert together[name] == alone[name], name
    labels = np.asarray(Image.open(tmp_path / "2/o/a_labels.png"))
    assert len(np.unique(labels)) > 1, "a constant mask would pass"


# `python -m segdiff_jax.evaluate`, which tells of each image that it reads and enlarges.
TELLING = """
    import sys
    from segdiff_jax import cli, evaluate
    from segdiff_jax.data.sources import source as sources
    from segdiff_jax.inference.segmenter import Segmenter

    open_source, segmentation = sources.open_source, Segmenter.segmentation

    class Telling:
        def __init__(self, source):
            self.source = source
        def __len__(self):
            return len(self.source)
        def __getattr__(self, name):
            return getattr(self.source, name)
        def __getitem__(self, index):
            print("reads", index, flush=True)
            return self.source[index]

    def enlarges(*arguments, **options):
        print("scores", flush=True)
        return segmentation(*arguments, **options)

    sources.open_source = lambda *arguments: Telling(open_source(*arguments))
    Segmenter.segmentation = enlarges
    cli.run(evaluate.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ceiling", [False, True])
def test_two_processes_share_an_evaluation_and_score_as_one(trained, tmp_path, ceiling):
    found, told = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        arguments = ["--checkpoint", trained, "--output", str(folder / "o"), "--rows", "1"]
        arguments += ["--config.sampler.ensemble=2", *(["--ceiling"] if ceiling else [])]
        script = ["-c", textwrap.dedent(TELLING), *arguments]
        with Started(script, folder / "log", processes) as run:
            run.finished()
        told += [run.output(number).splitlines() for number in range(processes)]
        found.append(json.loads((folder / "o/metrics.json").read_text()))
    reads = [[line for line in lines if line.startswith("reads")] for lines in told]
    assert reads[0] == [f"reads {i}" for i in range(4)]
    assert reads[1:] == [["reads 0", "reads 2"], ["reads 1", "reads 3"]]
    assert [lines.count("scores") for lines in told] == [4, 2, 2]
    assert [line for line in told[2] if line.split()[0] not in ("reads", "scores")] == []
    assert found[0] == found[1] and found[0]["images"] == 4
    assert 0 < found[0]["pixel_accuracy"] < 1
    assert (tmp_path / "2/o/examples.png").exists()


@pytest.mark.slow
def test_a_killed_process_brings_the_other_down(trained, photos, tmp_path):
    patch = """
    original = Segmenter.unclipped_maps
    def maps(self, *arguments, **more):
        calls.append(0)
        if (me, len(calls)) == (1, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments, **more)
    Segmenter.unclipped_maps = maps
    """
    script = textwrap.dedent(PATCHED).format(patch=textwrap.dedent(patch))
    arguments = ["-c", script, *asked(trained, photos, tmp_path / "o")]
    with Started(arguments, tmp_path / "log", processes=2) as run:
        assert run.processes[1].wait(1800) == -9
        assert run.processes[0].wait(150) not in (0, 2)
    last = run.output(0)
    assert "lost another process of this run" in last or "another task died" in last
    assert (tmp_path / "o/a.json").exists() and not (tmp_path / "o/index.html").exists()


def test_other_files_on_another_machine_are_told_before_any_work(photos, tmp_path):
    patch = """
    find = photos.find
    photos.find = lambda arguments: find(arguments)[me:]
    """
    script = textwrap.dedent(PATCHED).format(patch=textwrap.dedent(patch))
    arguments = ["-c", script, *asked(str(tmp_path / "w"), photos, tmp_path / "o")]
    with Started(arguments, tmp_path / "log", processes=2) as run:
        assert run.wait() == [2, 2]
    assert "process 1 has other --images than process 0" in run.output(0)
