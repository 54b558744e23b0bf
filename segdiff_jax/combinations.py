"""Which values of a config make no sense together: to read, to evaluate or to train a model."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from segdiff_jax.errors import UserError
from segdiff_jax.stages import key_of

if TYPE_CHECKING:
    from segdiff_jax.config import Config, SamplerConfig

PLACEHOLDER = "{class}"  # in a prompt template
TEMPLATE_SETS = ("single", "scene", "vild14", "clip80")  # names for templates: text/prompts.py


def check(c: "Config", own: "Config", use: str) -> None:
    """Raise `UserError` for the first contradiction in `c`.

    `own` is `stages.of_stage(c)`, `use` one of `config.USES`.
    """
    for message in _of_a_model(c):
        raise UserError(message)
    if use == "model":
        return
    for message in _of_an_evaluation(c):
        raise UserError(message)
    check_sampler(own.sampler)
    if use == "train":
        for message in (*_of_the_stages(c), *_of_steps_and_batches(c, own), *_of_groups(own)):
            raise UserError(message)


def check_image_size(c: "Config", factor: int, whose: str) -> None:
    """Raise `UserError` unless images divide by `factor`, the downsampling of the VAE of `whose`.

    The UNet takes latents of any size: what it halves unevenly it brings back to the size it was.
    """
    height, width = c.data.image_size
    if height % factor or width % factor:
        raise UserError(
            f"config.data.image_size={height},{width}: must be multiples of {factor}, "
            f"the downsampling of {whose}"
        )


def check_sampler(sampler: "SamplerConfig") -> None:
    """Raise `UserError` if more steps or members than one are asked of a start from zeros."""
    if sampler.initial_noise == "zero" and (sampler.steps, sampler.ensemble) != (1, 1):
        raise UserError(
            f"config.sampler.steps={sampler.steps}, ensemble={sampler.ensemble}: must both be 1 "
            "with config.sampler.initial_noise='zero': such a model was trained for one step, and "
            "its members would all be the same"
        )


def _of_a_model(c: "Config") -> Iterator[str]:
    d = c.diffusion
    total = f"config.diffusion.num_train_timesteps={d.num_train_timesteps}"
    if c.sampler.steps > d.num_train_timesteps:
        yield f"config.sampler.steps={c.sampler.steps}: must be at most {total}"
    if d.beta_start > d.beta_end:
        yield (
            f"config.diffusion.beta_start={d.beta_start}: must be at most "
            f"config.diffusion.beta_end={d.beta_end}"
        )
    if d.steps_offset >= d.num_train_timesteps:
        yield f"config.diffusion.steps_offset={d.steps_offset}: must be less than {total}"
    if d.rescale_betas_zero_snr and d.prediction_type == "epsilon":
        yield (
            "config.diffusion.prediction_type='epsilon' carries no signal at zero terminal SNR: "
            "use v_prediction or sample, or config.diffusion.rescale_betas_zero_snr=False"
        )
    for template in c.prompts.templates:
        if PLACEHOLDER not in template and template not in TEMPLATE_SETS:
            yield (
                f"config.prompts.templates: {template!r} must contain {PLACEHOLDER}, as in "
                f"'a photo of a {PLACEHOLDER}', or be one of the sets {', '.join(TEMPLATE_SETS)}"
            )
    for axis, size in dataclasses.asdict(c.mesh).items():
        if size == 0:
            yield f"config.mesh.{axis}=0: must be a number of devices, or -1 for the rest"


def _of_an_evaluation(c: "Config") -> Iterator[str]:
    if c.data.source != "scenes" and not c.data.root:
        yield (
            f"config.data.root is empty: source {c.data.source!r} needs --config.data.root=FOLDER"
        )
    plain = type(c.data)()
    for name in ("first_id", "mask_values", "ignore_ids", "mask_suffix"):
        if c.data.source != "folder" and getattr(c.data, name) != getattr(plain, name):
            yield (
                f"config.data.{name}: source {c.data.source!r} has ids and names of its own: "
                "use it with config.data.source=folder, or leave it out"
            )
    one = "config.codec.classes_per_pass=1"
    if c.sampler.shortlist and c.codec.classes_per_pass != 1:
        yield (
            f"config.sampler.shortlist={c.sampler.shortlist}: must be 0 unless {one}: a pass of "
            "several classes leaves none of them out"
        )
    if c.sampler.decoder == "joint" and c.codec.classes_per_pass != 1:
        yield (
            f"config.sampler.decoder='joint': needs {one}, for it sharpens the map of one class: "
            "use vae"
        )
    total, steps = c.diffusion.num_train_timesteps, c.sampler.steps
    first = (steps - 1) * (total // steps) + c.diffusion.steps_offset
    if c.diffusion.timestep_spacing == "leading" and first >= total:
        yield (
            f"config.sampler.steps={steps}: must be less with leading spacing and config.diffusion."
            f"steps_offset={c.diffusion.steps_offset}: the first step would be {first} of {total}"
        )


def _of_the_stages(c: "Config") -> Iterator[str]:
    if c.stage == "vae" and c.vae.steps < 1:
        yield "config.vae.steps=0: must be at least 1 with config.stage='vae'"
    shown = f"config.codec.classes_per_pass={c.codec.classes_per_pass}: must be 1 with"
    if c.stage == "e2e" and c.codec.classes_per_pass != 1:
        yield f"{shown} config.stage='e2e', where a pass shows one class"
    if c.stage == "joint":
        yield (
            "config.stage='joint': is not trained by itself: set config.joint.steps, and the "
            "training of a UNet ends with it (run it again where it is done)"
        )
    if c.sampler.decoder == "joint" and not c.joint.steps:
        yield "config.sampler.decoder='joint': needs config.joint.steps, which train such a decoder"
    if c.joint.steps and c.codec.classes_per_pass != 1:
        yield f"{shown} config.joint.steps, for a joint decoder sharpens the map of one class"
    if c.stage == "diffusion" and not c.init_from and c.vae.steps < 1:
        yield (
            "config.init_from is empty and config.vae.steps is 0: "
            "name a workdir or Stable Diffusion folder, or give the VAE stage some steps"
        )
    if c.stage == "e2e" and not c.init_from:
        yield (
            "config.init_from is empty: config.stage='e2e' goes on from a diffusion training: "
            "name its workdir or export"
        )
    if c.init_variant and not c.init_from:
        yield (
            f"config.init_variant={c.init_variant!r}: must be empty without config.init_from, "
            "whose weights it chooses"
        )
    if c.init_tokenizer and not c.init_from.endswith(".safetensors"):
        yield (
            f"config.init_tokenizer={c.init_tokenizer!r}: must be empty unless config.init_from is "
            "one .safetensors file: a folder has its own tokenizer"
        )


def _of_steps_and_batches(c: "Config", own: "Config") -> Iterator[str]:
    augment = c.data.augment
    if augment.min_scale > augment.max_scale:
        yield (
            f"config.data.augment.min_scale={augment.min_scale}: must be at most "
            f"config.data.augment.max_scale={augment.max_scale}"
        )
    if own.train.profile_steps and own.train.profile_start > own.train.steps:
        yield (
            f"config.train.profile_start={c.train.profile_start} lies after the last step, "
            f"config.{key_of(c.stage, 'train.steps')}={own.train.steps}: choose an earlier one"
        )
    if own.train.batch_size % own.optimizer.accumulation:
        yield (
            f"config.train.batch_size={c.train.batch_size} does not divide into "
            f"config.optimizer.accumulation={c.optimizer.accumulation} micro-batches"
        )


def _of_groups(c: "Config") -> Iterator[str]:
    group, augment = c.codec.classes_per_pass, c.data.augment
    if group > 1 and c.codec.context == "mean":
        yield (
            f"config.codec.classes_per_pass={group} with config.codec.context='mean' cannot be "
            "learnt: the mean of prompts in random order does not say which level is whose: use "
            "context='bound', or classes_per_pass=1, or 0 for all classes in fixed order"
        )
    if c.train.balance and group == 0:
        yield (
            f"config.train.balance={c.train.balance}: must be 0 with config.codec.classes_per_pass"
            "=0: a pass that shows every class has nothing to weigh it against"
        )
    if c.data.cache_latents and group > 1:
        yield (
            "config.data.cache_latents holds one class per latent (or all of them): "
            "use config.codec.classes_per_pass=1 or 0, or turn the cache off"
        )
    changing = (augment.min_scale, augment.max_scale) != (1.0, 1.0) or augment.color_jitter > 0
    if c.data.cache_latents and changing and not augment.views:
        yield (
            "config.data.cache_latents cannot hold a new scale-crop or colour jitter for every "
            "example: set config.data.augment.views to a number of views per pair, "
            "or turn the cache off"
        )
