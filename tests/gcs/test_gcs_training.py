"""A run on `gs://`: data, workdir, compile cache; killed, resumed through faults, and used."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from commands import CONFIG
from emulator import BUCKET, Fault
from PIL import Image

FLAGS = ["--config.data.source=folder", "--config.data.root=gs://bucket/data"]
FLAGS += ["--config.train.steps=6", "--config.train.batch_size=2", "--config.vae.batch_size=2"]
FLAGS += ["--config.train.keep_checkpoints=2", "--config.optimizer.ema_decay=0"]

pytestmark = pytest.mark.slow  # minutes of processes started and killed


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def data(gcs):
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for i in range(count):
            labels = draw.integers(0, 2, (4, 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
            image = np.stack([200 * labels, 255 - 200 * labels, 0 * labels], -1)
            gcs.put(f"data/{split}/images/{i}.png", png(image))
            gcs.put(f"data/{split}/masks/{i}.png", png(labels))
    gcs.put("data/classes.txt", b"grass\nbrick, wall\n")


@pytest.fixture
def start(gcs, data, tmp_path):
    """Starts a training in a process of its own and returns it."""
    config = tmp_path / "config.py"
    config.write_text(textwrap.dedent(CONFIG))
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": f"gs://{BUCKET}/cache",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }

    def run(workdir, *overrides):
        command = [sys.executable, "-m", "segdiff_jax.train", "--config", str(config)]
        command += ["--workdir", workdir, *FLAGS, *overrides]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    return run


def finished(process, code=0):
    output = process.communicate()[1]
    assert process.returncode == code, output[-4000:]
    return output


def writes(pattern):
    """Requests that upload, or begin to upload, an object whose name matches."""
    found = re.compile(pattern).search
    return lambda method, path: method in ("POST", "PUT") and bool(found(path))


def compiled_steps(gcs):
    """The names of compiled training steps in the cache: they hold a hash of the program."""
    return {name for name in gcs.objects("cache/") if re.match(r"cache/jit_step-\w+-cache$", name)}


def test_train_kill_resume_evaluate_export_predict(gcs, bucket, start):
    finished(start(f"{bucket}/peace"))
    programs = compiled_steps(gcs)
    assert len(programs) == 2  # of the two stages
    assert any(name.startswith("peace/tensorboard/") for name in gcs.objects("peace/"))

    # Killed while the frozen networks are half written, then while a checkpoint is.
    for pattern in (r"killed/pretrained/text_encoder/model", r"killed/checkpoints/4.*ocdbt"):
        hang = Fault("hang", writes(pattern))
        with gcs.failing(hang):
            process = start(f"{bucket}/killed")
            hang.wait_until_seen(300)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
    assert any(name.startswith("killed/checkpoints/4") for name in gcs.objects("killed/"))

    faults = [
        Fault("503", writes("killed/checkpoints"), times=3),
        Fault("drop", writes("killed/checkpoints/6"), times=2),
        Fault("slow", writes("killed/"), times=5, seconds=1),
        Fault("503", lambda method, path: method == "GET" and "killed/checkpoints" in path, 3),
        Fault("cut", lambda method, path: method == "GET" and "data/train" in path, 2),
        Fault("lost", writes("killed/config.json")),
    ]
    with gcs.failing(*faults):
        log = finished(start(f"{bucket}/killed"))
    assert all(fault.seen for fault in faults), [len(fault.seen) for fault in faults]
    assert "resuming at step 2" in log
    assert compiled_steps(gcs) == programs, "a run that goes on compiles its step again"

    from segdiff_jax import evaluate, export, predict

    for name in ("peace", "killed"):
        arguments = ["--checkpoint", f"{bucket}/{name}", "--output", f"{bucket}/out/{name}"]
        export.main([*arguments, "--format", "diffusers"])
    peace, killed = gcs.objects("out/peace/"), gcs.objects("out/killed/")
    assert [*peace.values()] == [*killed.values()]  # bit for bit

    evaluate.main(["--checkpoint", f"{bucket}/killed", "--output", f"{bucket}/scores"])
    scores = json.loads(gcs.objects("scores/")["scores/metrics.json"])
    assert scores["images"] == 2 and set(scores["per_class"]) == {"grass", "brick"}
    assert "scores/index.html" in gcs.objects("scores/")

    arguments = ["--checkpoint", f"{bucket}/out/killed", "--classes", f"@{bucket}/data/classes.txt"]
    arguments += ["--images", f"{bucket}/data/val/images", "--output", f"{bucket}/found"]
    predict.main(arguments)
    labels = gcs.objects("found/")["found/0_labels.png"]
    assert np.asarray(Image.open(io.BytesIO(labels))).shape == (16, 16)


def test_data_that_cannot_be_read_is_named(gcs, bucket, start):
    refuse = Fault("503", lambda method, path: "data/train/images/3.png" in path, float("inf"))
    with gcs.failing(refuse):
        log = finished(start(f"{bucket}/run", "--config.vae.steps=9"), code=2)
    assert "gs://bucket/data/train/images/3.png" in log and "Traceback" not in log
    assert len(refuse.seen) > 3  # it was tried again
