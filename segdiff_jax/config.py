"""What can be configured, and which combinations make sense.

Every experiment in `configs/` returns one `Config`. The dataclasses are mutable only so that
`--config.a.b=v` can override a field; `validate` runs once after that and nothing writes later.

Every number is declared with `number` and every word with fixed choices with `choice`, so that its
bounds stand beside it and no key can be without a check.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from segdiff_jax.errors import UserError

STAGES = ("vae", "diffusion")
OPTIMIZERS = ("adamw", "muon")
BETA_SCHEDULES = ("scaled_linear", "linear")
PREDICTIONS = ("v_prediction", "epsilon", "sample")
SPACINGS = ("trailing", "leading", "linspace")
SOURCES = ("scenes", "folder", "ade20k", "coco_stuff", "tfds")


def number(default: Any, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """A field for a number (or a tuple of them) from `low` to `high`; with `above`, not `low`."""
    return field(default=default, metadata={"bounds": (low, high, above)})


def choice(default: str, allowed: tuple[str, ...]) -> Any:
    """A field for one of a few words."""
    return field(default=default, metadata={"allowed": allowed})


@dataclass
class AugmentConfig:
    """Training augmentation. Image and labels always move together."""

    flip: bool = True
    min_scale: float = number(
        1.0, 0.1, 10.0
    )  # of the crop's short-side cover; 1.0 with max_scale 1.0 = no scale-crop
    max_scale: float = number(1.0, 0.1, 10.0)
    color_jitter: float = number(
        0.0, 0.0, 0.99
    )  # brightness, contrast and saturation factors in 1 ± this
    views: int = number(
        0, 0
    )  # n: one of n fixed views of each pair; 0: a new view for every example


@dataclass
class ScenesConfig:
    """The procedural dataset: how many scenes, and how crowded."""

    train_examples: int = number(4096, 1)
    val_examples: int = number(64, 1)
    max_shapes: int = number(4, 1)


@dataclass
class DataConfig:
    source: str = choice("folder", SOURCES)
    root: str = ""  # folder (local or gs://) for every source but "scenes"
    train_split: str = "train"
    val_split: str = "val"
    vocabulary: str = ""  # packaged name ("ade20k_150") or a classes.txt; "" = root/classes.txt
    image_size: tuple[int, int] = number((96, 128), 8, 16384)  # (height, width) the networks see
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    cache_images: bool = False  # keep decoded pairs in memory: for datasets that fit
    cache_latents: bool = False  # write VAE latents once, train without the VAE
    max_unreadable: float = number(
        0.01, 0.0, 1.0
    )  # share of pairs that may be skipped before training stops
    workers: int = number(0, 0, 256)  # Grain worker processes; 0 = threads in this process


@dataclass
class ModelConfig:
    preset: str = "tiny"  # architecture when nothing is loaded: see models/presets.py
    dtype: str = choice("float32", ("float32", "bfloat16"))  # activations; parameters stay float32
    remat: bool = False  # keep what UNet blocks are given, and make the rest again going back
    zero_init: bool = True  # new networks only: last layer of each residual branch starts at zero


@dataclass
class CodecConfig:
    classes_per_pass: int = number(1, 0, 255)  # G; 0 = all K classes in one gray image (the paper)
    context: str = choice("mean", ("mean", "bound"))
    negatives: float = number(
        0.25, 0.0, 1.0
    )  # share of training slots that show a class absent from the image
    threshold: float = number(0.5, 0.0, 1.0)  # scores below it are *other* (255), unless closed
    closed: bool = False  # closed vocabulary: every pixel gets a class


@dataclass
class PromptsConfig:
    templates: tuple[str, ...] = ("a photo of a {class}",)


@dataclass
class DiffusionConfig:
    """Fields as in diffusers' scheduler_config.json."""

    num_train_timesteps: int = number(1000, 1, 100_000)
    beta_start: float = number(0.00085, 0.0, 0.999, above=True)
    beta_end: float = number(0.012, 0.0, 0.999, above=True)
    beta_schedule: str = choice("scaled_linear", BETA_SCHEDULES)
    prediction_type: str = choice("v_prediction", PREDICTIONS)
    timestep_spacing: str = choice("trailing", SPACINGS)
    rescale_betas_zero_snr: bool = True
    set_alpha_to_one: bool = False
    steps_offset: int = number(1, 0)


@dataclass
class NoiseConfig:
    kind: str = choice("annealed", ("annealed", "multires", "gaussian"))
    strength: float = number(0.9, 0.0, 10.0)


