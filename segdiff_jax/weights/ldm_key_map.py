"""One file in Stable Diffusion's original layout (CompVis, LDM) → what a folder would hold.

Such a file has all networks under prefixes and no config, so these are read off the shapes. Names
become those of diffusers and transformers, from which `key_map` goes on:

    model.diffusion_model.              UNet: one list of blocks down, one up, over all levels
    first_stage_model.                  VAE: the levels of its decoder counted from the bottom
    cond_stage_model.transformer.       CLIP of SD 1, named as transformers does, or did at first
    cond_stage_model.model.             CLIP of SD 2, named as OpenCLIP does, with q, k, v in one
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping

from segdiff_jax.errors import UserError
from segdiff_jax.models.clip_text import CLIPTextConfig
from segdiff_jax.models.unet import UNetConfig
from segdiff_jax.models.vae import VAEConfig
from segdiff_jax.weights.tensors import Entry

Tensors = Mapping[str, Entry]  # by name, without the prefix
Named = Iterator[tuple[str, Entry]]  # by the names of diffusers and transformers
Config = UNetConfig | VAEConfig | CLIPTextConfig

_MODELS = {  # by names that tensors of theirs have, and none of Stable Diffusion 1 and 2
    r"^conditioner\.embedders\.|\blabel_emb\.": "Stable Diffusion XL",
    r"\bjoint_blocks\.": "Stable Diffusion 3",
    r"\b(double_blocks|single_transformer_blocks|add_q_proj)\.": "Flux or another transformer",
}
_PARTS = {  # what goes beside a model, or is a part of one: looked for where there is no whole
    r"\blora_|\.lora[._]|\.(hada|lokr)_": "a LoRA",
    r"^control_model\.|^controlnet_|\binput_hint_block\.": "a ControlNet",
    r"^((down|up|input)_blocks|mid_block|encoder|decoder|text_model)\.": "one network alone",
}
_SD2_LAYERS = 23  # of its text encoder
_CLIP_HEAD = 64  # channels of a head in every CLIP text encoder, and in the UNet of SD 2

_UNET = (
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.skip_connection\.", ".conv_shortcut."),
)
_VAE = (
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
)
_OPEN_CLIP = (
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)


def read(entries: list[Entry], component: str, file: str) -> tuple[Config, list[Entry]]:
    """Return the config of a component of `file` and its tensors, named as in a folder's files.

    Raises `UserError` if the file has no such component.
    """
    if model := _recognised(entries, _MODELS):
        raise UserError(f"{file}: is of {model}: use Stable Diffusion 1 or 2")
    for prefix, (rename, config) in _READERS[component].items():
        found = {e.name.removeprefix(prefix): e for e in entries if e.name.startswith(prefix)}
        if found:
            try:
                tensors = {name: e._replace(called=name) for name, e in rename(found)}
                return config(tensors), list(tensors.values())
            except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
                raise UserError(
                    f"{file}: {prefix}* lacks tensors of Stable Diffusion 1 and 2 ({error}): "
                    "fetch it again, or use another model"
                ) from error
    if part := _recognised(entries, _PARTS):
        raise UserError(
            f"{file}: is {part}: give the whole model that it belongs to, as a file in Stable "
            "Diffusion's original layout or as a folder"
        )
    raise UserError(
        f"{file}: has no tensors {' or '.join(f'{p}*' for p in _READERS[component])}, so no "
        f"{component}: give a whole file in Stable Diffusion's original layout, or a folder"
    )


def _recognised(entries: list[Entry], kinds: Mapping[str, str]) -> str | None:
    found = (kind for name, kind in kinds.items() if any(re.search(name, e.name) for e in entries))
    return next(found, None)


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _count(tensors: Tensors, pattern: str) -> int:
    """Count the numbers that stand in the place of `(\d+)` in names that begin with `pattern`."""
    found = (re.match(pattern, name) for name in tensors)
    return len({match[1] for match in found if match})


def _unet_tensors(tensors: Tensors) -> Named:
    # Going down, a level is its resnets and a strided convolution, but for the last level. Going up
    # it has one resnet more, so as many blocks.
    halving = (re.match(r"input_blocks\.(\d+)\.0\.op\.", name) for name in tensors)
    blocks = _count(tensors, r"input_blocks\.(\d+)\.")
    per_level = min((int(match[1]) for match in halving if match), default=blocks)

    def place(match: re.Match[str]) -> str:
        way, block, part, rest = match[1], int(match[2]), int(match[3]), match[4]
        down = way == "input"
        level, layer = divmod(block - down, per_level)
        name = f"{'down' if down else 'up'}_blocks.{level}"
        if rest.startswith("op."):
            return f"{name}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        if rest.startswith("conv."):  # after the transformer, where the level has one
            return f"{name}.upsamplers.0.{rest}"
        return f"{name}.{'attentions' if part else 'resnets'}.{layer}.{rest}"

    for name, entry in tensors.items():
        renamed = _rename(name, _UNET)
        yield re.sub(r"^(input|output)_blocks\.(\d+)\.(\d+)\.(.*)", place, renamed), entry


def _unet_config(tensors: Tensors) -> UNetConfig:
    levels = range(_count(tensors, r"down_blocks\.(\d+)\."))
    widths = tuple(tensors[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels)
    middle = "mid_block.attentions.0"
    linear = len(tensors[f"{middle}.proj_in.weight"].shape) == 2
    return UNetConfig(
        in_channels=tensors["conv_in.weight"].shape[1],
        out_channels=tensors["conv_out.weight"].shape[0],
        block_out_channels=widths,
        cross_attention=tuple(
            f"down_blocks.{i}.attentions.0.norm.weight" in tensors for i in levels
        ),
        layers_per_block=_count(tensors, r"down_blocks\.0\.resnets\.(\d+)\."),
        transformer_layers=_count(tensors, rf"{re.escape(middle)}\.transformer_blocks\.(\d+)\."),
        # SD 1 has eight heads, of any width; SD 2 heads of one width, and linear projections.
        heads=tuple(width // _CLIP_HEAD if linear else 8 for width in widths),
        cross_attention_dim=tensors[f"{middle}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        use_linear_projection=linear,
    )


def _vae_tensors(tensors: Tensors) -> Named:
    top = _count(tensors, r"decoder\.up\.(\d+)\.") - 1
    kinds = {"block": "resnets", "upsample": "upsamplers.0"}

    def place(match: re.Match[str]) -> str:
        return f"decoder.up_blocks.{top - int(match[1])}.{kinds[match[2]]}."

    for name, entry in tensors.items():
        if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
            renamed = re.sub(r"^decoder\.up\.(\d+)\.(block|upsample)\.", place, name)
            yield _rename(renamed, _VAE), entry


def _vae_config(tensors: Tensors) -> VAEConfig:
    levels = range(_count(tensors, r"encoder\.down_blocks\.(\d+)\."))
    return VAEConfig(
        in_channels=tensors["encoder.conv_in.weight"].shape[1],
        out_channels=tensors["decoder.conv_out.weight"].shape[0],
        latent_channels=tensors["post_quant_conv.weight"].shape[0],
        block_out_channels=tuple(
            tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in levels
        ),
        layers_per_block=_count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        mid_attention="encoder.mid_block.attentions.0.group_norm.weight" in tensors,
    )


def _clip_tensors(tensors: Tensors) -> Named:
    yield from tensors.items()


def _open_clip_tensors(tensors: Tensors) -> Named:
    layers = _count(tensors, r"transformer\.resblocks\.(\d+)\.")
    # The last layer, where the file has it, is dropped: SD 2 reads what comes out before it.
    layers -= layers != _SD2_LAYERS
    unused = (f"transformer.resblocks.{layers}.", "text_projection", "logit_scale", "attn_mask")
    for name, entry in tensors.items():
        if name.startswith(unused):
            continue
        renamed = _rename(name, _OPEN_CLIP)
        fused = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", renamed)
        if not fused:
            yield renamed, entry
            continue
        third = entry.shape[0] // 3
        for i, part in enumerate("qkv"):
            shape, rows = (third, *entry.shape[1:]), slice(i * third, (i + 1) * third)
            named = f"{fused[1]}.self_attn.{part}_proj.{fused[2]}"
            yield named, entry._replace(shape=shape, rows=rows)


def _clip_config(tensors: Tensors, activation: str) -> CLIPTextConfig:
    tokens, width = tensors["embeddings.token_embedding.weight"].shape
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_count(tensors, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=width // _CLIP_HEAD,
        max_position_embeddings=tensors["embeddings.position_embedding.weight"].shape[0],
        hidden_act=activation,
    )


_SD1_TEXT = _clip_tensors, functools.partial(_clip_config, activation="quick_gelu")
_SD2_TEXT = _open_clip_tensors, functools.partial(_clip_config, activation="gelu")
# By component, the prefixes that it may have, and how its tensors are renamed and its config read.
_READERS: dict[str, dict[str, tuple[Callable[[Tensors], Named], Callable[[Tensors], Config]]]] = {
    "unet": {"model.diffusion_model.": (_unet_tensors, _unet_config)},
    "vae": {"first_stage_model.": (_vae_tensors, _vae_config)},
    "text_encoder": {
        "cond_stage_model.transformer.text_model.": _SD1_TEXT,
        "cond_stage_model.transformer.": _SD1_TEXT,
        "cond_stage_model.model.": _SD2_TEXT,
    },
}
