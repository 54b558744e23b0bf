"""The training step of each stage: a pure function of state, batch, key and frozen constants.

    batch ─► weights of positions, timesteps and noise for the global batch   (by key and step)
          ─► micro-batches ─► loss, gradient ─► their sum
    gradient ─► clip, optimiser ─► parameters ─► EMA ─► the next state, metrics

Parameters are float32 and sharded. Each step rounds them to the dtype of their layer, gathers
them over replicas, and scatters the gradient as the state is sharded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax.config import Config
from segdiff_jax.diffusion import sampler as samplers
from segdiff_jax.diffusion.noise import gaussian
from segdiff_jax.models.joint_decoder import JointDecoder
from segdiff_jax.models.layers import kernels_as_multiplied
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE
from segdiff_jax.parallel import rules
from segdiff_jax.parallel.mesh import replicated
from segdiff_jax.training import losses
from segdiff_jax.training.optimizer import ema_update, learning_rate, make_optimizer

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything a checkpoint holds. `ema` is empty when `optimizer.ema_decay` is 0."""

    step: jax.Array  # int32, optimiser steps done
    params: Any  # float32
    opt_state: Any  # moments, float32
    ema: Any  # float32, like params


# (state, `losses.Frozen` or None, batch, key) -> (state, metrics)
StepFunction = Callable[[TrainState, Any, losses.Batch, jax.Array], Any]


def init_state(params: Any, config: Config) -> TrainState:
    """Return the state at step 0; works on arrays and, under `jax.eval_shape`, on their shapes."""
    # Copies: the step donates its buffers, and EMA may not share them with the parameters.
    ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else {}
    opt_state = make_optimizer(config.optimizer).init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, ema)


