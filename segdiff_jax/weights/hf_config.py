"""The `config.json` files of Stable Diffusion folders ⇄ our configs: which option means what."""

from collections.abc import Mapping

from segdiff_jax import config as configs
from segdiff_jax import fields
from segdiff_jax.config import DiffusionConfig
from segdiff_jax.errors import UserError
from segdiff_jax.models import clip_text
from segdiff_jax.models.clip_text import CLIPTextConfig
from segdiff_jax.models.tiny_vae import TinyVAEConfig
from segdiff_jax.models.unet import UNetConfig
from segdiff_jax.models.vae import VAEConfig
from segdiff_jax.weights import hf_options
from segdiff_jax.weights.hf_options import OFF, Allowed, Json

_UNET_FIXED: dict[str, Allowed] = {
    "center_input_sample": OFF,
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": OFF,
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
_VAE_FIXED: dict[str, Allowed] = {
    "act_fn": ("silu",),
    "shift_factor": (None, 0),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
}
_VAE_IGNORED = {"sample_size", "force_upcast"}
_TINY_VAE_FIXED: dict[str, Allowed] = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "shift_factor": (0, None),
}
_TINY_VAE_IGNORED = {
    *("block_out_channels", "force_upcast"),  # diffusers writes the first and does not read it
    *("latent_magnitude", "latent_shift"),  # of latents stored as bytes
}
_TEXT_FIXED: dict[str, Allowed] = {
    "model_type": ("clip_text_model",),
    "hidden_act": tuple(clip_text.ACTIVATIONS),
}
_SCHEDULE_FIXED: dict[str, Allowed] = {
    "trained_betas": OFF,
    "clip_sample": (False,),
    "thresholding": OFF,
    "beta_schedule": configs.BETA_SCHEDULES,
    "prediction_type": configs.PREDICTIONS,
    "timestep_spacing": configs.SPACINGS,
}


def _divides(groups: int, widths: tuple[int, ...], key: str, file: str) -> None:
    bad = [width for width in widths if width % groups]
    if bad:
        raise UserError(f"{file}: {key}={groups} does not divide {bad[0]} channels")


def _check_levels(count: int, file: str) -> None:
    if count > 16:
        raise UserError(f"{file}: {count} levels halve the image to nothing: at most 16")


def _cross_attention(values: Json, levels: int, file: str) -> tuple[bool, ...]:
    """Return which levels attend to the text, going down; the way up must mirror it."""
    attends = {}
    for side, order in (("Down", 1), ("Up", -1)):
        key, kinds = f"{side.lower()}_block_types", [f"{side}Block2D", f"CrossAttn{side}Block2D"]
        blocks = values.get(key)
        listed = blocks if isinstance(blocks, list) else [] if blocks is None else [blocks]
        unknown = [block for block in listed if block not in kinds]
        if unknown:
            raise UserError(
                f"{file}: {key} holds {fields.shown(unknown[0])}: use one of {', '.join(kinds)}"
            )
        found = [block == kinds[1] for block in listed][::order] or [True, True, True, False]
        if len(found) != levels:
            raise UserError(f"{file}: {key} has {len(found)} levels instead of {levels}")
        attends[side] = tuple(found)
    if attends["Up"] != attends["Down"]:
        raise UserError(f"{file}: up_block_types must mirror down_block_types: use another model")
    return attends["Down"]


_UNET_NAMES = {
    "transformer_layers": "transformer_layers_per_block",
    "norm_groups": "norm_num_groups",
    "norm_epsilon": "norm_eps",
    "heads": "attention_head_dim",  # diffusers' name for their number
}


def check_unet(config: UNetConfig, file: str, keys: Mapping[str, str]) -> None:
    """Raise `UserError` if no network can be built of `config`.

    keys: what `file` calls those fields that do not have their own names there.
    """
    levels = len(config.block_out_channels)
    _check_levels(levels, file)
    for field in ("cross_attention", "heads"):
        found = len(getattr(config, field))
        if found != levels:
            key = keys.get(field, field)
            raise UserError(f"{file}: {key} has {found} levels instead of {levels}")
    used = (*config.cross_attention[:-1], True)  # the middle attends with the last level's heads
    for width, heads, attends in zip(config.block_out_channels, config.heads, used, strict=True):
        _divides(config.norm_groups, (width,), keys.get("norm_groups", "norm_groups"), file)
        _divides(heads if attends else 1, (width,), keys.get("heads", "heads"), file)


def read_unet(values: Json, file: str) -> UNetConfig:
    """Read `unet/config.json` as `UNetConfig`. Missing keys mean what they mean to diffusers."""
    if values.get("addition_embed_type") == "text_time":
        raise UserError(
            f"{file}: addition_embed_type='text_time' is of Stable Diffusion XL: use Stable "
            "Diffusion 1 or 2"
        )
    hf_options.check(values, {"_class_name": ("UNet2DConditionModel",)} | _UNET_FIXED, file)
    single = ("layers_per_block", "transformer_layers_per_block", "cross_attention_dim")
    values, names = hf_options.same_everywhere(values, single), dict(_UNET_NAMES)
    if values.get("num_attention_heads"):
        names["heads"] = "num_attention_heads"
    widths = values.get("block_out_channels")
    levels = len(widths) if isinstance(widths, list | tuple) else 4
    heads = values.get(names["heads"], 8)
    if not isinstance(heads, list | tuple):
        values |= {names["heads"]: [heads] * levels}
    config = hf_options.read(
        UNetConfig,
        values,
        names,
        file,
        cross_attention=_cross_attention(values, levels, file),
        in_channels=4,
        cross_attention_dim=1280,
        use_linear_projection=False,
    )
    check_unet(config, file, names)
    read = set(write_unet(config)) | {"num_attention_heads"}
    hf_options.check_unknown(values, read | set(_UNET_FIXED) | _UNET_IGNORED, file)
    return config


