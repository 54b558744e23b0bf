"""What can be configured, and which combinations make sense.

Every experiment in `configs/` returns one `Config`. The dataclasses are mutable only so that
`--config.a.b=v` can override a field; `validate` runs once after that and nothing writes later.

Every number is declared with `number` and every word with fixed choices with `choice`, so that its
bounds stand beside it and no key can be without a check. What makes no sense together is in
`combinations`.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from segdiff_jax import __version__, combinations, fields, stages
from segdiff_jax.errors import UserError
from segdiff_jax.fields import choice, number
from segdiff_jax.files import check_scheme

STAGES = ("vae", "diffusion", "e2e", "joint")
OPTIMIZERS = ("adamw", "muon")
BETA_SCHEDULES = ("scaled_linear", "linear")
PREDICTIONS = ("v_prediction", "epsilon", "sample")
DECODERS = ("vae", "linear", "tiny", "joint")
STARTS = ("gaussian", "zero", "multires")  # of the sampler: x_T
SPACINGS = ("trailing", "leading", "linspace")
PATHS = ("data.root", "data.vocabulary", "init_from", "init_tokenizer")  # name files or folders
SOURCES = (
    *("scenes", "folder", "ade20k", "ade20k_847", "coco_stuff", "pascal_voc", "pascal_voc_20b"),
    *("pascal_context_59", "pascal_context_459", "cityscapes", "tfds"),
    *("coco_instances", "coco_panoptic"),
)
FITS = ("pad", "stretch")  # a photo keeps its aspect ratio, or is as wide and high as the view
USES = ("model", "evaluate", "train")  # of a config, from what asks least of it
VERSION_KEY = "segdiff_jax_version"  # beside a stored config: the package that wrote it


@dataclass
class AugmentConfig:
    """Training augmentation. Image and labels always move together."""

    flip: bool = True  # mirror half of the views
    min_scale: float = number(1.0, 0.1, 10.0)  # of the scale that fits; 1.0 to 1.0 = no crop
    max_scale: float = number(1.0, 0.1, 10.0)  # at least min_scale
    color_jitter: float = number(0.0, 0.0, 0.99)  # brightness, contrast, saturation in 1 ± this
    views: int = number(0, 0)  # n: one of n fixed views of each pair; 0: new for every example


@dataclass
class ScenesConfig:
    """The procedural dataset: how many scenes, and how crowded."""

    train_examples: int = number(4096, 1)  # scenes
    val_examples: int = number(64, 1)  # scenes
    max_shapes: int = number(4, 1)  # in one scene; at least two where it allows


@dataclass
class DataConfig:
    source: str = choice("folder", SOURCES)  # layout of the files: docs/data.md
    root: str = ""  # folder (local or gs://) for every source but "scenes"
    train_split: str = "train"  # folder or list of that name
    val_split: str = "val"  # as train_split
    vocabulary: str = ""  # packaged name ("ade20k_150") or a classes.txt; "" = root/classes.txt
    first_id: int = number(0, 0, 65535)  # folder: the first class's id in the masks; below: ignored
    mask_values: tuple[int, ...] = number((), 0, 65535)  # folder: id of each class; () = in order
    ignore_ids: tuple[int, ...] = number((255,), 0, 65535)  # folder: ids in the masks to ignore
    mask_suffix: str = ""  # folder: "_mask" pairs a.jpg with a_mask.png
    exif: str = choice("apply", ("apply", "ignore"))  # turn photos and masks as their tags say
    max_value: int = number(0, 0, 65535)  # white in 16-bit gray photos; 0 = by each photo's range
    max_pixels: int = number(89_478_485, 1)  # larger images are not read
    image_size: tuple[int, int] = number((96, 128), 8, 16384)  # (height, width) the networks see
    fit: str = choice("pad", FITS)  # how a photo of another shape gets there: data/geometry.py
    shortest: int = number(0, 0, 65535)  # side to which evaluation shrinks larger pairs; 0 = never
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    cache_images: bool = False  # keep decoded pairs in memory: for datasets that fit
    cache_latents: bool = False  # write VAE latents once, train without the VAE
    class_balance: bool = False  # ask for rare classes more often, by inverse frequency
    max_unreadable: float = number(0.01, 0.0, 1.0)  # share of pairs that training may skip
    workers: int = number(0, 0, 256)  # Grain worker processes; 0 = threads in this process


@dataclass
class ModelConfig:
    preset: str = "tiny"  # architecture when nothing is loaded: see models/presets.py
    dtype: str = choice("float32", ("float32", "bfloat16"))  # activations; parameters stay float32
    remat: bool = False  # save only the inputs of UNet blocks, recompute the rest going back
    zero_init: bool = True  # new networks only: last layer of each residual branch starts at zero


@dataclass
class CodecConfig:
    classes_per_pass: int = number(1, 0, 255)  # G; 0 = all K classes in one gray image (the paper)
    context: str = choice("mean", ("mean", "bound"))  # one mean, or a token a class
    negatives: float = number(0.25, 0.0, 1.0)  # share of training slots with an absent class
    threshold: float = number(0.5, 0.0, 1.0)  # scores below it are *other* (255), unless closed
    closed: bool = False  # closed vocabulary: every pixel gets a class
    logit_adjustment: float = number(0.0, 0.0, 2.0)  # τ: how much more easily rare classes win


@dataclass
class PromptsConfig:
    templates: tuple[str, ...] = ("a photo of a {class}",)  # or sets by name: text/prompts.py


@dataclass
class DiffusionConfig:
    """Fields as in diffusers' scheduler_config.json."""

    num_train_timesteps: int = number(1000, 2, 100_000)  # T
    beta_start: float = number(0.00085, 1e-6, 0.999)  # variance of the noise at step 0
    beta_end: float = number(0.012, 1e-6, 0.999)  # at step T - 1
    beta_schedule: str = choice("scaled_linear", BETA_SCHEDULES)  # linear in √β, or in β
    prediction_type: str = choice("v_prediction", PREDICTIONS)  # what the UNet answers
    timestep_spacing: str = choice("trailing", SPACINGS)  # of the sampler's steps
    rescale_betas_zero_snr: bool = True  # pure noise at T - 1: arXiv 2305.08891
    set_alpha_to_one: bool = False  # of the last step; False: that of step 0
    steps_offset: int = number(1, 0, 100_000)  # timesteps added under leading spacing
    convert_prediction: bool = False  # let the UNet of init_from learn another prediction_type


