"""DDIM sampling as one `lax.scan`, and ensembles of it.

    key ─► member_keys ─► initial_noise: x_T ─► for t, t_prev of the schedule:
                                                  predict(x_t, t) ─► ddim_step ─► x_{t_prev}
                                            ─► x_0

The sampler knows no network: `predict(sample, t)` is any function from x_t and a scalar int32 t
to a prediction of the schedule's type. The caller closes it over contexts and image latents.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from segdiff_jax.diffusion.noise import STRENGTH, gaussian, multires_noise
from segdiff_jax.diffusion.schedule import (
    Schedule,
    ddim_step,
    previous_timesteps,
    sampling_timesteps,
)
from segdiff_jax.shapes import Keys, Sample

Predict = Callable[[Sample, jax.Array], Sample]  # (x_t, t int32 []) -> prediction


def sample(
    predict: Predict,
    schedule: Schedule,
    latents: Sample,
    steps: int,
    eta: float = 0.0,
    key: jax.Array | None = None,
) -> Sample:
    """Run the reverse process from `latents` (x_T, any shape) to x_0 of the same shape.

    `steps` and `eta` are static. `key` is needed only for eta > 0; step i then adds
    `step_noise(key, i, latents.shape)`. Raises `UserError` for `steps` outside 1 ... T.
    """
    if eta > 0 and key is None:
        raise ValueError("sample: eta > 0 draws fresh noise and needs a key")
    timesteps = jnp.asarray(sampling_timesteps(schedule, steps))
    previous = jnp.asarray(previous_timesteps(schedule, steps))

    def step(x: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        index, t, t_prev = inputs
        noise = None
        if key is not None and eta > 0:
            noise = step_noise(key, index, x.shape).astype(x.dtype)
        x_prev = ddim_step(schedule, predict(x, t), x, t, t_prev, eta, noise)
        return x_prev.astype(x.dtype), None

    inputs = jnp.arange(steps), timesteps, previous
    if steps == 1:
        # Not as a loop: on CPUs, XLA differentiates convolutions in one ten times as slowly.
        return step(latents, tuple(x[0] for x in inputs))[0]
    return jax.lax.scan(step, latents, inputs)[0]


def step_noise(key: jax.Array, index: jax.typing.ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Draw the Gaussian noise that `sample` adds at step `index` when eta > 0."""
    return gaussian(jax.random.fold_in(key, index), shape)


def member_keys(key: jax.Array, count: int) -> Keys:
    """Return keys [count] of the members 0 ... count - 1.

    Member k's key is fold_in(key, k): it depends neither on how many members there are nor on
    the batch in which k is drawn.
    """
    return jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(count))


def initial_noise(
    member_key: jax.Array, shape: tuple[int, ...], kind: str = "gaussian"
) -> jax.Array:
    """Draw x_T of one member, by the names of `config.STARTS`.

    "multires" is the noise of training at its usual strength, for a `shape` of [h, w, c].
    """
    if kind == "zero":
        return jnp.zeros(shape)
    key = jax.random.split(member_key)[0]
    if kind == "multires":
        height, width, channels = shape
        return multires_noise(key, (height, width, channels), STRENGTH)
    return gaussian(key, shape)


def sample_member(
    predict: Predict,
    schedule: Schedule,
    member_key: jax.Array,
    shape: tuple[int, ...],
    steps: int,
    eta: float = 0.0,
    start: str = "gaussian",
) -> jax.Array:
    """Sample one member of an ensemble: x_0 of `shape`, all its noise drawn from `member_key`.

    start: the kind of its `initial_noise`. An ensemble is `vmap` of this over `member_keys`, or
    over slices of them to bound memory.
    """
    step_key = jax.random.split(member_key)[1]
    latents = initial_noise(member_key, shape, start)
    return sample(predict, schedule, latents, steps, eta, step_key)