def write_unet(config: UNetConfig) -> Json:
    """Invert `read_unet`, for `diffusers.UNet2DConditionModel`."""
    values = hf_options.write(config, _UNET_NAMES)
    attends, shift = values.pop("cross_attention"), config.freq_shift
    return values | {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "freq_shift": int(shift) if shift % 1 == 0 else shift,
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
    }


_VAE_NAMES = {"norm_groups": "norm_num_groups", "mid_attention": "mid_block_add_attention"}


def read_vae(values: Json, file: str) -> VAEConfig:
    """Read `vae/config.json` as `VAEConfig`. Missing keys mean what they mean to diffusers."""
    hf_options.check(values, {"_class_name": ("AutoencoderKL",)} | _VAE_FIXED, file)
    absent = {"block_out_channels": (64,), "layers_per_block": 1}
    config = hf_options.read(VAEConfig, values, _VAE_NAMES, file, **absent)
    widths = config.block_out_channels
    _check_levels(len(widths), file)
    _divides(config.norm_groups, widths, "norm_num_groups", file)
    kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    for key, kind in kinds.items():
        if values.get(key, [kind]) != [kind] * len(widths):
            raise UserError(f"{file}: {key} must be {len(widths)} × {kind}")
    hf_options.check_unknown(values, set(write_vae(config)) | set(_VAE_FIXED) | _VAE_IGNORED, file)
    return config


def write_vae(config: VAEConfig) -> Json:
    """Invert `read_vae`, for `diffusers.AutoencoderKL`."""
    levels = len(config.block_out_channels)
    return hf_options.write(config, _VAE_NAMES) | {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


_TINY_VAE_NAMES = {
    "width": "encoder_block_out_channels",  # the same for each level, and for the decoder
    "encoder_blocks": "num_encoder_blocks",
    "decoder_blocks": "num_decoder_blocks",
}


def read_tiny_vae(values: Json, file: str) -> TinyVAEConfig:
    """Read the `config.json` of an `AutoencoderTiny` as `TinyVAEConfig`."""
    hf_options.check(values, {"_class_name": ("AutoencoderTiny",)} | _TINY_VAE_FIXED, file)
    widths = ("encoder_block_out_channels", "decoder_block_out_channels")
    values = hf_options.same_everywhere(values, widths)
    config = hf_options.read(TinyVAEConfig, values, _TINY_VAE_NAMES, file)
    if values.get(widths[1], config.width) != config.width:
        raise UserError(f"{file}: {widths[1]} must be as {widths[0]}: use another model")
    levels = len(config.encoder_blocks)
    _check_levels(levels, file)
    if len(config.decoder_blocks) != levels:
        raise UserError(f"{file}: num_decoder_blocks must have {levels} levels: use another model")
    known = set(write_tiny_vae(config)) | set(_TINY_VAE_FIXED) | _TINY_VAE_IGNORED
    hf_options.check_unknown(values, known, file)
    return config


def write_tiny_vae(config: TinyVAEConfig) -> Json:
    """Invert `read_tiny_vae`, for `diffusers.AutoencoderTiny`."""
    widths = [config.width] * len(config.encoder_blocks)
    return hf_options.write(config, _TINY_VAE_NAMES) | {
        "_class_name": "AutoencoderTiny",
        "act_fn": "relu",
        "decoder_block_out_channels": widths,
        "encoder_block_out_channels": widths,
    }


def read_text_encoder(values: Json, file: str) -> CLIPTextConfig:
    """Read `text_encoder/config.json` as `CLIPTextConfig`; ignore other keys of transformers."""
    hf_options.check(values, _TEXT_FIXED, file)
    config = hf_options.read(
        CLIPTextConfig,
        values,
        {},
        file,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        hidden_act="quick_gelu",
    )
    _divides(config.num_attention_heads, (config.hidden_size,), "num_attention_heads", file)
    return config


def write_text_encoder(config: CLIPTextConfig) -> Json:
    """Invert `read_text_encoder`, for `transformers.CLIPTextModel`."""
    return hf_options.write(config, {}) | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        # The ids in Stable Diffusion's own files, wrong as they are: they only choose the pooled
        # output, which is not used, and 2 makes transformers look for the largest id instead.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "projection_dim": config.hidden_size,
    }


def read_schedule(values: Json, file: str) -> DiffusionConfig:
    """Read `scheduler/scheduler_config.json` as `DiffusionConfig`.

    Any scheduler of Stable Diffusion's training (DDIM, PNDM, DDPM, ...) tells the same things.
    Missing keys mean what they mean to `diffusers.DDIMScheduler`, but `set_alpha_to_one` is true
    there alone.
    """
    hf_options.check(values, _SCHEDULE_FIXED, file)
    name = values.get("_class_name", "DDIMScheduler")
    if str(name).startswith(("FlowMatch", "EDM")):  # which have no betas
        shown = fields.shown(name)
        raise UserError(f"{file}: _class_name={shown} is not supported: use another model")
    return hf_options.read(
        DiffusionConfig,
        values,
        {},
        file,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        rescale_betas_zero_snr=False,
        set_alpha_to_one=name == "DDIMScheduler",
        steps_offset=0,
    )


def write_schedule(config: DiffusionConfig) -> Json:
    """Invert `read_schedule`, for `diffusers.DDIMScheduler`."""
    values = hf_options.write(config, {})
    del values["convert_prediction"]  # what a training may do, not what the weights are
    fixed = {"clip_sample": False, "thresholding": False, "trained_betas": None}
    return values | {"_class_name": "DDIMScheduler"} | fixed
