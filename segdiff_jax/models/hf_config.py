"""The `config.json` files of Stable Diffusion folders ⇄ our configs.

A published config has dozens of options. Those that our modules have are read; each of the others
must have the value that Stable Diffusion gives it, or the error names the key. An option nobody
here has heard of is accepted only while it is off.
"""

from typing import Any

from segdiff_jax.config import DiffusionConfig
from segdiff_jax.errors import UserError
from segdiff_jax.models.clip_text import CLIPTextConfig
from segdiff_jax.models.unet import UNetConfig
from segdiff_jax.models.vae import VAEConfig

Json = dict[str, Any]

_OFF = (None, False)
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": _OFF,
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": _OFF,
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0,),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default",),
    "resnet_out_scale_factor": (1, None),
    "time_embedding_type": ("positional", None),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default", None),
}
_UNET_IGNORED = {
    "sample_size",
    "upcast_attention",  # our softmax is float32 in any case
    "addition_embed_type_num_heads",  # of addition_embed_type, which must be off
}
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "shift_factor": (None, 0),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
}
_VAE_IGNORED = {"sample_size", "force_upcast"}
_TEXT_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("clip_text_model",),
    "hidden_act": ("gelu", "quick_gelu"),
}
_SCHEDULE_FIXED: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "clip_sample": (False,),
    "thresholding": _OFF,
    "beta_schedule": ("scaled_linear", "linear"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("trailing", "leading", "linspace"),
}


def _check(values: Json, fixed: dict[str, tuple[Any, ...]], file: str) -> None:
    for key, allowed in fixed.items():
        if key in values and values[key] not in allowed:
            raise UserError(
                f"{file}: {key}={values[key]!r} is not supported: "
                f"use a model with {' or '.join(map(repr, allowed))}"
            )


def _check_unknown(values: Json, known: set[str], file: str) -> None:
    for key in sorted(set(values) - known):
        if not key.startswith("_") and values[key] not in _OFF:
            raise UserError(f"{file}: {key}={values[key]!r} is not supported: use another model")


