"""The README.md of an exported folder: what the model is and how to run it, from its config alone.

Nothing in it depends on where or when the export was made: an export of an export is the same.
"""

from segdiff_jax.config import Config

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

With diffusers and transformers, without segdiff_jax: the code of `docs/pytorch.md` in its
repository loads this folder and paints the same masks.

## Limits

A model knows the kind of photo and class it was trained on{data}. The weights carry the licence of
those that they started from{licence}, and the terms of the training data apply.
"""
_STARTS = {"gaussian": "Gaussian noise", "zero": "zeros", "multires": "multi-resolution noise"}
_FITS = {"pad": "at its own aspect ratio, padded", "stretch": "stretched"}


def model_card(config: Config, channels: int) -> str:
    """Return Markdown with the YAML header that the Hugging Face hub reads.

    channels: that the UNet takes.
    """
    base = config.init_from.partition("@")[0]  # a repository, or nothing: see export.portable
    vocabulary = f" ({config.data.vocabulary})" if config.data.vocabulary else ""
    source = f": {config.data.source}{vocabulary}" if config.data.source != "folder" else vocabulary
    return _CARD.format(
        base=f"base_model: {base}\n" if base else "",
        origin=f", starting from `{config.init_from}`" if base else "",
        licence=f" (`{base}`)" if base else "",
        data=source,
        channels=channels,
        settings="\n".join(f"| {name} | {value} |" for name, value in _settings(config)),
    )


def _settings(config: Config) -> list[tuple[str, object]]:
    codec, diffusion, sampler = config.codec, config.diffusion, config.sampler
    return [
        ("image size, height × width", "{} × {}".format(*config.data.image_size)),
        ("photo", _FITS[config.data.fit]),
        ("classes per pass, G", codec.classes_per_pass or "all of them"),
        ("context", codec.context),
        ("prompts", ", ".join(f"`{template}`" for template in config.prompts.templates)),
        ("prediction", diffusion.prediction_type),
        ("zero terminal SNR", "yes" if diffusion.rescale_betas_zero_snr else "no"),
        ("timesteps", diffusion.timestep_spacing),
        ("starts from", _STARTS[sampler.initial_noise]),
        ("steps × members", f"{sampler.steps} × {sampler.ensemble}"),
        ("decoder", sampler.decoder),
        ("threshold", "none" if codec.closed else codec.threshold),
        ("logit adjustment", codec.logit_adjustment or "none"),
    ]
