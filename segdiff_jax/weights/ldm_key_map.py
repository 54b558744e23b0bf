"""One file in Stable Diffusion's original layout (CompVis, LDM) → what a folder would hold.

Such a file has all networks under prefixes and no config, so these are read off the shapes. Names
become those of diffusers and transformers, from which `key_map` goes on:

    model.diffusion_model.              UNet: one list of blocks down, one up, over all levels
    first_stage_model.                  VAE: the levels of its decoder counted from the bottom
    cond_stage_model.transformer.       CLIP of SD 1, named as transformers does, or did at first
    cond_stage_model.model.             CLIP of SD 2, named as OpenCLIP does, with q, k, v in one
"""

import re
from collections.abc import Callable, Iterator, Mapping

from segdiff_jax.errors import UserError
from segdiff_jax.models.clip_text import CLIPTextConfig
from segdiff_jax.models.unet import UNetConfig
from segdiff_jax.models.vae import VAEConfig
from segdiff_jax.weights.tensors import Entry

Tensors = Mapping[str, Entry]  # by their names without the prefix
Config = UNetConfig | VAEConfig | CLIPTextConfig

_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": (
        "cond_stage_model.transformer.text_model.",
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
    ),
}
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
    (r"^", "text_model."),
)


def read(entries: list[Entry], component: str, file: str) -> tuple[Config, list[Entry]]:
    """Return the config of a component of `file` and its tensors, named as in a folder's files.

    Raises `UserError` if the file has no such component.
    """
    if model := _recognised(entries, _MODELS):
        raise UserError(f"{file}: is of {model}: use Stable Diffusion 1 or 2")
    for prefix in _PREFIXES[component]:
        tensors = {e.name.removeprefix(prefix): e for e in entries if e.name.startswith(prefix)}
        if tensors:
            config, renamed = _READERS[prefix]
            try:
                return config(tensors), list(renamed(tensors))
            except (KeyError, IndexError, ValueError) as error:
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
        f"{file}: has no tensors {' or '.join(f'{p}*' for p in _PREFIXES[component])}, so no "
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


def _layers(tensors: Tensors) -> int:
    """Count the resnets per level going down: after them there is a strided convolution, if any."""
    halving = (re.match(r"input_blocks\.(\d+)\.0\.op\.", name) for name in tensors)
    blocks = _count(tensors, r"input_blocks\.(\d+)\.")
    return min((int(match[1]) for match in halving if match), default=blocks) - 1


