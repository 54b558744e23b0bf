"""What can be configured, and which combinations make sense.

Every experiment in `configs/` returns one `Config`. The dataclasses are mutable only so that
`--config.a.b=v` can override a field; `validate` runs once after that and nothing writes later.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from segdiff_jax.errors import UserError

STAGES = ("vae", "diffusion")
OPTIMIZERS = ("adamw", "muon")
SOURCES = ("scenes", "folder", "ade20k", "coco_stuff", "tfds")


@dataclass
class AugmentConfig:
    """Training augmentation. Image and labels always move together."""

    flip: bool = True
    min_scale: float = 1.0  # of the crop's short-side cover; 1.0 with max_scale 1.0 = no scale-crop
    max_scale: float = 1.0
    color_jitter: float = 0.0  # brightness, contrast and saturation factors in 1 ± this
    views: int = 0  # n: one of n fixed views of each pair; 0: a new view for every example


@dataclass
class ScenesConfig:
    """The procedural dataset: how many scenes, and how crowded."""

    train_examples: int = 4096
    val_examples: int = 64
    max_shapes: int = 4


@dataclass
class DataConfig:
    source: str = "folder"
    root: str = ""  # folder (local or gs://) for every source but "scenes"
    train_split: str = "train"
    val_split: str = "val"
    vocabulary: str = ""  # packaged name ("ade20k_150") or a classes.txt; "" = root/classes.txt
    image_size: tuple[int, int] = (96, 128)  # (height, width) the networks see
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    cache_images: bool = False  # keep decoded pairs in memory: for datasets that fit
    cache_latents: bool = False  # write VAE latents once, train without the VAE
    max_unreadable: float = 0.01  # share of pairs that may be skipped before training stops
    workers: int = 0  # Grain worker processes; 0 = threads in this process


@dataclass
class ModelConfig:
    preset: str = "tiny"  # architecture when nothing is loaded: see models/presets.py
    dtype: str = "float32"  # activations; parameters stay float32
    remat: bool = False  # recompute UNet blocks in the backward pass
    zero_init: bool = True  # new networks only: last layer of each residual branch starts at zero


@dataclass
class CodecConfig:
    classes_per_pass: int = 1  # G; 0 = all K classes in one gray image (the paper)
    context: str = "mean"  # "mean" | "bound"
    negatives: float = 0.25  # share of training slots that show a class absent from the image
    threshold: float = 0.5  # scores below it are *other* (255), unless closed
    closed: bool = False  # closed vocabulary: every pixel gets a class


@dataclass
class PromptsConfig:
    templates: tuple[str, ...] = ("a photo of a {class}",)


@dataclass
class DiffusionConfig:
    """Fields as in diffusers' scheduler_config.json."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # "scaled_linear" | "linear"
    prediction_type: str = "v_prediction"  # "v_prediction" | "epsilon" | "sample"
    timestep_spacing: str = "trailing"  # "trailing" | "leading" | "linspace"
    rescale_betas_zero_snr: bool = True
    set_alpha_to_one: bool = False
    steps_offset: int = 1


@dataclass
class NoiseConfig:
    kind: str = "annealed"  # "annealed" | "multires" | "gaussian"
    strength: float = 0.9


@dataclass
class OptimizerConfig:
    method: str = "adamw"  # "adamw" | "muon" (for matrices and kernels; AdamW for the rest)
    learning_rate: float = 3e-5
    warmup_steps: int = 100
    decay_steps: int = 25_000  # the exponential decay reaches final_fraction here
    final_fraction: float = 0.01
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 1e-2
    accumulation: int = 1  # micro-batches per optimiser step
    ema_decay: float = 0.0  # 0 = no EMA