def _get(values: Json, key: str, kind: Any, default: Any, file: str, least: int = 1) -> Any:
    value = values.get(key, default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{file}: {key}={value!r} must be of type {kind.__name__}: mend the file")
    if kind is int and value < least:
        raise UserError(f"{file}: {key}={value!r} must be at least {least}: mend the file")
    return value


def _ints(values: Json, key: str, default: Any, file: str) -> tuple[int, ...]:
    value = values.get(key, default)
    good = isinstance(value, list | tuple) and value
    if not good or not all(type(n) is int and n > 0 for n in value):
        raise UserError(f"{file}: {key}={value!r} must be a list of positive integers")
    return tuple(value)


def _same_everywhere(values: Json, key: str, default: int, file: str) -> int:
    """An integer that may be written as a list with one entry per level."""
    value = values.get(key, default)
    if isinstance(value, list) and value and all(n == value[0] for n in value):
        value = value[0]
    return _get({key: value}, key, int, default, file)


def _divides(groups: int, widths: tuple[int, ...], key: str, file: str) -> None:
    bad = [width for width in widths if groups < 1 or width % groups]
    if bad:
        raise UserError(f"{file}: {key}={groups} does not divide {bad[0]} channels")


def _cross_attention(values: Json, levels: int, file: str) -> tuple[bool, ...]:
    """Which levels attend to the text, going down; the way up must mirror it."""
    defaults = {"down_block_types": [True, True, True, False]}
    defaults["up_block_types"] = defaults["down_block_types"][::-1]
    attends = {}
    for key, default in defaults.items():
        side = "Down" if key.startswith("down") else "Up"
        kinds = {f"{side}Block2D": False, f"CrossAttn{side}Block2D": True}
        blocks = values.get(key)
        unknown = [block for block in blocks or () if block not in kinds]
        if unknown:
            raise UserError(f"{file}: {key} holds {unknown[0]!r}: use one of {', '.join(kinds)}")
        attends[key] = tuple(kinds[block] for block in blocks) if blocks else tuple(default)
        if len(attends[key]) != levels:
            raise UserError(f"{file}: {key} has {len(attends[key])} levels instead of {levels}")
    if attends["up_block_types"] != attends["down_block_types"][::-1]:
        raise UserError(f"{file}: up_block_types must mirror down_block_types: use another model")
    return attends["down_block_types"]


def _heads(values: Json, widths: tuple[int, ...], file: str) -> tuple[int, ...]:
    """Attention heads per level. diffusers' `attention_head_dim` is their number, not size."""
    key = "num_attention_heads" if values.get("num_attention_heads") else "attention_head_dim"
    value = values.get(key, 8)
    value = [value] * len(widths) if isinstance(value, int) else value
    heads = _ints({key: value}, key, None, file)
    if len(heads) != len(widths):
        raise UserError(f"{file}: {key} has {len(heads)} levels instead of {len(widths)}")
    return heads


def read_unet(values: Json, file: str) -> UNetConfig:
    """`unet/config.json` → `UNetConfig`. Missing keys mean what they mean to diffusers."""
    _check(values, {"_class_name": ("UNet2DConditionModel",)} | _UNET_FIXED, file)
    widths = _ints(values, "block_out_channels", (320, 640, 1280, 1280), file)
    attends = _cross_attention(values, len(widths), file)
    heads = _heads(values, widths, file)
    for width, count, used in zip(widths, heads, (*attends[:-1], True), strict=True):
        if used:  # the middle block attends with the heads of the last level
            _divides(count, (width,), "attention_head_dim", file)
    groups = _get(values, "norm_num_groups", int, 32, file)
    _divides(groups, widths, "norm_num_groups", file)
    config = UNetConfig(
        in_channels=_get(values, "in_channels", int, 4, file),
        out_channels=_get(values, "out_channels", int, 4, file),
        block_out_channels=widths,
        cross_attention=attends,
        layers_per_block=_same_everywhere(values, "layers_per_block", 2, file),
        transformer_layers=_same_everywhere(values, "transformer_layers_per_block", 1, file),
        heads=heads,
        cross_attention_dim=_same_everywhere(values, "cross_attention_dim", 1280, file),
        use_linear_projection=_get(values, "use_linear_projection", bool, False, file),
        norm_groups=groups,
        norm_epsilon=_get(values, "norm_eps", float, 1e-5, file),
        flip_sin_to_cos=_get(values, "flip_sin_to_cos", bool, True, file),
        freq_shift=_get(values, "freq_shift", float, 0.0, file),
    )
    read = set(write_unet(config)) | {"num_attention_heads"}
    _check_unknown(values, read | set(_UNET_FIXED) | _UNET_IGNORED, file)
    return config


def write_unet(config: UNetConfig) -> Json:
    """The inverse of `read_unet`, for `diffusers.UNet2DConditionModel`."""
    attends = config.cross_attention
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": list(config.heads),
        "block_out_channels": list(config.block_out_channels),
        "cross_attention_dim": config.cross_attention_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "freq_shift": int(config.freq_shift) if config.freq_shift % 1 == 0 else config.freq_shift,
        "in_channels": config.in_channels,
        "layers_per_block": config.layers_per_block,
        "norm_eps": config.norm_epsilon,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.out_channels,
        "transformer_layers_per_block": config.transformer_layers,
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        "use_linear_projection": config.use_linear_projection,
    }


