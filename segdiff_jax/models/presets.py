"""Named architectures, from one that trains in minutes on a laptop to Stable Diffusion's own."""

import dataclasses
from typing import NamedTuple

from segdiff_jax.errors import UserError
from segdiff_jax.models.clip_text import CLIPTextConfig
from segdiff_jax.models.unet import UNetConfig
from segdiff_jax.models.vae import VAEConfig


class Architecture(NamedTuple):
    unet: UNetConfig
    vae: VAEConfig
    text_encoder: CLIPTextConfig


def small(
    unet_widths: tuple[int, ...], vae_widths: tuple[int, ...], text_width: int
) -> Architecture:
    """Return an architecture of these widths that trains on a CPU, as the first two presets do."""
    # 16 latent channels at f = 8 hold what 4 hold at f = 4, in a quarter of the positions: on a
    # CPU, where time goes by positions, the UNet is then four times as fast.
    latent_channels = 16
    return Architecture(
        UNetConfig(
            in_channels=2 * latent_channels,
            out_channels=latent_channels,
            block_out_channels=unet_widths,
            # Above the lowest level it would take 40 % of the step: docs/results.md.
            cross_attention=(False,) * (len(unet_widths) - 1) + (True,),
            layers_per_block=1,
            heads=tuple(width // 32 for width in unet_widths),
            cross_attention_dim=text_width,
            norm_groups=16,
        ),
        VAEConfig(
            latent_channels=latent_channels,
            block_out_channels=vae_widths,
            layers_per_block=1,
            norm_groups=4,
            mid_attention=False,
        ),
        CLIPTextConfig(
            vocab_size=1024,
            hidden_size=text_width,
            intermediate_size=2 * text_width,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=10,
        ),
    )


def unet_between(name: str, latent_channels: int, text_width: int) -> UNetConfig:
    """Return the UNet of the preset `name`, fitted to a VAE's latent channels and a text width."""
    return dataclasses.replace(
        architecture(name).unet,
        in_channels=2 * latent_channels,
        out_channels=latent_channels,
        cross_attention_dim=text_width,
    )


PRESETS = {
    "tiny": small((48, 128), (8, 16, 32, 64), 128),
    "small": small((64, 128), (8, 24, 48, 96), 128),
    # runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2: their config.json files.
    "sd15": Architecture(
        UNetConfig(heads=(8, 8, 8, 8), cross_attention_dim=768, use_linear_projection=False),
        VAEConfig(),
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            hidden_act="quick_gelu",
        ),
    ),
    "sd2": Architecture(UNetConfig(), VAEConfig(), CLIPTextConfig()),
}


def architecture(name: str) -> Architecture:
    """Return the preset called `name`. Raise `UserError` if there is none."""
    if name not in PRESETS:
        raise UserError(f"config.model.preset={name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
