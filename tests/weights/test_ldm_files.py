"""One file in Stable Diffusion's original layout against the folder of the same model.

The file is made by naming diffusers' tensors as CompVis did, and diffusers' own conversion of that
file is the oracle of the names.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_oracles as oracles
from diffusers.loaders import single_file_utils
from flax import nnx
from safetensors.torch import save_file

from segdiff_jax.config import Config
from segdiff_jax.errors import UserError
from segdiff_jax.text.tokenizer import train_tokenizer
from segdiff_jax.training import origin
from segdiff_jax.weights.pretrained import describe, load

NETWORKS = ("unet", "vae", "text_encoder")

# Names of diffusers and transformers → those of CompVis and OpenCLIP, for two levels of two layers.
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
RESNET |= {"conv_shortcut": "skip_connection"}
UNET = [
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"\.resnets\.(\d)", r".\1.0"),
    (r"\.attentions\.(\d)", r".\1.1"),
    (r"^down_blocks\.(\d)\.(\d)", lambda m: f"input_blocks.{3 * int(m[1]) + int(m[2]) + 1}"),
    (r"^up_blocks\.(\d)\.(\d)", lambda m: f"output_blocks.{3 * int(m[1]) + int(m[2])}"),
    (r"^down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.3.0.op"),
    (r"^up_blocks\.0\.upsamplers\.0", "output_blocks.2.1"),
    *(
        (rf"^((?:in|out)put_blocks\.\d+\.0|middle_block\.[02])\.{theirs}\.", rf"\1.{original}.")
        for theirs, original in RESNET.items()
    ),
]
VAE = [
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{1 + int(m[1])}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0", "proj_out"),
    (r"down_blocks\.(\d)", r"down.\1"),
    (r"up_blocks\.(\d)", lambda m: f"up.{1 - int(m[1])}"),
    (r"resnets", "block"),
    (r"(down|up)samplers\.0", r"\1sample"),
]
OPEN_CLIP = [
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^final_layer_norm", "ln_final"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"self_attn", "attn"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
]


def renamed(tensors, rules):
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor.contiguous()
    return found


def vae_file(tensors):
    found = renamed(tensors, VAE)
    attention = re.compile(r".*mid\.attn_1\.(q|k|v|proj_out)\.weight")
    return {n: t[..., None, None] if attention.fullmatch(n) else t for n, t in found.items()}


def open_clip_names(tensors):
    found = renamed(tensors, OPEN_CLIP)
    for name in [name for name in found if "q_proj" in name]:
        parts = [found.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return found


def open_clip_file(tensors):
    """In OpenCLIP's names, with a last layer that Stable Diffusion 2 does not read."""
    found = open_clip_names(tensors)
    extra = {
        n.replace("blocks.1.", "blocks.2."): t + 1 for n, t in found.items() if "blocks.1." in n
    }
    width = found["ln_final.bias"].shape[0]
    return (
        found | extra | {"text_projection": torch.ones(width, width), "logit_scale": torch.ones(())}
    )


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def both(request, tmp_path_factory) -> tuple[Path, Path]:
    """A folder, and the same networks in one file beside no tokenizer."""
    root = tmp_path_factory.mktemp(request.param)
    two = request.param == "sd2"
    widths = (64, 128) if two else (32, 64)
    unet = oracles.unet(
        (True, False),
        block_out_channels=widths,
        attention_head_dim=[1, 2] if two else 8,
        cross_attention_dim=64,
        use_linear_projection=two,
    )
    vae = oracles.vae((32, 64), layers_per_block=2, latent_channels=4)
    text = oracles.text_encoder(
        vocab_size=600,
        hidden_size=64,
        num_attention_heads=1,
        num_hidden_layers=2,
        max_position_embeddings=16,
        hidden_act="gelu" if two else "quick_gelu",
    )
    folder = oracles.write(root / "folder", unet=unet, vae=vae, text_encoder=text)
    train_tokenizer(["a photo of a sky"], 600, 16).save(folder / "tokenizer")

    words = {n.removeprefix("text_model."): t for n, t in text.state_dict().items()}
    words = {name: tensor for name, tensor in words.items() if not name.endswith("position_ids")}
    parts = {
        "model.diffusion_model.": renamed(unet.state_dict(), UNET),
        "first_stage_model.": vae_file(vae.state_dict()),
        "cond_stage_model.model." if two else "cond_stage_model.transformer.text_model.": (
            open_clip_file(words) if two else renamed(words, ())
        ),
    }
    checkpoint = {prefix + n: t for prefix, part in parts.items() for n, t in part.items()}
    checkpoint["model_ema.decay"] = torch.zeros(())
    save_file(checkpoint, root / "model.safetensors")

    same_tensors(
        single_file_utils.convert_ldm_unet_checkpoint(checkpoint, unet.config), unet.state_dict()
    )
    same_tensors(
        single_file_utils.convert_ldm_vae_checkpoint(checkpoint, vae.config), vae.state_dict()
    )
    if two:
        theirs = single_file_utils.convert_open_clip_checkpoint(text, checkpoint)
        theirs = {n: t for n, t in theirs.items() if "layers.2." not in n and "projection" not in n}
    else:
        theirs = single_file_utils.convert_ldm_clip_checkpoint(checkpoint)
    same_tensors({n.removeprefix("text_model."): t for n, t in theirs.items()}, words)
    return folder, root / "model.safetensors"


