"""Reading from and pushing to the hub, over HTTP, with `huggingface_hub` itself."""

import json
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from fake_hub import TOKEN, FakeHub
from flax import nnx
from huggingface_hub import constants
from PIL import Image

from segdiff_jax import evaluate, export, ownership
from segdiff_jax.errors import UserError
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.models.linear_decoder import LinearDecoder
from segdiff_jax.weights import pretrained
from segdiff_jax.weights.mask_decoders import LINEAR, Decoders

STEM = "vae/diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"


@pytest.fixture(scope="module")
def exported(tiny_networks, tiny_config, tmp_path_factory) -> Path:
    """A model whose masks are decoded by what lies beside the networks."""
    folder, config = tmp_path_factory.mktemp("export") / "model", tiny_config()
    config.sampler.decoder = "linear"
    draw = lambda *shape: np.random.default_rng(0).normal(size=shape).astype(np.float32)  # noqa: E731
    decoders = Decoders(LinearDecoder(draw(3, 3, 4, 4), draw(4)))
    export.write_folder((*tiny_networks, config), folder, decoders=decoders)
    return folder


@pytest.fixture(scope="module")
def contents(exported) -> dict[str, bytes]:
    """All files but the list of them, which is about the disk that they are on."""
    files = (p for p in exported.rglob("*") if p.is_file() and p.name != ownership.MARKER)
    return {str(path.relative_to(exported)): path.read_bytes() for path in files}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub of this process, with an empty cache; commands here start no runtime of their own."""
    monkeypatch.setattr("segdiff_jax.parallel.runtime.start", lambda: None)
    server = FakeHub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    # Its uploads need a store of their own.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()


def assert_same(left, right, rounded=np.float32) -> None:
    pairs = (jax.tree.leaves(nnx.state(module)) for module in (left, right))
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_array_equal(a, np.asarray(b).astype(rounded).astype(np.float32))


def push(checkpoint, output, *more, repository="me/model"):
    argv = ["--checkpoint", str(checkpoint), "--output", str(output), "--format=diffusers"]
    export.main([*argv, "--push-to-hub", repository, *more])


def test_a_repository_its_revisions_and_the_cache(hub, contents, tiny_networks, monkeypatch):
    extra = {"README.md": b"", "photo.png": b"", "unet/diffusion_pytorch_model.bin": b"pickle"}
    extra |= {f"{STEM}.fp16.safetensors": b"not wanted", "v1-5-pruned.safetensors": b"nor this"}
    hub.commit("someone/model", contents | extra)
    name = "scheduler/scheduler_config.json"
    other = json.dumps(json.loads(contents[name]) | {"steps_offset": 5}).encode()
    second = hub.commit("someone/model", contents | {name: other}, branch="v2")

    loaded = pretrained.load("someone/model")
    assert None not in loaded[:5]
    for part, ours in zip(loaded[:3], tiny_networks, strict=False):
        assert_same(part, ours)
    assert hub.downloads() == set(contents) - {"README.md", "segdiff.json", LINEAR}

    hub.log.clear()
    assert_same(pretrained.load("someone/model").vae, tiny_networks[1])
    assert not hub.downloads(), "the cache has it all"
    for revision in ("v2", second):
        schedule = pretrained.load(f"someone/model@{revision}", ("schedule",)).schedule
        assert schedule.steps_offset == 5
    assert hub.downloads() == {name}, "one file differs, once"

    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(pretrained.load("someone/model").unet, tiny_networks[0])
    assert pretrained.load("someone/model@v2", ("schedule",)).schedule.steps_offset == 5
    with pytest.raises(UserError, match="someone/model@v3: no such folder, nor could it"):
        pretrained.load("someone/model@v3", ("schedule",))
    assert not hub.log


@pytest.mark.parametrize(
    ("source", "refuse", "message"),
    [
        ("someone/other", "", r"someone/other: .*\(.*404.*\): check the name"),
        ("someone/model@v9", "", "someone/model@v9: .*404"),
        ("someone/model", "resolve", "someone/model: .*403"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(source, refuse, message, hub, contents):
    hub.commit("someone/model", contents)
    hub.refuse = refuse
    with pytest.raises(UserError, match=message) as error:
        pretrained.load(source, ("vae",))
    assert "\n" not in str(error.value)


def test_a_repository_of_pickles_alone(hub, contents):
    hub.commit("someone/old", {p: d for p, d in contents.items() if p != WEIGHTS})
    with pytest.raises(UserError, match="no .safetensors weights .pickles are not read.*another"):
        pretrained.load("someone/old", ("vae",))


def variant_files(contents, name: str, shard: str, index: str) -> dict[str, bytes]:
    """`contents` with the VAE in float16, whole or in two shards; {n} is "00001-of-00002"."""
    half = {k: v.astype(np.float16) for k, v in safetensors.numpy.load(contents[WEIGHTS]).items()}
    files = {path: data for path, data in contents.items() if path != WEIGHTS}
    if name:
        return files | {f"{STEM}.{name}": safetensors.numpy.save(half)}
    where = {k: shard.format(n=f"0000{1 + i % 2}-of-00002") for i, k in enumerate(sorted(half))}
    for file in set(where.values()):
        part = {k: half[k] for k in half if where[k] == file}
        files[f"vae/{file}"] = safetensors.numpy.save(part)
    return files | {f"vae/{index}": json.dumps({"metadata": {}, "weight_map": where}).encode()}


S = "diffusion_pytorch_model"
LAYOUTS = {
    "whole": ("fp16.safetensors", "", ""),
    "today": ("", f"{S}.fp16-{{n}}.safetensors", f"{S}.safetensors.index.fp16.json"),
    "older": ("", f"{S}-{{n}}.fp16.safetensors", f"{S}.safetensors.fp16.index.json"),
    "older, today's index": (
        "",
        f"{S}-{{n}}.fp16.safetensors",
        f"{S}.safetensors.index.fp16.json",
    ),
    "hub's own": ("", f"{S}.fp16-{{n}}.safetensors", f"{S}.fp16.safetensors.index.json"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_to_name_a_variant(layout, hub, contents, tiny_networks):
    files = variant_files(contents, *LAYOUTS[layout])
    weights = {path for path in files if path.startswith(STEM) and path.endswith(".safetensors")}
    hub.commit("someone/only", files)
    hub.commit("someone/both", files | {WEIGHTS: contents[WEIGHTS]})
    for source, variant in (("someone/both", "fp16"), ("someone/only", None)):
        hub.log.clear()
        loaded = pretrained.load(source, ("vae",), variant=variant)
        assert_same(loaded.vae, tiny_networks[1], np.float16)
        assert {p for p in hub.downloads() if p.endswith(".safetensors")} == weights
    hub.log.clear()
    assert_same(pretrained.load("someone/both", ("vae",)).vae, tiny_networks[1])
    assert {p for p in hub.downloads() if p.endswith(".safetensors")} == {WEIGHTS}
    with pytest.raises(UserError, match="bf16: there is no such variant, but fp16: choose"):
        pretrained.load("someone/only", ("vae",), variant="bf16")


def test_a_variant_is_fetched_only_for_the_component_that_has_nothing_else(hub, contents):
    """As many repositories have it: the plain UNet beside a half one, the VAE half alone."""
    files = variant_files(contents, "fp16.safetensors", "", "")
    unet = "unet/diffusion_pytorch_model.safetensors"
    hub.commit("a/b", files | {unet.replace(".safe", ".fp16.safe"): b"not wanted"})
    pretrained.load("a/b", ("unet", "vae"))
    weights = {path for path in hub.downloads() if path.endswith(".safetensors")}
    assert weights == {unet, f"{STEM}.fp16.safetensors"}


def test_push_and_read_back(hub, exported, contents, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(exported, tmp_path / "m")
    assert f"pushed: {hub.url}/me/model" in capsys.readouterr().out
    assert hub.private == {"me/model": True}
    hub.content("me/model").pop(".gitattributes")
    assert hub.content("me/model") == contents
    assert len(hub.commits) == 2, "an empty repository, and all files in one commit"
    push(exported, tmp_path / "m", "--dtype", "bfloat16")  # over the first one
    assert len(hub.commits) == 3
    assert len(hub.content("me/model")[WEIGHTS]) < 0.7 * len(contents[WEIGHTS])
    assert None not in pretrained.load("me/model")[:5]


@pytest.mark.parametrize(
    ("repository", "output", "message"),
    [
        ("me/mo del", "n", "--push-to-hub me/mo del: Repo id"),
        ("me/model", "gs://b/n", "only a local folder can be pushed"),
        ("me/model", "n", "--push-to-hub me/model: .*check .* `hf auth login`"),
    ],
)
def test_a_push_that_cannot_succeed_is_refused_before_the_work(
    repository, output, message, hub, exported, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(UserError, match=message) as error:
        push(exported, output, repository=repository)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "n").exists() and not hub.commits


def test_a_push_that_breaks_leaves_the_repository_as_it_was(hub, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    before = hub.commit("me/model", {"README.md": b"---\n"})
    hub.refuse = "/commit/"
    with pytest.raises(UserError, match="--push-to-hub me/model: .*403") as error:
        push(exported, tmp_path / "m")
    assert "\n" not in str(error.value)
    assert hub.branches["me/model"] == {"main": before}


def test_export_and_evaluate_take_a_model_from_the_hub(hub, contents, tmp_path):
    hub.commit("someone/model", contents)
    argv = ["--checkpoint", "someone/model", "--output"]
    export.main([*argv, str(tmp_path / "again"), "--format=diffusers"])
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == contents[WEIGHTS]
    for folder, shape in (("images", (16, 16, 3)), ("masks", (16, 16))):
        (tmp_path / "data" / "val" / folder).mkdir(parents=True)
        picture = Image.fromarray(np.ones(shape, np.uint8))
        picture.save(tmp_path / "data" / "val" / folder / "a.png")
    (tmp_path / "data" / "classes.txt").write_text("sky\nroad\n")
    data = ["--config.data.source=folder", f"--config.data.root={tmp_path / 'data'}"]
    evaluate.main([*argv, str(tmp_path / "o"), *data])
    said = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert said["checkpoint"] == "someone/model" and said["images"] == 1


def test_an_export_on_the_hub_is_a_checkpoint(hub, contents, exported):
    commit = hub.commit("someone/model", contents)
    image = np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8)
    expected = Segmenter.load(str(exported))(image, ["sky", "road"])
    for name in (Path("someone/model"), f"someone/model@{commit}"):
        found = Segmenter.load(name)(image, ["sky", "road"])
        assert found.scores.tobytes() == expected.scores.tobytes()
    with pytest.raises(UserError, match="someone/other: no such folder, nor could it be had"):
        Segmenter.load("someone/other")