def _unet_config(tensors: Tensors) -> UNetConfig:
    layers = _layers(tensors)
    first = range(1, _count(tensors, r"input_blocks\.(\d+)\."), layers + 1)  # block of each level
    widths = tuple(tensors[f"input_blocks.{i}.0.in_layers.2.weight"].shape[0] for i in first)
    attention = "middle_block.1.transformer_blocks"
    linear = len(tensors["middle_block.1.proj_in.weight"].shape) == 2
    return UNetConfig(
        in_channels=tensors["input_blocks.0.0.weight"].shape[1],
        out_channels=tensors["out.2.weight"].shape[0],
        block_out_channels=widths,
        cross_attention=tuple(f"input_blocks.{i}.1.norm.weight" in tensors for i in first),
        layers_per_block=layers,
        transformer_layers=_count(tensors, rf"{re.escape(attention)}\.(\d+)\."),
        # SD 1 has eight heads, of any width; SD 2 heads of one width, and linear projections.
        heads=tuple(width // _CLIP_HEAD if linear else 8 for width in widths),
        cross_attention_dim=tensors[f"{attention}.0.attn2.to_k.weight"].shape[1],
        use_linear_projection=linear,
    )


def _unet_tensors(tensors: Tensors) -> Iterator[Entry]:
    layers = _layers(tensors)

    def place(match: re.Match[str]) -> str:
        way, block, part, rest = match[1], int(match[2]), int(match[3]), match[4]
        down = way == "input"
        level, layer = divmod(block - down, layers + 1)
        name = f"{'down' if down else 'up'}_blocks.{level}"
        if rest.startswith("op."):
            return f"{name}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        if rest.startswith("conv."):  # after the transformer, where the level has one
            return f"{name}.upsamplers.0.{rest}"
        return f"{name}.{'attentions' if part else 'resnets'}.{layer}.{rest}"

    for name, entry in tensors.items():
        renamed = _rename(name, _UNET)
        yield entry._replace(
            called=re.sub(r"^(input|output)_blocks\.(\d+)\.(\d+)\.(.*)", place, renamed)
        )


def _vae_config(tensors: Tensors) -> VAEConfig:
    levels = range(_count(tensors, r"encoder\.down\.(\d+)\."))
    return VAEConfig(
        in_channels=tensors["encoder.conv_in.weight"].shape[1],
        out_channels=tensors["decoder.conv_out.weight"].shape[0],
        latent_channels=tensors["post_quant_conv.weight"].shape[0],
        block_out_channels=tuple(
            tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in levels
        ),
        layers_per_block=_count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        mid_attention="encoder.mid.attn_1.norm.weight" in tensors,
    )


def _vae_tensors(tensors: Tensors) -> Iterator[Entry]:
    top = _count(tensors, r"decoder\.up\.(\d+)\.") - 1
    kinds = {"block": "resnets", "upsample": "upsamplers.0"}

    def place(match: re.Match[str]) -> str:
        return f"decoder.up_blocks.{top - int(match[1])}.{kinds[match[2]]}."

    for name, entry in tensors.items():
        if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
            renamed = re.sub(r"^decoder\.up\.(\d+)\.(block|upsample)\.", place, name)
            yield entry._replace(called=_rename(renamed, _VAE))


def _clip_config(tensors: Tensors) -> CLIPTextConfig:
    return _text_config(
        tensors,
        token="embeddings.token_embedding.weight",
        position="embeddings.position_embedding.weight",
        hidden="encoder.layers.0.mlp.fc1.weight",
        layers=_count(tensors, r"encoder\.layers\.(\d+)\."),
        activation="quick_gelu",
    )


def _open_clip_config(tensors: Tensors) -> CLIPTextConfig:
    return _text_config(
        tensors,
        token="token_embedding.weight",
        position="positional_embedding",
        hidden="transformer.resblocks.0.mlp.c_fc.weight",
        layers=_open_clip_layers(tensors),
        activation="gelu",
    )


def _open_clip_layers(tensors: Tensors) -> int:
    """Drop the last layer, where the file has it: SD 2 reads what comes out before it."""
    layers = _count(tensors, r"transformer\.resblocks\.(\d+)\.")
    return layers if layers == _SD2_LAYERS else layers - 1


def _text_config(
    tensors: Tensors, token: str, position: str, hidden: str, layers: int, activation: str
) -> CLIPTextConfig:
    tokens, width = tensors[token].shape
    return CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=tensors[hidden].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=width // _CLIP_HEAD,
        max_position_embeddings=tensors[position].shape[0],
        hidden_act=activation,
    )


def _clip_tensors(tensors: Tensors) -> Iterator[Entry]:
    for name, entry in tensors.items():
        yield entry._replace(called=name)


def _open_clip_tensors(tensors: Tensors) -> Iterator[Entry]:
    last = f"transformer.resblocks.{_open_clip_layers(tensors)}."
    for name, entry in tensors.items():
        if name.startswith((last, "text_projection", "logit_scale", "attn_mask")):
            continue
        called = _rename(name, _OPEN_CLIP)
        fused = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", called)
        if not fused:
            yield entry._replace(called=called)
            continue
        third = entry.shape[0] // 3
        for i, part in enumerate("qkv"):
            yield entry._replace(
                called=f"{fused[1]}.self_attn.{part}_proj.{fused[2]}",
                shape=(third, *entry.shape[1:]),
                rows=slice(i * third, (i + 1) * third),
            )


_READERS: dict[str, tuple[Callable[[Tensors], Config], Callable[[Tensors], Iterator[Entry]]]] = {
    "model.diffusion_model.": (_unet_config, _unet_tensors),
    "first_stage_model.": (_vae_config, _vae_tensors),
    "cond_stage_model.transformer.text_model.": (_clip_config, _clip_tensors),
    "cond_stage_model.transformer.": (_clip_config, _clip_tensors),
    "cond_stage_model.model.": (_open_clip_config, _open_clip_tensors),
}