@dataclass
class TrainConfig:
    steps: int = 25_000
    batch_size: int = 32  # effective: over all devices and micro-batches
    terminal_share: float = 0.0  # share of samples at t = T-1, where one-step sampling starts
    balance: float = 0.0  # γ: positions that show a pass's classes weigh (rest / shown)^γ
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    log_every: int = 50
    eval_every: int = 0  # 0 = never while training
    eval_examples: int = 16
    profile_start: int = 10  # the first step of a profiler trace, for TensorBoard or XProf
    profile_steps: int = 0  # its length; 0 = no trace


@dataclass
class VAEConfig:
    """The `vae` stage; with stage = "diffusion" and no init_from it runs first, for these steps."""

    steps: int = 0
    batch_size: int = 16
    learning_rate: float = 1e-3
    optimizer: str = "adamw"  # "adamw" | "muon"; the rest is as in `optimizer`
    kl_weight: float = 1e-6
    mask_share: float = 0.5  # share of the batch that is mask images
    mask_mixing: float = 0.5  # share of those that are mixtures of two


@dataclass
class SamplerConfig:
    steps: int = 10
    ensemble: int = 1
    eta: float = 0.0
    align: str = "none"  # "affine" | "none"
    reduce: str = "median"  # "median" | "mean"
    uncertainty: str = "mad"  # "mad" | "std"
    shortlist: int = 0  # M; 0 = every class gets the full budget
    batch_size: int = 32  # UNet passes in one compiled call, over all devices


@dataclass
class MeshConfig:
    """Sizes of the axes within a TPU slice (over ICI) and, times those, across slices (DCN)."""

    data: int = -1  # -1 = all remaining devices of a slice
    fsdp: int = 1
    tensor: int = 1
    dcn_data: int = -1  # -1 = all remaining slices
    dcn_fsdp: int = 1
    dcn_tensor: int = 1


@dataclass
class Config:
    seed: int = 0
    stage: str = "diffusion"
    init_from: str = ""  # workdir or Hugging Face folder or repo id; "" = from nothing
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"config.{key}={value!r}: choose one of {', '.join(allowed)}")


def _range(key: str, value: float, low: float, high: float = float("inf")) -> None:
    if not low <= value <= high:
        bounds = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise UserError(f"config.{key}={value}: must be {bounds}")


def validate(config: Config) -> Config:
    """Returns `config`, or raises `UserError` naming the first bad key and the mend."""
    c = config
    _choice("stage", c.stage, STAGES)
    _choice("data.source", c.data.source, SOURCES)
    _choice("model.dtype", c.model.dtype, ("float32", "bfloat16"))
    _choice("codec.context", c.codec.context, ("mean", "bound"))
    _choice("diffusion.beta_schedule", c.diffusion.beta_schedule, ("scaled_linear", "linear"))
    predictions = ("v_prediction", "epsilon", "sample")
    _choice("diffusion.prediction_type", c.diffusion.prediction_type, predictions)
    spacings = ("trailing", "leading", "linspace")
    _choice("diffusion.timestep_spacing", c.diffusion.timestep_spacing, spacings)
    _choice("noise.kind", c.noise.kind, ("annealed", "multires", "gaussian"))
    _choice("optimizer.method", c.optimizer.method, OPTIMIZERS)
    _choice("vae.optimizer", c.vae.optimizer, OPTIMIZERS)
    _choice("sampler.align", c.sampler.align, ("affine", "none"))
    _choice("sampler.reduce", c.sampler.reduce, ("median", "mean"))
    _choice("sampler.uncertainty", c.sampler.uncertainty, ("mad", "std"))
    for key in ("negatives", "threshold"):
        _range(f"codec.{key}", getattr(c.codec, key), 0.0, 1.0)
    _range("codec.classes_per_pass", c.codec.classes_per_pass, 0, 255)
    _range("data.max_unreadable", c.data.max_unreadable, 0.0, 1.0)
    _range("data.augment.min_scale", c.data.augment.min_scale, 0.1, c.data.augment.max_scale)
    _range("data.augment.color_jitter", c.data.augment.color_jitter, 0.0, 0.99)
    _range("data.augment.views", c.data.augment.views, 0)
    _range("train.steps", c.train.steps, 1)
    _range("train.batch_size", c.train.batch_size, 1)
    _range("train.terminal_share", c.train.terminal_share, 0.0, 1.0)
    _range("train.balance", c.train.balance, 0.0, 1.0)
    _range("train.checkpoint_every", c.train.checkpoint_every, 1)
    _range("train.keep_checkpoints", c.train.keep_checkpoints, 1)
    _range("train.log_every", c.train.log_every, 1)
    _range("train.profile_start", c.train.profile_start, 1)
    _range("train.profile_steps", c.train.profile_steps, 0)
    _range("sampler.steps", c.sampler.steps, 1, c.diffusion.num_train_timesteps)
    _range("sampler.ensemble", c.sampler.ensemble, 1)
    _range("sampler.eta", c.sampler.eta, 0.0, 1.0)
    _range("sampler.batch_size", c.sampler.batch_size, 1)
    _range("optimizer.learning_rate", c.optimizer.learning_rate, 0.0, 1e3)
    _range("vae.learning_rate", c.vae.learning_rate, 0.0, 1e3)
    _range("optimizer.accumulation", c.optimizer.accumulation, 1)
    _range("optimizer.ema_decay", c.optimizer.ema_decay, 0.0, 0.999999)
    _range("vae.mask_share", c.vae.mask_share, 0.0, 1.0)
    _range("vae.mask_mixing", c.vae.mask_mixing, 0.0, 1.0)
    _impossible_combinations(c)
    return config


