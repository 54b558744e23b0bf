"""The noise schedule of the forward process, and one DDIM step of the reverse one.

Notation: a_t is the cumulative product of 1 - beta, so x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps.
Field names and conventions are those of diffusers' `scheduler_config.json`, so a published
Stable Diffusion folder means the same thing here.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from segdiff_jax.config import DiffusionConfig
from segdiff_jax.errors import UserError
from segdiff_jax.shapes import Leaf, Sample


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("alphas_cumprod", "final_alpha_cumprod"),
    meta_fields=("prediction_type", "timestep_spacing", "steps_offset"),
)
@dataclass(frozen=True)
class Schedule:
    """A pytree: the two arrays are leaves, the rest is static under `jit`."""

    alphas_cumprod: Leaf  # [T] float32, a_t
    final_alpha_cumprod: Leaf  # [] float32, stands for a_t at t < 0
    prediction_type: str  # as in `DiffusionConfig`, like the next two
    timestep_spacing: str
    steps_offset: int

    @property
    def num_train_timesteps(self) -> int:
        return self.alphas_cumprod.shape[0]


def make_schedule(config: DiffusionConfig) -> Schedule:
    """Build the float32 schedule of `config`. Raise `UserError` if float32 cannot hold it.

    Rounded to float32 where diffusers rounds: 1 - a_t is small at early timesteps, and dividing
    by it turns the last bit of a_t into a difference of 1e-5 between the two.
    """
    betas = _betas(config)
    if config.rescale_betas_zero_snr:
        with np.errstate(invalid="ignore"):
            betas = _rescale_zero_terminal_snr(betas)
    alphas_cumprod = _cumprod(np.float32(1.0) - betas)
    least = alphas_cumprod.min()
    if not np.isfinite(alphas_cumprod).all() or (least == 0 and not config.rescale_betas_zero_snr):
        raise UserError(
            f"config.diffusion.beta_start={config.beta_start}, beta_end={config.beta_end}: must be "
            f"less: of {config.num_train_timesteps} timesteps the last have no signal left"
        )
    final = 1.0 if config.set_alpha_to_one else alphas_cumprod[0]
    return Schedule(
        alphas_cumprod=jnp.asarray(alphas_cumprod, jnp.float32),
        final_alpha_cumprod=jnp.asarray(final, jnp.float32),
        prediction_type=config.prediction_type,
        timestep_spacing=config.timestep_spacing,
        steps_offset=config.steps_offset,
    )


def _cumprod(alphas: np.ndarray) -> np.ndarray:
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _betas(config: DiffusionConfig) -> np.ndarray:
    start, end, count = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.beta_schedule == "linear":
        return np.linspace(start, end, count).astype(np.float32)
    return np.linspace(start**0.5, end**0.5, count).astype(np.float32) ** 2


def _rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift sqrt(a_t) to end at 0, scale it to start as before (arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(_cumprod(np.float32(1.0) - betas))
    first, last = root[0], root[-1]
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    alphas = np.append(alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1])
    return np.float32(1.0) - alphas


def _coefficients(schedule: Schedule, t: ArrayLike, ndim: int) -> tuple[jax.Array, jax.Array]:
    """Return sqrt(a_t) and sqrt(1 - a_t), shaped to broadcast against `ndim` dimensions."""
    alpha = schedule.alphas_cumprod[jnp.asarray(t)]
    alpha = alpha.reshape(alpha.shape + (1,) * (ndim - alpha.ndim))
    return jnp.sqrt(alpha), jnp.sqrt(1.0 - alpha)


def add_noise(schedule: Schedule, x0: Sample, noise: Sample, t: ArrayLike) -> Sample:
    """Return x_t. `x0` and `noise` are [B, ...] with `t` int [B], or any shape with scalar `t`."""
    signal, sigma = _coefficients(schedule, t, x0.ndim)
    return signal * x0 + sigma * noise


def velocity(schedule: Schedule, x0: Sample, noise: Sample, t: ArrayLike) -> Sample:
    """Return v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (arXiv 2202.00512). Shapes: `add_noise`."""
    signal, sigma = _coefficients(schedule, t, x0.ndim)
    return signal * noise - sigma * x0


def target(schedule: Schedule, x0: Sample, noise: Sample, t: ArrayLike) -> Sample:
    """Return what the network is trained to predict. Shapes: `add_noise`."""
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "sample":
        return x0
    return velocity(schedule, x0, noise, t)


def to_x0_and_noise(
    schedule: Schedule, prediction: Sample, sample: Sample, t: ArrayLike
) -> tuple[Sample, Sample]:
    """Return the (x_0, eps) that a prediction at x_t = `sample` implies. Shapes: `add_noise`.

    Epsilon prediction divides by sqrt(a_t), so it is not finite at zero SNR; `combinations`
    rejects those two together.
    """
    signal, sigma = _coefficients(schedule, t, sample.ndim)
    if schedule.prediction_type == "epsilon":
        return (sample - sigma * prediction) / signal, prediction
    if schedule.prediction_type == "sample":
        return prediction, (sample - signal * prediction) / sigma
    return signal * sample - sigma * prediction, signal * prediction + sigma * sample


def sampling_timesteps(schedule: Schedule, steps: int) -> np.ndarray:
    """Return the timesteps of a `steps`-step sampler, descending, int32 [steps].

    Table 2 of arXiv 2305.08891, rounded as diffusers does, but for one step: that is taken from
    T - 1 whatever the spacing. `leading` and `linspace` would ask for it at the end of the process,
    about a sample of pure noise that the network takes to be nearly clean.

    Raises `UserError` if `steps` is not in 1 ... T, or if `leading` with this `steps_offset` would
    start beyond T - 1.
    """
    total = schedule.num_train_timesteps
    if not 1 <= steps <= total:
        raise UserError(
            f"config.sampler.steps={steps}: must be between 1 and {total}, the training timesteps"
        )
    timesteps: np.ndarray
    if steps == 1:
        timesteps = np.array([total - 1])
    elif schedule.timestep_spacing == "linspace":
        timesteps = np.linspace(0, total - 1, steps).round()[::-1]
    elif schedule.timestep_spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (total // steps) + schedule.steps_offset
    else:
        # arange can overshoot by one element when total / steps is inexact.
        timesteps = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
    if timesteps[0] >= total:
        raise UserError(
            f"config.sampler.steps={steps}: leading spacing with steps_offset="
            f"{schedule.steps_offset} starts at {timesteps[0]:g}, past {total - 1}: use fewer steps"
        )
    return timesteps.astype(np.int32)


def previous_timesteps(schedule: Schedule, steps: int) -> np.ndarray:
    """Return where each step of `sampling_timesteps` lands, int32 [steps]; negative is x_0.

    That is the next sampling timestep, at which the network is asked next. In diffusers it is
    t - T // steps: the same where steps divides T and the spacing is trailing or leading, elsewhere
    a noise level that the next step then mistakes.
    """
    timesteps = sampling_timesteps(schedule, steps)
    return np.append(timesteps[1:], np.int32(-1))


def ddim_step(
    schedule: Schedule,
    prediction: Sample,
    sample: Sample,
    t: ArrayLike,
    t_prev: ArrayLike,
    eta: float | jax.Array = 0.0,
    noise: Sample | None = None,
) -> Sample:
    """Step from x at `t` to x at `t_prev` (arXiv 2010.02502, equations 12 and 16).

    `t_prev` < 0 means the final a_t. `eta` scales the standard deviation of the fresh `noise`
    (0: deterministic DDIM, 1: DDPM); without `noise` none is added. Shapes as in `add_noise`.
    """
    x0, eps = to_x0_and_noise(schedule, prediction, sample, t)
    alpha = schedule.alphas_cumprod[jnp.asarray(t)]
    t_prev = jnp.asarray(t_prev)
    alpha_prev = jnp.where(
        t_prev < 0,
        schedule.final_alpha_cumprod,
        schedule.alphas_cumprod[jnp.maximum(t_prev, 0)],
    )
    variance = (1.0 - alpha_prev) / (1.0 - alpha) * (1.0 - alpha / alpha_prev)
    # Both radicands are >= 0 exactly; the clamps stop rounding from making NaN of a zero.
    std = eta * jnp.sqrt(jnp.maximum(variance, 0.0))
    direction = jnp.sqrt(jnp.maximum(1.0 - alpha_prev - std**2, 0.0))

    def wide(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape + (1,) * (sample.ndim - x.ndim))

    previous = wide(jnp.sqrt(alpha_prev)) * x0 + wide(direction) * eps
    return previous if noise is None else previous + wide(std) * noise