@dataclass
class NoiseConfig:
    kind: str = choice("annealed", ("annealed", "multires", "gaussian"))
    strength: float = number(0.9, 0.0, 10.0)  # s: level i weighs sⁱ


@dataclass
class OptimizerConfig:
    method: str = choice("adamw", OPTIMIZERS)  # muon: for matrices and kernels, AdamW for the rest
    learning_rate: float = number(3e-5, 0.0, 1e3)  # after the warm-up
    warmup_steps: int = number(100, 0)  # linear; step 0 has 1 / warmup_steps of the rate
    decay_steps: int = number(25_000, 1)  # the exponential decay reaches final_fraction here
    final_fraction: float = number(0.01, 0.0, 1.0, above=True)  # of learning_rate; 1 = no decay
    clip_norm: float = number(1.0, 0.0, 1e30, above=True)  # largest global norm of gradients
    beta1: float = number(0.9, 0.0, 0.999999)  # decay of the mean of gradients, a step
    beta2: float = number(0.999, 0.0, 0.999999)  # decay of the mean of their squares
    epsilon: float = number(1e-8, 1e-30, 1.0)  # float32 knows nothing much smaller
    weight_decay: float = number(1e-2, 0.0, 1e3)  # times the learning rate, a step
    accumulation: int = number(1, 1)  # micro-batches per optimiser step
    ema_decay: float = number(0.0, 0.0, 0.999999)  # 0 = no EMA