def read_vae(values: Json, file: str) -> VAEConfig:
    """`vae/config.json` → `VAEConfig`. Missing keys mean what they mean to diffusers."""
    _check(values, {"_class_name": ("AutoencoderKL",)} | _VAE_FIXED, file)
    widths = _ints(values, "block_out_channels", (64,), file)
    kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    for key, kind in kinds.items():
        if values.get(key, [kind]) != [kind] * len(widths):
            raise UserError(f"{file}: {key} must be {len(widths)} × {kind}")
    groups = _get(values, "norm_num_groups", int, 32, file)
    _divides(groups, widths, "norm_num_groups", file)
    config = VAEConfig(
        in_channels=_get(values, "in_channels", int, 3, file),
        out_channels=_get(values, "out_channels", int, 3, file),
        latent_channels=_get(values, "latent_channels", int, 4, file),
        block_out_channels=widths,
        layers_per_block=_get(values, "layers_per_block", int, 1, file),
        norm_groups=groups,
        mid_attention=_get(values, "mid_block_add_attention", bool, True, file),
        scaling_factor=_get(values, "scaling_factor", float, 0.18215, file),
    )
    _check_unknown(values, set(write_vae(config)) | set(_VAE_FIXED) | _VAE_IGNORED, file)
    return config


def write_vae(config: VAEConfig) -> Json:
    """The inverse of `read_vae`, for `diffusers.AutoencoderKL`."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.out_channels,
        "scaling_factor": config.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def read_text_encoder(values: Json, file: str) -> CLIPTextConfig:
    """`text_encoder/config.json` → `CLIPTextConfig`; other keys of transformers are not ours."""
    _check(values, _TEXT_FIXED, file)
    config = CLIPTextConfig(
        vocab_size=_get(values, "vocab_size", int, 49408, file),
        hidden_size=_get(values, "hidden_size", int, 512, file),
        intermediate_size=_get(values, "intermediate_size", int, 2048, file),
        num_hidden_layers=_get(values, "num_hidden_layers", int, 12, file),
        num_attention_heads=_get(values, "num_attention_heads", int, 8, file),
        max_position_embeddings=_get(values, "max_position_embeddings", int, 77, file),
        hidden_act=_get(values, "hidden_act", str, "quick_gelu", file),
        layer_norm_eps=_get(values, "layer_norm_eps", float, 1e-5, file),
    )
    _divides(config.num_attention_heads, (config.hidden_size,), "num_attention_heads", file)
    return config


def write_text_encoder(config: CLIPTextConfig, dtype: str) -> Json:
    """The inverse of `read_text_encoder`, for `transformers.CLIPTextModel`."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        # The ids in Stable Diffusion's own files, wrong as they are: they only choose the pooled
        # output, which is not used, and 2 makes transformers look for the largest id instead.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "projection_dim": config.hidden_size,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
    }


def read_schedule(values: Json, file: str) -> DiffusionConfig:
    """`scheduler/scheduler_config.json` → `DiffusionConfig`: the noise the weights were trained on.

    Any scheduler of Stable Diffusion's training (DDIM, PNDM, DDPM, ...) tells the same things.
    Missing keys mean what they mean to `diffusers.DDIMScheduler`, but `set_alpha_to_one` is true
    there alone.
    """
    _check(values, _SCHEDULE_FIXED, file)
    ddim = values.get("_class_name", "DDIMScheduler") == "DDIMScheduler"
    return DiffusionConfig(
        num_train_timesteps=_get(values, "num_train_timesteps", int, 1000, file),
        beta_start=_get(values, "beta_start", float, 1e-4, file),
        beta_end=_get(values, "beta_end", float, 0.02, file),
        beta_schedule=_get(values, "beta_schedule", str, "linear", file),
        prediction_type=_get(values, "prediction_type", str, "epsilon", file),
        timestep_spacing=_get(values, "timestep_spacing", str, "leading", file),
        rescale_betas_zero_snr=_get(values, "rescale_betas_zero_snr", bool, False, file),
        set_alpha_to_one=_get(values, "set_alpha_to_one", bool, ddim, file),
        steps_offset=_get(values, "steps_offset", int, 0, file, least=0),
    )


def write_schedule(config: DiffusionConfig) -> Json:
    """The inverse of `read_schedule`, for `diffusers.DDIMScheduler`."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.beta_start,
        "clip_sample": False,
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": config.prediction_type,
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr,
        "set_alpha_to_one": config.set_alpha_to_one,
        "steps_offset": config.steps_offset,
        "thresholding": False,
        "timestep_spacing": config.timestep_spacing,
        "trained_betas": None,
    }