@dataclass
class OptimizerConfig:
    method: str = choice("adamw", OPTIMIZERS)  # muon: for matrices and kernels, AdamW for the rest
    learning_rate: float = number(3e-5, 0.0, 1e3)
    warmup_steps: int = number(100, 0)
    decay_steps: int = number(25_000, 1)  # the exponential decay reaches final_fraction here
    final_fraction: float = number(0.01, 0.0, 1.0, above=True)
    clip_norm: float = number(1.0, 0.0, above=True)
    beta1: float = number(0.9, 0.0, 0.999999)
    beta2: float = number(0.999, 0.0, 0.999999)
    epsilon: float = number(1e-8, 0.0, 1.0, above=True)
    weight_decay: float = number(1e-2, 0.0, 1e3)
    accumulation: int = number(1, 1)  # micro-batches per optimiser step
    ema_decay: float = number(0.0, 0.0, 0.999999)  # 0 = no EMA


@dataclass
class TrainConfig:
    steps: int = number(25_000, 1)
    batch_size: int = number(32, 1)  # effective: over all devices and micro-batches
    terminal_share: float = number(
        0.0, 0.0, 1.0
    )  # share of samples at t = T-1, where one-step sampling starts
    balance: float = number(
        0.0, 0.0, 1.0
    )  # γ: positions that show a pass's classes weigh (rest / shown)^γ
    checkpoint_every: int = number(1000, 1)
    keep_checkpoints: int = number(3, 1)
    log_every: int = number(50, 1)
    eval_every: int = number(0, 0)  # 0 = never while training
    eval_examples: int = number(16, 1)
    profile_start: int = number(
        10, 1
    )  # the first step of a profiler trace, for TensorBoard or XProf
    profile_steps: int = number(0, 0)  # its length; 0 = no trace


@dataclass
class VAEConfig:
    """The `vae` stage; with stage = "diffusion" and no init_from it runs first, for these steps."""

    steps: int = number(0, 0)
    batch_size: int = number(16, 1)
    learning_rate: float = number(1e-3, 0.0, 1e3)
    optimizer: str = choice("adamw", OPTIMIZERS)  # the rest is as in `optimizer`
    kl_weight: float = number(1e-6, 0.0, 1e3)
    mask_share: float = number(0.5, 0.0, 1.0)  # share of the batch that is mask images
    mask_mixing: float = number(0.5, 0.0, 1.0)  # share of those that are mixtures of two


@dataclass
class SamplerConfig:
    steps: int = number(10, 1)
    ensemble: int = number(1, 1)
    eta: float = number(0.0, 0.0, 1.0)
    align: str = choice("none", ("affine", "none"))
    reduce: str = choice("median", ("median", "mean"))
    uncertainty: str = choice("mad", ("mad", "std"))
    shortlist: int = number(0, 0)  # M; 0 = every class gets the full budget
    batch_size: int = number(32, 1)  # UNet passes in one compiled call, over all devices


@dataclass
class MeshConfig:
    """Sizes of the axes within a TPU slice (over ICI) and, times those, across slices (DCN)."""

    data: int = number(-1, -1)  # -1 = all remaining devices of a slice
    fsdp: int = number(1, -1)
    tensor: int = number(1, -1)
    dcn_data: int = number(-1, -1)  # -1 = all remaining slices
    dcn_fsdp: int = number(1, -1)
    dcn_tensor: int = number(1, -1)


@dataclass
class Config:
    seed: int = number(0, 0, 2**31 - 1)
    stage: str = choice("diffusion", STAGES)
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


def keys(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """(dotted key, field, value) of every leaf of a config, in the order of declaration."""
    for item in dataclasses.fields(node):
        value, key = getattr(node, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{key}.")
        else:
            yield key, item, value


def validate(config: Config) -> Config:
    """Returns `config`, or raises `UserError` naming the first bad key and the mend."""
    for key, item, value in keys(config):
        _check_declared(f"config.{key}", item, value)
    _impossible_combinations(config)
    return config


def _check_declared(key: str, item: dataclasses.Field[Any], value: Any) -> None:
    """Holds a value against what its field declares."""
    allowed = item.metadata.get("allowed")
    if allowed and value not in allowed:
        raise UserError(f"{key}={value!r}: choose one of {', '.join(allowed)}")
    if "bounds" not in item.metadata:
        return
    low, high, above = item.metadata["bounds"]
    for part in value if isinstance(value, tuple) else (value,):
        if not low <= part <= high or (above and part == low):
            least = f"more than {low}" if above else f"at least {low}"
            bounds = least if high == math.inf else f"{least} and at most {high}"
            raise UserError(f"{key}={value}: must be {bounds}")


def _impossible_combinations(c: Config) -> None:
    if c.sampler.steps > c.diffusion.num_train_timesteps:
        raise UserError(
            f"config.sampler.steps={c.sampler.steps}: must be at most "
            f"config.diffusion.num_train_timesteps={c.diffusion.num_train_timesteps}"
        )
    if c.data.augment.min_scale > c.data.augment.max_scale:
        raise UserError(
            f"config.data.augment.min_scale={c.data.augment.min_scale}: must be at most "
            f"config.data.augment.max_scale={c.data.augment.max_scale}"
        )
    for axis, size in dataclasses.asdict(c.mesh).items():
        if size == 0:
            raise UserError(f"config.mesh.{axis}=0: give a number of devices, or -1 for the rest")
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
