"""Exports and pretrained folders on `gs://`: whole or not at all, and through faults."""

import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from emulator import Fault
from flax import nnx

from segdiff_jax import export, ownership
from segdiff_jax.errors import UserError
from segdiff_jax.weights import pretrained

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def write(tiny_networks, tiny_config):
    return lambda directory: export.write_folder((*tiny_networks, tiny_config()), str(directory))


def leaves(module):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(module))]


def assert_loads(source, unet):
    loaded = pretrained.load(source)
    for found, wanted in zip(leaves(loaded.unet), leaves(unet), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert None not in loaded[:5]


def uploads(part):
    return lambda method, path: method in ("POST", "PUT") and part in path


def test_diffusers_export_is_that_of_a_local_folder(gcs, bucket, write, tiny_networks, tmp_path):
    write(tmp_path / "local")
    local = {
        path.relative_to(tmp_path / "local").as_posix(): path.read_bytes()
        for path in (tmp_path / "local").rglob("*")
        if path.is_file()
    }
    # The second is of an export in the store, the third over an earlier one.
    for source, name in ((tmp_path / "local", "a/b"), *[(f"{bucket}/a/b", "c")] * 2):
        places = ["--checkpoint", str(source), "--output", f"{bucket}/{name}"]
        export.main([*places, "--format", "diffusers"])
        stored = gcs.objects(f"{name}/")
        assert {path.removeprefix(f"{name}/"): data for path, data in stored.items()} == local
    assert_loads(f"{bucket}/c", tiny_networks[0])


def test_stablehlo_export(gcs, bucket, write, tmp_path):
    write(tmp_path / "model")
    places = ["--checkpoint", str(tmp_path / "model"), "--output", f"{bucket}/hlo"]
    export.main([*places, "--format", "stablehlo", "--dtype", "bfloat16"])
    stored = gcs.objects("hlo/")
    names = {"sampler.stablehlo", "sampler.json", ownership.MARKER}
    assert set(stored) == {f"hlo/{name}" for name in names}
    assert json.loads(stored["hlo/sampler.json"])["weights_dtype"] == "bfloat16"
    function = jax.export.deserialize(bytearray(stored["hlo/sampler.stablehlo"]))
    assert set(function.platforms) == {"cpu", "cuda", "tpu"}


def test_a_folder_that_is_no_export_is_left_alone(gcs, bucket, write):
    from etils import epath

    epath.Path(f"{bucket}/mine/thesis.txt").write_text("years")
    with pytest.raises(UserError, match="gs://bucket/mine: is not empty .*there is thesis.txt"):
        write(f"{bucket}/mine")
    assert gcs.objects() == {"mine/thesis.txt": b"years"}


@pytest.mark.parametrize("kind", ["503", "drop", "lost", "cut"])
def test_short_faults_are_overcome(kind, gcs, bucket, write, tiny_networks):
    faults = [
        Fault(kind, uploads("o"), times=3),
        Fault("slow", lambda method, path: True, times=3, seconds=0.3),
    ]
    with gcs.failing(*faults):
        write(f"{bucket}/model")
    assert all(len(fault.seen) == 3 for fault in faults)
    reading = Fault(kind, lambda method, path: method == "GET", times=3)
    with gcs.failing(reading, Fault("slow", times=3, seconds=0.3)):
        assert_loads(f"{bucket}/model", tiny_networks[0])
    assert len(reading.seen) == 3


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "model_index.json"])
def test_a_store_that_refuses_is_named_and_nothing_passes_for_an_export(
    part, gcs, bucket, write, tiny_networks
):
    write(f"{bucket}/model")  # an earlier one must not show through
    refuse = Fault("503", uploads(part), times=float("inf"))
    with gcs.failing(refuse), pytest.raises(UserError) as caught:
        write(f"{bucket}/model")
    assert str(caught.value).startswith("cannot write gs://bucket/model/")
    assert part in str(caught.value) and "503" in str(caught.value)
    with pytest.raises(UserError, match="gs://bucket/model: no model_index.json"):
        pretrained.load(f"{bucket}/model")
    write(f"{bucket}/model")
    assert_loads(f"{bucket}/model", tiny_networks[0])


def test_an_object_that_cannot_be_read_is_named(gcs, bucket, write):
    write(f"{bucket}/model")
    weights = "unet/diffusion_pytorch_model"
    for part in ("model_index.json", "vae/config.json", weights, "merges.txt"):
        refuse = Fault("503", lambda method, path: part in path, times=float("inf"))
        with gcs.failing(refuse), pytest.raises(UserError) as caught:
            pretrained.load(f"{bucket}/model")
        message = str(caught.value)
        assert message.startswith("cannot read gs://bucket/model") and "503" in message
        assert "try again" in message and "\n" not in message


def test_a_killed_export_is_no_export(gcs, bucket, write, tiny_networks, tmp_path):
    write(tmp_path / "model")
    command = [sys.executable, "-m", "segdiff_jax.export", "--checkpoint", str(tmp_path / "model")]
    command += ["--output", f"{bucket}/out", "--format", "diffusers"]
    hang = Fault("hang", uploads("vae/diffusion_pytorch_model"))
    with gcs.failing(hang):
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        hang.wait_until_seen(120)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert "out/unet/diffusion_pytorch_model.safetensors" in gcs.objects()
    with pytest.raises(UserError, match="gs://bucket/out: no model_index.json"):
        pretrained.load(f"{bucket}/out")
    export.main(command[3:])
    assert_loads(f"{bucket}/out", tiny_networks[0])


def test_only_listed_files_are_replaced(gcs, bucket, write):
    write(f"{bucket}/m")
    names = {name.removeprefix("m/") for name in gcs.objects("m/")}
    assert ownership.owned(f"{bucket}/m") == {"diffusers": names - {ownership.MARKER}}
    gcs.put("m/unet/thesis.txt", b"years")
    before = gcs.objects()
    with pytest.raises(UserError, match="m/unet/thesis.txt: is no part of the export"):
        write(f"{bucket}/m")
    assert gcs.objects() == before
    gcs.delete("m/unet/thesis.txt")
    write(f"{bucket}/m")
    assert gcs.objects() == {k: v for k, v in before.items() if k != "m/unet/thesis.txt"}
    for output in ("m", "m/", "m/new", ""):
        argv = ["--checkpoint", f"{bucket}/m", "--output", f"{bucket}/{output}"]
        with pytest.raises(UserError, match="--checkpoint gs://bucket/m, which is only read"):
            export.main([*argv, "--format", "diffusers"])


def test_claims(gcs, bucket):
    folder = f"{bucket}/o"
    with ownership.claimed(folder, "x", ["a", "sub/b", "never"]):
        assert set(gcs.objects()) == {f"o/{ownership.MARKER}"}, "before the first file"
        gcs.put("o/a", b"1")
        gcs.put("o/sub/b", b"1")
    assert ownership.owned(folder) == {"x": {"a", "sub/b"}}
    gcs.put("o/never", b"of the user")
    with pytest.raises(UserError, match="gs://bucket/o/never: would be replaced"):
        ownership.claim(folder, "x", ["a", "never"])
    with ownership.claimed(f"{bucket}/p", "x", ["a"]):
        pass
    assert not gcs.objects("p/")