def same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def same_networks(ours, theirs):
    assert ours.config == theirs.config
    a, b = (dict(nnx.to_flat_state(nnx.state(network))) for network in (ours, theirs))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path][...], b[path][...], err_msg=str(path))


def test_the_networks_are_those_of_the_folder(both):
    folder, file = both
    wanted = load(folder, NETWORKS)
    found = load(file, NETWORKS)
    assert found.schedule is found.tokenizer is None
    for ours, theirs in zip(found[:3], wanted[:3], strict=True):
        same_networks(ours, theirs)
    assert load(file, ("unet",), widen_conv_in=True).unet.config.in_channels == 8


def test_the_tokenizer_comes_from_beside_the_file_or_from_where_it_is_said(both, tmp_path):
    folder, file = both
    parts = ("text_encoder", "tokenizer")
    with pytest.raises(UserError, match=r"one file holds no tokenizer.*config\.init_tokenizer"):
        load(file, parts)
    ids = load(folder, parts).tokenizer(["a photo of a sky"])
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    beside = shutil.copy(file, tmp_path / "m.safetensors")
    for source, given in ((beside, ""), (file, folder / "tokenizer"), (file, folder)):
        found = load(source, parts, tokenizer=str(given)).tokenizer
        np.testing.assert_array_equal(found(["a photo of a sky"]), ids)


def test_a_training_can_begin_from_a_file(both, tmp_path, caplog):
    folder, file = both
    config = Config(init_from=str(file), init_tokenizer=str(folder))
    config.data.source, config.data.image_size = "scenes", (16, 16)
    origin.check(config, str(tmp_path / "run"))
    assert "nothing says what its UNet was trained to predict" in caplog.text
    config.init_tokenizer = ""
    with pytest.raises(UserError, match="holds no tokenizer"):
        origin.check(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("layers", "prefix", "extra"),
    [
        # diffusers' script back to the original layout leaves out the layer that nobody reads.
        (23, "cond_stage_model.model.", ()),
        (1, "cond_stage_model.transformer.", ()),  # as transformers 4.0 named them
        (1, "cond_stage_model.transformer.text_model.", ("text_projection.weight",)),
    ],
)
def test_text_encoders_as_other_programs_write_them(tmp_path, layers, prefix, extra):
    oracle = oracles.text_encoder(
        hidden_size=64, intermediate_size=8, num_attention_heads=1, num_hidden_layers=layers
    )
    oracle.config.hidden_act = "gelu" if layers > 1 else "quick_gelu"
    folder = oracles.write(tmp_path / "folder", text_encoder=oracle)
    words = {n.removeprefix("text_model."): t for n, t in oracle.state_dict().items()}
    words = {n: t for n, t in words.items() if not n.endswith("position_ids")}
    words = open_clip_names(words) if layers > 1 else words
    words |= {name: torch.ones(64, 64) for name in extra}
    save_file({prefix + n: t.contiguous() for n, t in words.items()}, tmp_path / "m.safetensors")
    same_networks(
        load(tmp_path / "m.safetensors", ("text_encoder",)).text_encoder,
        load(folder, ("text_encoder",)).text_encoder,
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conditioner.embedders.0.x", "Stable Diffusion XL"),
        ("model.diffusion_model.label_emb.0.0.weight", "Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.x", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.proj.weight", "Flux"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "is a LoRA: .* whole model"),
        ("unet.down_blocks.0.attentions.0.to_q.lora.down.weight", "is a LoRA"),
        ("base_model.model.mid_block.to_q.lora_A.weight", "is a LoRA"),
        ("control_model.input_hint_block.0.weight", "is a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "is a ControlNet"),
        ("down_blocks.0.resnets.0.conv1.weight", "is one network alone"),
        ("encoder.conv_in.weight", "is one network alone"),
        ("input_blocks.0.0.weight", "is one network alone"),
        ("model.diffusion_model.x", r"lacks tensors of Stable Diffusion 1 and 2"),
        ("x", r"has no tensors model\.diffusion_model\.\*, so no unet"),
    ],
)
def test_files_of_other_models_are_named(tmp_path, name, message):
    save_file({name: torch.zeros(2)}, tmp_path / "m.safetensors")
    for call in (describe, load):
        with pytest.raises(UserError, match=f"m.safetensors: .*{message}") as error:
            call(tmp_path / "m.safetensors", ("unet",))
        assert "\n" not in str(error.value)
