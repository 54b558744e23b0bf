"""Stable Diffusion folders in and out: round trips, other programs' files, and broken ones."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torch_oracles import normal, random_ours, relative_error, run, text_encoder, unet, vae, write

from segdiff_jax.config import DiffusionConfig
from segdiff_jax.errors import UserError
from segdiff_jax.models.clip_text import CLIPText, CLIPTextConfig
from segdiff_jax.models.presets import PRESETS
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE, VAEConfig
from segdiff_jax.text.tokenizer import train_tokenizer
from segdiff_jax.weights import hf_config, pretrained
from segdiff_jax.weights.pretrained import Pretrained, describe, load, save

UNET = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
UNET |= {"attention_head_dim": 2, "cross_attention_dim": 12}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny_unet(**options) -> diffusers.UNet2DConditionModel:
    return unet((True,), **(UNET | options))


def tensors(module: nnx.Module) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(module))}


def assert_same(left: nnx.Module, right: nnx.Module) -> None:
    assert left.config == right.config
    a, b = tensors(left), tensors(right)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=str(path))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def ours() -> Pretrained:
    """Everything small, and unlike Stable Diffusion wherever a config allows."""
    unet_config = UNetConfig(32, 16, (8, 12), (False, True), 1, 2, (1, 3), 16, True, 4)
    vae_config = VAEConfig(3, 3, 16, (6, 8), 1, 2, False, 0.7)
    text_config = CLIPTextConfig(600, 16, 24, 1, 2, 16)
    return Pretrained(
        random_ours(lambda rngs: UNet(unet_config, rngs=rngs)),
        random_ours(lambda rngs: VAE(vae_config, rngs=rngs)),
        random_ours(lambda rngs: CLIPText(text_config, rngs=rngs)),
        train_tokenizer(["a photo of a striped blue triangle"], 600, 16),
        DiffusionConfig(prediction_type="sample", steps_offset=0, beta_schedule="linear"),
    )


@pytest.fixture(scope="module")
def exported(ours, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    save(ours, folder, extra_files={"README.md": "A model card.\n"})
    return folder


def test_export_load_export_is_byte_identical(ours, exported, tmp_path):
    back = load(exported)
    for ours_part, back_part in zip(ours[:3], back[:3], strict=True):
        assert_same(ours_part, back_part)
    assert back.schedule == ours.schedule
    texts = ["a photo of a blue triangle", "", "red?"]
    np.testing.assert_array_equal(back.tokenizer(texts), ours.tokenizer(texts))
    save(back, tmp_path / "again", extra_files={"README.md": "A model card.\n"})
    assert contents(tmp_path / "again") == contents(exported)


@pytest.mark.parametrize("name", PRESETS)
def test_configs_of_presets_round_trip(name):
    preset = PRESETS[name]
    assert hf_config.read_unet(hf_config.write_unet(preset.unet), "f") == preset.unet
    assert hf_config.read_vae(hf_config.write_vae(preset.vae), "f") == preset.vae
    text = hf_config.write_text_encoder(preset.text_encoder)
    assert hf_config.read_text_encoder(text, "f") == preset.text_encoder


def test_torch_libraries_load_an_export_without_a_complaint(ours, exported):
    report: dict = {"output_loading_info": True}
    their_unet, info = diffusers.UNet2DConditionModel.from_pretrained(exported / "unet", **report)
    assert not any(info.values()), info
    their_vae, info = diffusers.AutoencoderKL.from_pretrained(exported / "vae", **report)
    assert not any(info.values()), info
    assert their_vae.config.scaling_factor == 0.7
    theirs, info = transformers.CLIPTextModel.from_pretrained(exported / "text_encoder", **report)
    assert not any(info.values()), info
    scheduler = diffusers.DDIMScheduler.from_pretrained(exported / "scheduler")
    assert scheduler.config.prediction_type == "sample"
    assert scheduler.config.rescale_betas_zero_snr
    tokenizer = transformers.CLIPTokenizer.from_pretrained(exported / "tokenizer")
    text = "a photo of a blue triangle"
    ids = ours.tokenizer([text])
    padded = tokenizer([text], padding="max_length", max_length=16, truncation=True)
    assert padded["input_ids"] == ids.tolist()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).last_hidden_state
    assert relative_error(run(CLIPText.__call__, ours.text_encoder, ids), expected) <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(dtype, ours, tmp_path):
    save(Pretrained(vae=ours.vae), tmp_path / "half", dtype=dtype)
    stored = safetensors.torch.load_file(tmp_path / "half" / "vae" / WEIGHTS)
    assert {t.dtype for t in stored.values()} == {getattr(torch, dtype)}
    back = tensors(load(tmp_path / "half", ("vae",)).vae)
    for path, array in tensors(ours.vae).items():
        assert back[path].dtype == np.float32
        np.testing.assert_array_equal(back[path], array.astype(dtype).astype(np.float32))


def test_overflow_of_float16_is_refused_and_leaves_nothing(tmp_path):
    config = VAEConfig(block_out_channels=(4,), norm_groups=2)
    big = random_ours(lambda rngs: VAE(config, rngs=rngs))
    big.quant_conv.bias[...] = jnp.full((8,), 1e6)
    with pytest.raises(UserError, match="quant_conv.bias overflows float16"):
        save(Pretrained(vae=big), tmp_path / "x", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_failure_in_the_middle_keeps_the_earlier_export(ours, exported, tmp_path, monkeypatch):
    target = tmp_path / "model"
    shutil.copytree(exported, target)
    before = contents(target)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained.tensors, "write", full_disk)
    with pytest.raises(UserError, match="the disk is full"):
        save(ours, target, extra_files={"README.md": "new"})
    assert contents(target) == before
    assert os.listdir(tmp_path) == ["model"]


def test_reads_shards_and_variants(tmp_path):
    oracle = tiny_unet()
    whole = load(write(tmp_path / "whole", unet=oracle), ("unet",)).unet
    root = write(tmp_path / "many")
    oracle.save_pretrained(root / "unet", max_shard_size="20KB")
    assert len(list((root / "unet").glob("*.safetensors"))) > 2
    assert_same(load(root, ("unet",)).unet, whole)
    tiny_unet().half().save_pretrained(root / "unet", variant="fp16")
    assert_same(load(root, ("unet",)).unet, whole)  # the plain files come first
    half = tensors(load(root, ("unet",), variant="fp16").unet)
    for path, array in tensors(whole).items():
        np.testing.assert_array_equal(half[path], array.astype(np.float16).astype(np.float32))
    only = write(tmp_path / "only")
    tiny_unet().half().save_pretrained(only / "unet", variant="fp16", max_shard_size="20KB")
    assert_same(load(only, ("unet",)).unet, load(root, ("unet",), variant="fp16").unet)
    vae((8,), norm_num_groups=4).save_pretrained(only / "vae", variant="bf16")
    for call in (describe, load):
        with pytest.raises(UserError, match="bf16: there is no such variant, but fp16"):
            call(only, ("unet",), variant="bf16")
    shard = sorted((only / "unet").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: this shard is missing"):
        load(only, ("unet",))


def rewrite(path: Path, change) -> None:
    stored = change(safetensors.numpy.load_file(path))
    safetensors.numpy.save_file(stored, path, metadata={"format": "pt"})


def test_reads_old_attention_names(tmp_path):
    root = write(tmp_path, vae=vae((8,), norm_num_groups=4))
    new = load(root, ("vae",)).vae
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(stored):
        for ours_, theirs in names.items():
            stored = {name.replace(f".{ours_}.", f".{theirs}."): t for name, t in stored.items()}
        attention = {n: t for n, t in stored.items() if n.endswith(("query.weight", "key.weight"))}
        assert len(attention) == 4
        return stored | {n: t[:, :, None, None] for n, t in attention.items()}

    rewrite(root / "vae" / WEIGHTS, old)
    assert_same(load(root, ("vae",)).vae, new)


def test_reads_published_clip_names(tmp_path):
    root = write(tmp_path, text_encoder=text_encoder(num_hidden_layers=1, num_attention_heads=2))
    plain = load(root, ("text_encoder",)).text_encoder

    def published(stored):
        stored = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in stored.items()}
        stored |= {"text_model.embeddings.position_ids": np.arange(77)[None]}
        # Of a CLIPTextModelWithProjection
        return stored | {"text_projection.weight": np.ones((16, 32), np.float32)}

    rewrite(root / "text_encoder" / "model.safetensors", published)
    assert_same(load(root, ("text_encoder",)).text_encoder, plain)


def test_widened_conv_in_keeps_the_output(tmp_path):
    root = write(tmp_path, unet=tiny_unet(in_channels=4))
    narrow = load(root, ("unet",)).unet
    wide = load(root, ("unet",), widen_conv_in=True).unet
    assert wide.config.in_channels == 8
    x, context = normal(1, 4, 4, 4), normal(1, 3, 12)
    twice = run(UNet.__call__, wide, np.concatenate([x, x], -1), np.array([7]), context)
    once = run(UNet.__call__, narrow, x, np.array([7]), context)
    assert relative_error(twice, once) <= 1e-5
    save(Pretrained(unet=wide), tmp_path / "wide")
    assert_same(load(tmp_path / "wide", ("unet",), widen_conv_in=True).unet, wide)
    inpainting = write(tmp_path / "nine", unet=tiny_unet(in_channels=9))
    with pytest.raises(UserError, match="in_channels=9 is neither one latent nor two"):
        load(inpainting, ("unet",), widen_conv_in=True)


def test_one_error_lists_every_tensor_of_every_component_that_does_not_fit(tmp_path):
    networks = {"unet": tiny_unet(), "vae": vae((8,), norm_num_groups=4)}
    networks["text_encoder"] = text_encoder(num_hidden_layers=1, num_attention_heads=2)
    root = write(tmp_path, **networks)

    def spoil(stored):
        del stored["conv_out.bias"], stored["mid_block.resnets.0.norm1.weight"]
        stored["conv_in.weight"] = stored["conv_in.weight"][:, :3]
        return stored | {"lora.down": np.zeros(3, np.float32)}

    rewrite(root / "unet" / WEIGHTS, spoil)
    rewrite(root / "text_encoder" / "model.safetensors", lambda _: {"x": np.zeros(3, np.float32)})
    with pytest.raises(UserError) as error:
        load(root, ("unet", "vae", "text_encoder"))
    message = str(error.value)
    assert "\n" not in message
    assert "missing: 2 (conv_out.bias, mid_block.resnets.0.norm1.weight)" in message
    assert "unexpected: 1 (lora.down)" in message
    assert "conv_in.weight [8, 3, 3, 3] instead of [8, 4, 3, 3]" in message
    names = [name for name, _ in networks["text_encoder"].named_parameters()]
    assert f"{root / 'text_encoder'}: missing: {len(names)} (" in message
    assert all(f"text_model.{name.removeprefix('text_model.')}" in message for name in names)
    assert "unexpected: 1 (text_model.x)" in message
    assert str(root / "vae") not in message


DAMAGE = {
    "truncated": lambda good, header: good[:-10],
    "header cut": lambda good, header: good[: header // 2],
    "empty": lambda good, header: b"",
    "not safetensors": lambda good, header: b"PK\3\4" * 100,
    "longer": lambda good, header: good + b"\0" * 8,
    "header not JSON": lambda good, header: good[:8] + b"?" * header + good[8 + header :],
    "offsets": lambda good, header: good.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
    "shape": lambda good, header: good.replace(b'"shape":[', b'"shape":[9', 1)[: len(good)],
}


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_refused(kind, tmp_path):
    root = write(tmp_path, unet=tiny_unet())
    path = root / "unet" / WEIGHTS
    stored = safetensors.torch.load_file(path)
    stored["conv_in.weight"] = stored["conv_in.weight"].to(kind)
    safetensors.torch.save_file(stored, path)
    with pytest.raises(
        UserError, match=rf"{WEIGHTS}: conv_in.weight is stored as (F8|I8).* float16"
    ):
        load(root, ("unet",))


def test_a_tokenizer_of_another_encoder_is_refused(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 77}))
    with pytest.raises(UserError, match="has 16 positions, but model_max_length .* is 77"):
        load(tmp_path / "m", ("text_encoder", "tokenizer"))
    words = [a + b for a in "abcdefghij" for b in "klmnopqrst"]
    train_tokenizer([" ".join(words)], 601, 16).save(path.parent)
    with pytest.raises(UserError, match="has 600 tokens, but the tokenizer .* 601: use the token"):
        load(tmp_path / "m", ("text_encoder", "tokenizer"))


def test_pickles_are_refused(tmp_path):
    root = write(tmp_path)
    tiny_unet().save_pretrained(root / "unet", safe_serialization=False)
    (tmp_path / "v1-5.ckpt").write_bytes(b"never looked at")
    for call in (describe, load):
        with pytest.raises(UserError, match=r"diffusion_pytorch_model.bin: .* safetensors"):
            call(root, ("unet",))
        with pytest.raises(UserError, match=r"v1-5.ckpt: pickled .* convert .* safetensors"):
            call(tmp_path / "v1-5.ckpt", ("unet",))


def test_only_what_is_asked_for_must_exist(exported, tmp_path):
    shutil.copytree(exported / "vae", tmp_path / "m" / "vae")
    shutil.copy(exported / "model_index.json", tmp_path / "m")
    part = load(tmp_path / "m", ("vae",))
    assert part.vae is not None
    assert set(part[:1] + part[2:]) == {None}
    (tmp_path / "m" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    for call in (describe, load):
        with pytest.raises(UserError, match="tokenizer: no such folder: .* is a FluxPipeline and"):
            call(tmp_path / "m", ("vae", "tokenizer"))


@pytest.mark.parametrize(
    ("read", "values", "message"),
    [
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supp"),
        ("unet", {"layers_per_block": [1, 2, 2, 2]}, "layers_per_block"),
        ("unet", {"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ("unet", {"up_block_types": ["UpBlock2D"] * 4}, "must mirror"),
        ("unet", {"attention_head_dim": 7}, "7 does not divide 320"),
        ("unet", {"norm_num_groups": 33}, "33 does not divide 320"),
        ("unet", {"a_new_option": 3}, "a_new_option=3"),
        ("unet", {"_class_name": "SD3Transformer2DModel"}, "SD3Transformer2DModel"),
        ("unet", {"in_channels": "4"}, "in_channels='4': must be int"),
        ("unet", {"in_channels": 10**30}, "in_channels=10+: must be at least 1 and at most"),
        ("unet", {"block_out_channels": [0, 8, 8, 8]}, "block_out_channels"),
        ("unet", {"block_out_channels": []}, "levels"),
        ("unet", {"attention_head_dim": [8]}, "attention_head_dim has 1 levels instead of 4"),
        ("unet", {"down_block_types": 5}, "down_block_types holds 5"),
        ("unet", {"down_block_types": [[], 1, 2, 3]}, "down_block_types holds"),
        ("unet", {"norm_eps": 0}, "norm_eps=0.0: must be at least"),
        ("vae", {"scaling_factor": 0}, "scaling_factor=0.0: must be at least 0.0001"),
        ("vae", {"scaling_factor": 1e-9}, "scaling_factor=1e-09"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor=nan: must be float"),
        ("vae", {"scaling_factor": None}, "scaling_factor=None"),
        ("text_encoder", {"layer_norm_eps": -1e-5}, "layer_norm_eps=-1e-05"),
        ("text_encoder", {"num_attention_heads": 0}, "num_attention_heads=0"),
        ("text_encoder", {"hidden_act": ["gelu"]}, "hidden_act"),
        ("schedule", {"beta_start": -0.1}, "beta_start=-0.1: must be at least"),
        ("schedule", {"trained_betas": [0.1]}, "trained_betas"),
        ("vae", {"use_quant_conv": False}, "use_quant_conv"),
        ("vae", {"_class_name": "VQModel"}, "VQModel"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("schedule", {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ("schedule", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch.* not supp"),
        (
            "unet",
            {"transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time"},
            "is of Stable Diffusion XL: use Stable Diffusion 1 or 2",
        ),
    ],
)
def test_what_our_modules_cannot_do_is_named(read, values, message):
    with pytest.raises(UserError, match=message) as error:
        getattr(hf_config, f"read_{read}")(values, "some/config.json")
    assert "some/config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_options_that_are_nothing_are_off():
    known = {"in_channels": 8, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}
    known |= {"use_linear_projection": True, "only_cross_attention": [False] * 4}
    nothing = {"new_a": [], "new_b": "", "new_c": {}, "new_d": [None, False], "new_e": 0}
    assert hf_config.read_unet(known | nothing, "f") == PRESETS["sd2"].unet
    assert hf_config.read_schedule({"trained_betas": []}, "f").beta_end == 0.02


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


NO_CONFIG = (b"[" * 100_000, b'{"scaling_factor": NaN}', b"7", b'{"a": 1')
NO_TOKENIZER = (
    ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
    ("tokenizer_config.json", {"bos_token": {"content": [1]}}),
    ("vocab.json", {"a": "b"}),
)
PART_OF = {
    "unet/config.json": "unet",
    f"unet/{WEIGHTS}": "unet",
    "text_encoder/model.safetensors": "text_encoder",
    "tokenizer/vocab.json": "tokenizer",
    "tokenizer/merges.txt": "tokenizer",
    "tokenizer/tokenizer_config.json": "tokenizer",
    "scheduler/scheduler_config.json": "schedule",
}


def test_a_file_that_is_damaged_or_something_else_is_named(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "m")

    def refused(part, file, bad, says="", named=None):
        path, good = folder / file, (folder / file).read_bytes()
        assert bad != good
        path.write_bytes(bad)
        with pytest.raises(UserError, match=f"{named or path}.*{says}") as error:
            load(folder, (part,))
        assert "\n" not in str(error.value)
        path.write_bytes(good)

    good = (folder / "vae" / WEIGHTS).read_bytes()
    for damage in DAMAGE.values():
        refused("vae", f"vae/{WEIGHTS}", damage(good, int.from_bytes(good[:8], "little")))
    for bad in NO_CONFIG:
        refused("vae", "vae/config.json", bad)
    for name, value in NO_TOKENIZER:
        bad = json.loads((folder / "tokenizer" / name).read_bytes()) | value
        refused("tokenizer", f"tokenizer/{name}", json.dumps(bad).encode(), "", folder)
    for file, part in PART_OF.items():
        refused(part, file, LFS, ": a git-lfs pointer.* `git lfs pull`")
        refused(part, file, HTML, ": an HTML page.*again")


def test_published_configs_of_stable_diffusion():
    """The keys as the published files have them, historical noise included."""
    sd2 = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.8.0",
        "attention_head_dim": [5, 10, 20, 20],
        "center_input_sample": False,
        "cross_attention_dim": 1024,
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "mid_block_scale_factor": 1,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "sample_size": 96,
        "use_linear_projection": True,
        "upcast_attention": True,
    }
    expected = PRESETS["sd2"].unet
    assert hf_config.read_unet(sd2 | {"in_channels": 8}, "f") == expected
    sd1 = {"attention_head_dim": 8, "cross_attention_dim": 768, "in_channels": 8}
    assert hf_config.read_unet(sd1, "f") == PRESETS["sd15"].unet
    pndm = {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert hf_config.read_schedule(pndm, "f") == DiffusionConfig(
        prediction_type="epsilon", timestep_spacing="leading", rescale_betas_zero_snr=False
    )


def test_every_array_is_placed_by_the_caller(exported):
    mesh = Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    seen = {}

    def place(path, array):
        seen[path] = array.shape
        sharding = NamedSharding(mesh, P(*[None] * (array.ndim - 1), "fsdp"))
        return jax.device_put(array, sharding)

    placed = load(exported, ("unet", "vae"), place=place)
    assert "unet/down_blocks/1/attentions/0/transformer_blocks/1/attn2/to_k/kernel" in seen
    assert seen["vae/quant_conv/kernel"] == (1, 1, 32, 32)
    assert len(seen) == len(tensors(placed.unet)) + len(tensors(placed.vae))
    for leaf in jax.tree.leaves(nnx.state(placed.unet)):
        assert leaf.sharding.mesh == mesh


def test_host_memory_holds_a_few_tensors_at_most(tmp_path):
    """NumPy's arrays are traced, JAX's are not: the parameters themselves come on top."""
    config = VAEConfig(block_out_channels=(32, 64, 128), norm_groups=8, layers_per_block=3)
    network = random_ours(lambda rngs: VAE(config, rngs=rngs))
    total = sum(array.nbytes for array in tensors(network).values())
    save(Pretrained(vae=network), tmp_path / "m")
    load(tmp_path / "m", ("vae",))  # imports and caches
    tracemalloc.start()
    load(tmp_path / "m", ("vae",))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"peak {peak / total:.2f} of {total} bytes")
    assert peak <= 0.3 * total


@pytest.mark.parametrize("source", ["/no/such/folder", "gs-bucket"])
def test_unknown_sources_are_named(source):
    with pytest.raises(UserError, match=f"{source}: no such folder") as error:
        load(source, ("vae",))
    assert "\n" not in str(error.value)