@dataclass
class TrainConfig:
    steps: int = number(25_000, 1)  # of the optimiser
    batch_size: int = number(32, 1, 1_000_000)  # effective: over all devices and micro-batches
    terminal_share: float = number(0.0, 0.0, 1.0)  # of samples at t = T-1, where one step starts
    balance: float = number(0.0, 0.0, 1.0)  # γ: where a pass's classes are weighs (rest / shown)^γ
    hard_negatives: float = number(0.0, 0.0, 1.0)  # of absent classes: by likeness of prompts
    checkpoint_every: int = number(1000, 1)  # steps
    keep_checkpoints: int = number(3, 1)  # newest, and the best
    log_every: int = number(50, 1)  # steps
    eval_every: int = number(0, 0)  # 0 = never while training
    eval_examples: int = number(16, 1)  # images of the validation split
    profile_start: int = number(10, 1)  # first step of a profiler trace (TensorBoard, XProf)
    profile_steps: int = number(0, 0)  # its length; 0 = no trace


@dataclass
class VAEConfig:
    """The VAE stage: by itself with stage = "vae"; with "diffusion" and no init_from it runs first.

    It takes these in place of those in `train` and `optimizer`; warm-up, clipping, betas and
    epsilon are the optimizer's, checkpoints and logging those of `train`. No gradients are
    accumulated.
    """

    steps: int = number(0, 0)  # the learning rate's decay ends with them
    batch_size: int = number(16, 1, 1_000_000)  # over all devices
    learning_rate: float = number(1e-3, 0.0, 1e3)  # after the warm-up
    optimizer: str = choice("adamw", OPTIMIZERS)  # as optimizer.method
    final_fraction: float = number(0.1, 0.0, 1.0, above=True)  # as optimizer.final_fraction
    weight_decay: float = number(0.0, 0.0, 1e3)  # as optimizer.weight_decay
    ema_decay: float = number(0.0, 0.0, 0.999999)  # 0 = no EMA
    kl_weight: float = number(1e-6, 0.0, 1e3)  # of the KL term, in the loss of a pixel
    mask_share: float = number(0.5, 0.0, 1.0)  # share of the batch that is mask images
    mask_mixing: float = number(0.5, 0.0, 1.0)  # share of those that are mixtures of two


@dataclass
class E2EConfig:
    """The single-step stage, stage = "e2e": the UNet of `init_from`, trained on decoded labels.

    Steps, batches and optimiser are those of `train` and `optimizer`.
    """

    classes: int = number(4, 1, 255)  # that compete for a photo's pixels; a pass of the UNet each
    # Where its one step starts, and where sampling then does.
    noise: str = choice("zero", ("gaussian", "zero"))
    decoder: str = choice("vae", ("vae", "linear"))  # that the gradient comes through


@dataclass
class JointConfig:
    """The joint decoder, which sees the photo beside the maps: trained last, where it has steps.

    Warm-up, clipping, betas, epsilon and EMA are the optimizer's; the method is Muon. No gradients
    are accumulated.
    """

    steps: int = number(0, 0)  # 0 = none; the learning rate's decay ends with them
    batch_size: int = number(8, 1, 1_000_000)  # photos, over all devices
    classes: int = number(8, 1, 255)  # asked of a photo in a step; a pass of the UNet each
    learning_rate: float = number(6e-3, 0.0, 1e3)  # after the warm-up
    final_fraction: float = number(0.1, 0.0, 1.0, above=True)  # as optimizer.final_fraction
    weight_decay: float = number(0.01, 0.0, 1e3)  # as optimizer.weight_decay


@dataclass
class SamplerConfig:
    steps: int = number(10, 1)  # T of DDIM: calls of the UNet for a map
    ensemble: int = number(1, 1, 10_000)  # N: maps that are merged
    eta: float = number(0.0, 0.0, 1.0)  # 0 = deterministic DDIM, 1 = DDPM
    initial_noise: str = choice("gaussian", STARTS)  # as the UNet was trained: see e2e.noise
    align: str = choice("none", ("affine", "none"))  # of members: scale and shift fitted, or not
    reduce: str = choice("median", ("median", "mean"))  # of members to one map
    uncertainty: str = choice("mad", ("mad", "std"))  # of members: median or standard deviation
    decoder: str = choice("vae", DECODERS)  # of mask latents: see docs/method.md
    shortlist: int = number(0, 0)  # M; 0 = every class gets the full budget
    batch_size: int = number(32, 1, 1_000_000)  # UNet passes in one compiled call, over all devices
    tiles: int = number(0, 0, 1000)  # windows along a large photo; 0 = none


