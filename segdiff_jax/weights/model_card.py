"""The README.md of an exported folder: what the model is and how to run it, from its config alone.

Nothing in it depends on where or when the export was made: an export of an export is the same.
"""

from segdiff_jax.codec import LEAST_SHARE
from segdiff_jax.config import Config
from segdiff_jax.models.unet import UNetConfig
from segdiff_jax.models.vae import VAEConfig

_STARTS = {"gaussian": "Gaussian noise", "zero": "zeros", "multires": "multi-resolution noise"}
_CARD = """\
---
library_name: diffusers
pipeline_tag: image-segmentation
tags:
- semantic-segmentation
- open-vocabulary
- segdiff_jax
{base}---

# Text-prompted semantic segmentation

A latent diffusion model that paints a *mask image* for the class names it is given, trained with
segdiff_jax{origin}. The files are in Stable Diffusion's layout, but this is no text-to-image model:
the UNet takes {channels} channels, the latent of the photo ⊕ the noisy latent of the mask image.

| setting | value |
|---|---|
{settings}

`segdiff.json` holds these and the rest of the training's config.

## Use

With segdiff_jax, this folder is a checkpoint:

    python -m segdiff_jax.predict --checkpoint FOLDER --images PHOTO \\
      --classes "sky; building, edifice; road" --output OUTPUT

With diffusers' and transformers' modules, per photo and group of classes:

1. {view} Scale to [-1, 1], encode it with the VAE: posterior mean × {scaling:.6g}.
2. {context}
3. Start from {start}, shaped like the photo's latent. For each of `DDIMScheduler`'s
   timesteps call the UNet on photo latent ⊕ noisy latent (in this order), and step.
4. {decoding}
5. {scores}

`docs/pytorch.md` in segdiff_jax's repository has this as code.

## Limits

A model knows the kind of photo and class it was trained on{data}. The weights carry the licence of
those that they started from{licence}, and the terms of the training data apply.
"""


def model_card(config: Config, unet: UNetConfig, vae: VAEConfig) -> str:
    """Return Markdown with the YAML header that the Hugging Face hub reads."""
    base = config.init_from.partition("@")[0]  # a repository, or nothing: see export.portable
    vocabulary = f" ({config.data.vocabulary})" if config.data.vocabulary else ""
    source = f": {config.data.source}{vocabulary}" if config.data.source != "folder" else vocabulary
    return _CARD.format(
        base=f"base_model: {base}\n" if base else "",
        origin=f", starting from `{config.init_from}`" if base else "",
        licence=f" (`{base}`)" if base else "",
        data=source,
        channels=unet.in_channels,
        view=_view(config),
        scaling=vae.scaling_factor,
        settings="\n".join(f"| {name} | {value} |" for name, value in _settings(config)),
        context=_context(config),
        start=_STARTS[config.sampler.initial_noise],
        decoding=_decoding(config, vae),
        scores=_scores(config),
    )


def _settings(config: Config) -> list[tuple[str, object]]:
    group = config.codec.classes_per_pass
    return [
        ("image size", "{} × {}".format(*config.data.image_size)),
        ("classes per pass, G", group or "all of them"),
        ("context", config.codec.context),
        ("prompts", ", ".join(f"`{template}`" for template in config.prompts.templates)),
        ("prediction", config.diffusion.prediction_type),
        ("zero terminal SNR", "yes" if config.diffusion.rescale_betas_zero_snr else "no"),
        ("timesteps", config.diffusion.timestep_spacing),
        ("steps × members", f"{config.sampler.steps} × {config.sampler.ensemble}"),
        ("decoder", config.sampler.decoder),
        ("threshold", "none" if config.codec.closed else config.codec.threshold),
        ("logit adjustment", config.codec.logit_adjustment or "none"),
    ]


def _view(config: Config) -> str:
    pixels = "{} × {} pixels (height × width)".format(*config.data.image_size)
    if config.data.fit == "stretch":
        return f"Resize the photo to {pixels}."
    return (
        f"Resize the photo, at its own aspect ratio, so that it just fits into {pixels}, and put "
        "it into the top left corner of mid-gray; what is beside or below it is no answer later."
    )


def _context(config: Config) -> str:
    prompts = (
        "Put each name of each class into each prompt, encode (last hidden state after the norm)"
    )
    if config.codec.context == "bound":
        return (
            f"{prompts}, take the state at the first end-of-text token, average per class and add "
            "the code of the class's gray level: one token per class."
        )
    return f"{prompts} and average: per class, then over the classes of the group."


def _decoding(config: Config, vae: VAEConfig) -> str:
    sampler = config.sampler
    how = f"Decode latent / {vae.scaling_factor:.6g} with the VAE, average the three channels"
    if sampler.decoder in ("linear", "joint"):
        how = "Apply the convolution of `linear_decoder.safetensors` to the latent"
    # What the joint decoder was trained on goes beyond the range of masks.
    steps = [f"{how}." if sampler.decoder == "joint" else f"{how}, clip to [-1, 1]."]
    if sampler.ensemble > 1:
        steps += [f"Merge the maps of the {sampler.ensemble} samples by their {sampler.reduce}."]
    if sampler.decoder == "joint":
        steps += ["Apply `joint_decoder.safetensors` to the map, the photo and the class's text."]
    return " ".join(steps)


def _scores(config: Config) -> str:
    score = "The class's score at a pixel of value m is (m + 1) / 2"
    if config.codec.classes_per_pass != 1:
        score = (
            "Class j = 1…G of a group has gray level -1 + 2j/G; its score falls from 1 there to 0 "
            "one level away"
        )
    if config.codec.logit_adjustment:
        score += (
            ". A score s becomes s·f / (s·f + 1 - s), where f = ((1 - p) / p)"
            f"^{config.codec.logit_adjustment:g} and p, from {LEAST_SHARE:g} to "
            f"{1 - LEAST_SHARE:g}, is the `share` in `classes.json` of the class that has this "
            "name or synonym, or else the median share"
        )
    return f"{score}. The label is the argmax over all classes."
