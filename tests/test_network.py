"""Every command against a network that hangs: one line after the time that is set."""

import os
import subprocess
import sys
import textwrap
import time

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


COMMANDS = {  # {place} stands for what exists here, unless a test puts another in
    predict: "--checkpoint={w} --images={images} --output={o} --classes={classes}",
    evaluate: "--checkpoint={w} --output={o}",
    export: "--checkpoint={w} --output={o} --format=diffusers",
    train: "--config={config} --config.stage=diffusion --workdir={run}",
}


def arguments(command, tmp_path, **places):
    for folder in ("images", "w"):
        (tmp_path / folder).mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    (tmp_path / "config").write_text(textwrap.dedent(CONFIG))
    own = {name: tmp_path / name for name in ("w", "o", "images", "config", "run")}
    return COMMANDS[command].format(**own | {"classes": "sky;road"} | places).split()


def ends(call, *arguments):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert time.monotonic() - start < 20 * SECONDS  # the first call imports
    message = str(caught.value)
    assert "no answer for 1 s" in message and waiting.NETWORK in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("command", "place", "value"),
    [
        *((command, "w", "{bucket}/run") for command in (predict, evaluate, export)),
        (predict, "images", "{bucket}/photos"),
        (predict, "classes", "@{bucket}/classes.txt"),
        (train, "run", "{bucket}/run"),
        (train, "--config.data.source=folder", "--config.data.root={bucket}/data"),
        (train, "", "--config.init_from={bucket}/model"),
        (train, "", "--config.init_from=someone/model"),
    ],
)
def test_a_place_that_stays_silent_is_named(command, place, value, silent, bucket, tmp_path):
    value = value.format(bucket=bucket)
    flags = value.startswith("--")
    argv = arguments(command, tmp_path, **{} if flags else {place: value})
    message = ends(command.main, argv + [f for f in (place, value) if flags and f])
    assert (bucket if bucket in value else "Hugging Face (someone/model)") in message


def test_a_push_to_the_hub(silent, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "token")
    argv = [*arguments(export, tmp_path), "--push-to-hub", "me/model"]
    assert "Hugging Face" in ends(export.main, argv)


def test_sign_in_to_google(silent, monkeypatch, bucket, tmp_path):
    monkeypatch.delitem(fsspec.config.conf["gcs"], "token")
    address = silent.url.removeprefix("http://")
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_IP"):
        monkeypatch.setenv(name, address)
    monkeypatch.setattr("google.auth.compute_engine._metadata._GCE_METADATA_HOST", address)
    no_file = lambda **_: (None, None)  # noqa: E731
    monkeypatch.setattr("google.auth._default._get_gcloud_sdk_credentials", no_file)
    ends(evaluate.main, arguments(evaluate, tmp_path, w=f"{bucket}/run"))


def test_a_file_that_cannot_be_written_is_given_up_once(silent, bucket):
    assert bucket in ends(files.write_bytes, f"{bucket}/large", bytes(20_000_000))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_limit_that_is_none_is_refused_by_every_command(command, monkeypatch, tmp_path):
    monkeypatch.setenv(waiting.NETWORK, "soon")
    with pytest.raises(UserError, match=f"{waiting.NETWORK}=soon: must be a number of sec"):
        command.main(arguments(command, tmp_path))


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
    argv = arguments(predict, tmp_path, w=f"{bucket}/run")
    command = [sys.executable, "-c", textwrap.dedent(PREDICT), *argv]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", waiting.NETWORK: "3"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == os.EX_TEMPFAIL, ended.stderr
    *said, last = ended.stderr.splitlines()
    assert last.startswith(f"error: {bucket}: no answer for 3 s: check the network")
    assert said and all(line.startswith(f"waiting for {bucket} for") for line in said)
    assert not (tmp_path / "o").exists()