@dataclass
class MeshConfig:
    """Sizes of the axes within a TPU slice (over ICI) and, times those, across slices (DCN)."""

    data: int = number(-1, -1)  # -1 = all remaining devices of a slice
    fsdp: int = number(1, -1)  # parts of each array, gathered for use
    tensor: int = number(1, -1)  # parts of heads and hidden channels
    dcn_data: int = number(-1, -1)  # -1 = all remaining slices
    dcn_fsdp: int = number(1, -1)  # times fsdp
    dcn_tensor: int = number(1, -1)  # times tensor


@dataclass
class Config:
    seed: int = number(0, 0, 2**31 - 1)  # of networks, data, noise and sampling
    stage: str = choice("diffusion", STAGES)  # e2e: single-step, on decoded labels
    init_from: str = ""  # workdir, Hugging Face folder or repo id, or a .safetensors; "" = nothing
    init_tokenizer: str = ""  # where init_from is one file: folder or repo id of its tokenizer
    init_variant: str = ""  # of init_from's weights, such as fp16 or non_ema; "" = the plain files
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    e2e: E2EConfig = field(default_factory=E2EConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


def _check_path(key: str, value: str) -> None:
    if not value.strip():
        raise UserError(f"config.{key}={value!r}: an empty path: is a shell variable not set?")
    try:
        check_scheme(value)
    except UserError as error:
        raise UserError(f"config.{key}: {error}") from error


def validate(config: Config, use: str = "train") -> Config:
    """Returns `config`, or raises `UserError` naming the first bad key and the mend.

    `use`, one of `USES`, says what of it has to make sense: to read a model, nothing needs to be
    known of data and training.
    """
    for key, item, value in fields.leaves(config):
        fields.check(f"config.{key}", item, value)
        if key in PATHS and value:
            _check_path(key, value)
    combinations.check(config, stages.of_stage(config), use)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain JSON values."""
    return dataclasses.asdict(config)


def stored(config: Config) -> dict[str, Any]:
    """`to_dict` with the package's version beside it: what is written to files."""
    return {VERSION_KEY: __version__, **to_dict(config)}


def from_dict(values: Any, where: str = "") -> Config:
    """The inverse of `to_dict` and of `stored`; `where` is the file that `values` come from.

    Raises `UserError` for values that `validate` would refuse, and for unknown keys; if a newer
    version wrote the file, it says so.
    """
    version = values.get(VERSION_KEY) if isinstance(values, dict) else None
    with reading_of(version, where):
        if isinstance(values, dict):
            values = {key: value for key, value in values.items() if key != VERSION_KEY}
            if isinstance(values.get("data"), dict):  # before there was a choice
                values["data"] = {"fit": "stretch"} | values["data"]
        return validate(fields.build(Config, values, "config"), "model")


@contextlib.contextmanager
def reading_of(version: Any, where: str = "") -> Iterator[None]:
    """Adds to a `UserError` the file that was read and, if newer, the `version` that wrote it."""
    try:
        yield
    except UserError as error:
        place = f"{where}: " if where else ""
        newer = _numbers(version) > _numbers(__version__)
        hint = f": written by version {version}, this is {__version__}: update segdiff_jax"
        raise UserError(f"{place}{error}{hint if newer else ''}") from error


def _numbers(version: Any) -> tuple[int, ...]:
    """(0, 1, 0) of "0.1.0"; of anything else nothing, which is older than all."""
    plain = isinstance(version, str) and re.match(r"\d{1,9}(\.\d{1,9})*", version)
    return tuple(int(part) for part in plain[0].split(".")) if plain else ()
