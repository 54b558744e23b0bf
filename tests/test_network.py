"""Every command against a network that hangs: one line after the time that is set."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import fsspec
import jax
import pytest
from etils.epath import backend
from huggingface_hub import constants
from silent import Silent

from segdiff_jax import evaluate, export, files, predict, train, waiting
from segdiff_jax.errors import UserError
from segdiff_jax.parallel import runtime

SECONDS = 1.0
CONFIG = """
    from segdiff_jax import config as c

    def get_config():
        return c.Config(data=c.DataConfig(source="scenes"), vae=c.VAEConfig(steps=1))
"""


@pytest.fixture
def silent(monkeypatch, tmp_path):
    """`gs://` and the hub are one `Silent` server, for this process and those it starts."""
    server = Silent()
    for name, value in (
        ("STORAGE_EMULATOR_HOST", server.url),
        ("TENSORSTORE_GCS_HTTP_URL", server.url),
        ("FSSPEC_GCS_TOKEN", "anon"),
        ("HF_ENDPOINT", server.url),
        ("HF_HOME", str(tmp_path / "hf")),
        (waiting.NETWORK, str(SECONDS)),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setitem(fsspec.config.conf["gcs"], "token", "anon")  # read at import
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setattr("segdiff_jax.parallel.runtime.start", lambda *_: None)
    yield server
    server.close()
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def bucket(request):
    """Another for each test: one that stayed silent is left alone for some seconds."""
    return f"gs://bucket-{abs(hash(request.node.name))}"


def asked(tmp_path, **places):
    """Arguments of each command, with local places that exist, but for those given."""
    (tmp_path / "in").mkdir()
    (tmp_path / "w").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    (tmp_path / "c.py").write_text(textwrap.dedent(CONFIG))
    own = {"checkpoint": tmp_path / "w", "images": tmp_path / "in", "output": tmp_path / "o"}
    return {name: str(place) for name, place in (own | places).items()}


def predicting(p, tmp_path):
    predict.main([*(f"--{k}={v}" for k, v in p.items()), "--classes=sky; road"])


def evaluating(p, tmp_path):
    evaluate.main([f"--checkpoint={p['checkpoint']}", f"--output={p['output']}"])


def exporting(p, tmp_path):
    export.main(
        [f"--checkpoint={p['checkpoint']}", f"--output={p['output']}", "--format=diffusers"]
    )


def training(p, tmp_path, *more):
    config = ["--config", str(tmp_path / "c.py"), "--config.stage=diffusion"]
    train.main([*config, f"--workdir={p.get('workdir', tmp_path / 'run')}", *more])


def ends(call, *arguments):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert time.monotonic() - start < 8 * SECONDS
    message = str(caught.value)
    assert "no answer for 1 s" in message and waiting.NETWORK in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("command", [predicting, evaluating, exporting])
def test_a_checkpoint(command, silent, bucket, tmp_path):
    assert bucket in ends(command, asked(tmp_path, checkpoint=f"{bucket}/run"), tmp_path)


def test_photos(silent, bucket, tmp_path):
    assert bucket in ends(predicting, asked(tmp_path, images=f"{bucket}/photos"), tmp_path)


def test_a_list_of_classes(silent, bucket, tmp_path):
    places = asked(tmp_path)
    argv = [*(f"--{k}={v}" for k, v in places.items()), f"--classes=@{bucket}/classes.txt"]
    assert bucket in ends(predict.main, argv)


def test_a_workdir(silent, bucket, tmp_path):
    assert bucket in ends(training, asked(tmp_path, workdir=f"{bucket}/run"), tmp_path)


def test_data(silent, bucket, tmp_path):
    more = ["--config.data.source=folder", f"--config.data.root={bucket}/data"]
    assert bucket in ends(training, asked(tmp_path), tmp_path, *more)


@pytest.mark.parametrize("kind", ["gs", "hub"])
def test_what_a_training_begins_with(kind, silent, bucket, tmp_path):
    start = "someone/model" if kind == "hub" else f"{bucket}/model"
    message = ends(training, asked(tmp_path), tmp_path, f"--config.init_from={start}")
    assert (bucket if kind == "gs" else "Hugging Face (someone/model)") in message


def test_a_push_to_the_hub(silent, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "token")
    p = asked(tmp_path)
    argv = [f"--checkpoint={p['checkpoint']}", f"--output={p['output']}", "--format=diffusers"]
    assert "Hugging Face" in ends(export.main, [*argv, "--push-to-hub", "me/model"])


def test_sign_in_to_google(silent, monkeypatch, bucket, tmp_path):
    monkeypatch.delitem(fsspec.config.conf["gcs"], "token")
    address = silent.url.removeprefix("http://")
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_IP"):
        monkeypatch.setenv(name, address)
    monkeypatch.setattr("google.auth.compute_engine._metadata._GCE_METADATA_HOST", address)
    no_file = lambda **_: (None, None)  # noqa: E731
    monkeypatch.setattr("google.auth._default._get_gcloud_sdk_credentials", no_file)
    ends(evaluating, asked(tmp_path, checkpoint=f"{bucket}/run"), tmp_path)


def test_a_file_that_cannot_be_written_is_given_up_once(silent, bucket):
    assert bucket in ends(files.write_bytes, f"{bucket}/large", bytes(20_000_000))


def test_a_limit_that_is_none_is_refused_by_every_command(monkeypatch, tmp_path):
    monkeypatch.setenv(waiting.NETWORK, "soon")
    places = asked(tmp_path)
    for command in (predicting, evaluating, exporting, training):
        with pytest.raises(UserError, match=f"{waiting.NETWORK}=soon: must be a number of sec"):
            command(places, tmp_path)


@pytest.fixture
def settings(monkeypatch):
    """What `runtime.start` sets, in place of the settings of this process."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.setattr("jax.experimental.compilation_cache.compilation_cache.reset_cache", list)
    return found


start = runtime.start  # `silent` replaces it


@pytest.mark.parametrize("kind", ["gs", "unknown", "local"])
def test_a_compile_cache_that_cannot_be_reached(
    kind, silent, bucket, settings, monkeypatch, tmp_path, caplog
):
    (tmp_path / "file").write_text("")
    cache = {"gs": f"{bucket}/cache", "unknown": "foo://x/y", "local": str(tmp_path / "file/x")}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", cache[kind])
    start()
    assert settings["jax_compilation_cache_dir"] is None
    (record,) = [r for r in caplog.records if "compile cache" in r.message]
    assert record.levelname == "WARNING" and "going on without it" in record.message
    assert cache[kind] in record.message and "\n" not in record.message


PREDICT = """
    from segdiff_jax import cli, predict, waiting
    waiting.FIRST_WORD, waiting.NEXT_WORD = 0.5, 1.0
    cli.run(predict.main)
"""


def test_the_wait_is_seen_and_the_process_ends(silent, bucket, tmp_path):
    places = asked(tmp_path, checkpoint=f"{bucket}/run")
    command = [sys.executable, "-c", textwrap.dedent(PREDICT), "--classes", "sky; road"]
    command += [f"--{name}={place}" for name, place in places.items()]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", waiting.NETWORK: "3"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == os.EX_TEMPFAIL, ended.stderr
    *said, last = ended.stderr.splitlines()
    assert last.startswith(f"error: {bucket}: no answer for 3 s: check the network")
    assert said and all(line.startswith(f"waiting for {bucket} for") for line in said)
    assert not Path(places["output"]).exists()
