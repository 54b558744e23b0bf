"""AdamW with warm-up, exponential decay and gradient clipping; the moving average of parameters.

Gradient accumulation is not here: the training step scans over micro-batches and hands the
optimiser one mean gradient, so that schedule, moments and EMA count optimiser steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from segdiff_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate of optimiser step 0, 1, 2, … (a float or a traced integer).

    Linear warm-up, (step + 1) / warmup_steps up to 1, times exponential decay that reaches
    `final_fraction` at `decay_steps` and stays there. `final_fraction=1` is constant.
    """

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
        progress = jnp.minimum(step / max(config.decay_steps, 1), 1.0)
        return config.learning_rate * warmup * config.final_fraction**progress

    return schedule


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW (Loshchilov & Hutter, arXiv 1711.05101).

    The update is that of `torch.optim.AdamW` after `clip_grad_norm_`: epsilon outside the square
    root, weight decay scaled by the learning rate and applied to every parameter. Torch adds 1e-6
    to the norm it divides by and this does not, a relative difference of 1e-6 / norm in gradients
    that Adam then normalises.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        ),
    )


def ema_update(ema: Any, params: Any, decay: float, step: Any) -> Any:
    """The moving average after optimiser step `step` (0, 1, …; may be traced) made `params`.

    `decay` is approached as (1 + step) / (10 + step), so that the random start is soon forgotten.
    Both trees have the same structure and shapes; `ema` keeps its dtypes.
    """
    step = jnp.asarray(step, jnp.float32)
    keep = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: (e + (1 - keep) * (p - e)).astype(e.dtype), ema, params)