def _impossible_combinations(c: Config) -> None:
    if c.data.source != "scenes" and not c.data.root:
        raise UserError(
            f"config.data.root is empty: source {c.data.source!r} needs --config.data.root=FOLDER"
        )
    if c.stage == "diffusion" and not c.init_from and c.vae.steps < 1:
        raise UserError(
            "config.init_from is empty and config.vae.steps is 0: "
            "name a workdir or Stable Diffusion folder, or give the VAE stage some steps"
        )
    if c.train.profile_steps and c.train.profile_start > c.train.steps:
        raise UserError(
            f"config.train.profile_start={c.train.profile_start} lies after the last step, "
            f"config.train.steps={c.train.steps}: choose an earlier one"
        )
    if c.train.batch_size % c.optimizer.accumulation:
        raise UserError(
            f"config.train.batch_size={c.train.batch_size} does not divide into "
            f"config.optimizer.accumulation={c.optimizer.accumulation} micro-batches"
        )
    if c.data.cache_latents and c.codec.classes_per_pass > 1:
        raise UserError(
            "config.data.cache_latents holds one class per latent (or all of them): "
            "use config.codec.classes_per_pass=1 or 0, or turn the cache off"
        )
    scaled = (c.data.augment.min_scale, c.data.augment.max_scale) != (1.0, 1.0)
    endless = not c.data.augment.views and (scaled or c.data.augment.color_jitter > 0)
    if c.data.cache_latents and endless:
        raise UserError(
            "config.data.cache_latents cannot hold a new scale-crop or colour jitter for every "
            "example: set config.data.augment.views to a number of views per pair, "
            "or turn the cache off"
        )
    if c.diffusion.rescale_betas_zero_snr and c.diffusion.prediction_type == "epsilon":
        raise UserError(
            "config.diffusion.prediction_type='epsilon' carries no signal at zero terminal SNR: "
            "use v_prediction or sample, or config.diffusion.rescale_betas_zero_snr=False"
        )


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON values, for `workdir/config.json`."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`. Unknown keys are an error: the file came from other code."""
    return _build(Config, values, "config")


def _build(cls: type, values: dict[str, Any], path: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(f"{path}.{unknown[0]}: unknown key in the stored config")
    built = {}
    for name, value in values.items():
        kind = fields[name].type
        if dataclasses.is_dataclass(kind):
            value = _build(kind, value, f"{path}.{name}")  # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return cls(**built)