def jitted(step: StepFunction, state: TrainState, mesh: Mesh) -> Any:
    """Put `step` under `jit`: the state keeps its sharding and its buffers are donated."""
    shardings = rules.state_sharding(state, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def diffusion_step(
    unet: nnx.GraphDef[UNet], vae: nnx.GraphDef[VAE], config: Config, mesh: Mesh | None = None
) -> StepFunction:
    """Return `step(state, frozen, batch, key) -> (state, metrics)` of the diffusion stage.

    State and batch are sharded over `mesh`; None stands for one device. `key` is the run's; the
    step folds `state.step` into it, so a resumed run draws what an uninterrupted one would draw.
    """

    def draw(key: jax.Array, frozen: losses.Frozen, batch: losses.Batch) -> Any:
        architecture = frozen.vae.config
        weights = losses.latent_weights(batch, architecture.downsampling, config.train.balance)
        shape = *weights.shape, architecture.latent_channels  # [B, h, w, c]
        share = config.train.terminal_share
        return losses.corrupt(key, shape, frozen.schedule, config.noise, share), weights

    return _step(unet, vae, draw, losses.diffusion_loss, config, mesh)


def e2e_step(
    unet: nnx.GraphDef[UNet], vae: nnx.GraphDef[VAE], config: Config, mesh: Mesh | None = None
) -> StepFunction:
    """Return `step` of the single-step stage; the rest is as of `diffusion_step`."""
    return _step(unet, vae, _draw_starts(config.e2e.noise), losses.e2e_loss, config, mesh)


def joint_step(
    decoder: nnx.GraphDef[JointDecoder],
    unet: nnx.GraphDef[UNet],
    vae: nnx.GraphDef[VAE],
    config: Config,
    mesh: Mesh | None = None,
) -> StepFunction:
    """Return `step` of the joint decoder's stage; the rest is as of `diffusion_step`."""

    def loss_of(module, frozen, *rest):
        return losses.joint_loss(module, frozen._replace(unet=nnx.merge(unet, frozen.unet)), *rest)

    return _step(decoder, vae, _draw_starts(config.sampler.initial_noise), loss_of, config, mesh)


# (key, frozen, batch) -> (what is drawn for each row, the weights of the loss)
_Draw = Callable[[jax.Array, losses.Frozen, losses.Batch], Any]


def _draw_starts(kind: str) -> _Draw:
    """Draw what one step of the sampler begins with; kind: as config.sampler.initial_noise."""

    def draw(key: jax.Array, frozen: losses.Frozen, batch: losses.Batch) -> Any:
        factor, channels = frozen.vae.config.downsampling, frozen.vae.config.latent_channels
        count, height, width = batch["labels"].shape
        shape = (height // factor, width // factor, channels)
        # All classes of a photo start from the same noise, as in the sampler.
        keys = jax.random.split(key, count)
        noise = jax.vmap(lambda k: samplers.initial_noise(k, shape, kind))(keys)
        return noise, losses.label_weights(batch)

    return draw


def _step(
    network: nnx.GraphDef,
    vae: nnx.GraphDef[VAE],
    draw: _Draw,
    loss_of: Callable[..., jax.Array],
    config: Config,
    mesh: Mesh | None,
) -> StepFunction:
    """Return `step` of a stage that trains `network` on photos which a frozen VAE encodes.

    loss_of: (network, frozen, rows, drawn, weights, config) -> loss, additive over rows.
    """

    def step(state: TrainState, frozen: losses.Frozen, batch: losses.Batch, key: jax.Array):
        frozen = frozen._replace(vae=nnx.merge(vae, frozen.vae))
        drawn, weights = draw(jax.random.fold_in(key, state.step), frozen, batch)

        def loss_fn(params, micro):
            return loss_of(nnx.merge(network, params), frozen, *micro, config)

        params = _for_use(network, state.params, mesh)
        everything, rounds = (batch, drawn, weights), config.optimizer.accumulation
        loss, grads = _accumulate(_grad_fn(loss_fn, mesh), params, everything, rounds)
        return _update(state, grads, {"loss": loss}, config)

    return step


def vae_step(vae: nnx.GraphDef[VAE], config: Config, mesh: Mesh | None = None) -> StepFunction:
    """Return `step(state, None, batch, key) -> (state, metrics)` of the VAE stage."""

    def step(state: TrainState, frozen: None, batch: losses.Batch, key: jax.Array):
        def loss_fn(params):
            module = nnx.merge(vae, params)
            factor, channels = module.config.downsampling, module.config.latent_channels
            count, height, width = batch["labels"].shape
            shape = (count, height // factor, width // factor, channels)
            noise_key, mixing_key = jax.random.split(jax.random.fold_in(key, state.step))
            return losses.vae_loss(
                module,
                batch,
                gaussian(noise_key, shape),
                losses.mixing(mixing_key, count, config.vae.mask_mixing),
                is_mask=losses.mask_rows(count, config.vae.mask_share),
                kl_weight=config.vae.kl_weight,
            )

        params = _for_use(vae, state.params, mesh)
        (loss, parts), grads = _grad_fn(loss_fn, mesh, has_aux=True)(params)
        return _update(state, grads, {"loss": loss, **parts}, config)

    return step


def _for_use(network: nnx.GraphDef, params: Any, mesh: Mesh | None) -> Any:
    """Round parameters to the dtype of their layer, then gather them from the replicas."""
    params = kernels_as_multiplied(network, params)
    return params if mesh is None else rules.gathered(params, mesh)


def _grad_fn(loss_fn: Callable, mesh: Mesh | None, has_aux: bool = False) -> Callable:
    """Return loss and gradient, in float32 and sharded as the state is.

    The sum over replicas may then be a reduce-scatter, so that no chip holds the whole gradient.
    """

    def value_and_grad(params: Any, *inputs: Any) -> tuple[Any, Any]:
        value, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(params, *inputs)
        grads = grads if mesh is None else rules.scattered(grads, mesh)
        return value, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    return value_and_grad


def _accumulate(grad_fn: Callable, params: Any, batch: Any, count: int) -> tuple[jax.Array, Any]:
    """Return loss and gradient of the whole batch as the sum over `count` slices of it."""
    if count == 1:
        return grad_fn(params, batch)
    # A slice takes every count-th row, so that it has rows of every chip.
    slices = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, grad_fn(params, micro)), None

    zero = (jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros(p.shape), params))
    return jax.lax.scan(add, zero, slices)[0]


def _update(
    state: TrainState, grads: Any, metrics: Metrics, config: Config
) -> tuple[TrainState, Metrics]:
    optimizer = make_optimizer(config.optimizer)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = config.optimizer.ema_decay
    ema = ema_update(state.ema, params, decay, state.step) if decay else state.ema
    # The norm is not of `updates`: with them XLA makes two passes over the state, with this one.
    applied = jax.tree.map(jnp.subtract, params, state.params)
    metrics = {
        **metrics,
        "learning_rate": learning_rate(config.optimizer)(state.step),
        "gradient_norm": optax.global_norm(grads),
        "update_norm": optax.global_norm(applied),
    }
    return TrainState(state.step + 1, params, opt_state, ema), metrics
