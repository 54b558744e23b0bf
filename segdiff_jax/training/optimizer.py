"""AdamW or Muon: warm-up, exponential decay, gradient clipping; the moving average of parameters.

Gradient accumulation is not here: the training step scans over micro-batches and hands the
optimiser one mean gradient, so that schedule, moments and EMA count optimiser steps.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from segdiff_jax.config import OptimizerConfig

# By number of axes: those that are summed over where an array is applied, and those of the result.
_MATRIX = {
    2: contrib.MuonDimensionNumbers((0,), (1,)),
    4: contrib.MuonDimensionNumbers((0, 1, 2), (3,)),
}


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Return the learning rate of optimiser step 0, 1, 2, … (a float or a traced integer).

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
    """Chain global-norm clipping and the optimiser that `config.method` names.

    adamw: Loshchilov & Hutter, arXiv 1711.05101. The update is that of `torch.optim.AdamW` after
    `clip_grad_norm_`: epsilon outside the square root, weight decay scaled by the learning rate and
    applied to every parameter. Torch adds 1e-6 to the norm it divides by and this does not, a
    relative difference of 1e-6 / norm in gradients that Adam then normalises.

    muon: see `_muon`.
    """
    method = _muon(config) if config.method == "muon" else _adamw(config)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), method)


def _adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Build Muon (Jordan et al. 2024) for matrices and kernels, AdamW with Nesterov for the rest.

    A kernel [kh, kw, in, out] counts as a matrix [kh·kw·in, out]. Updates have the root mean square
    of AdamW's, 0.2 × learning rate (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that one learning
    rate serves both. All singular directions of the gradient move equally far, so that weak ones
    are not learnt last.
    """

    def as_matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: _MATRIX.get(p.ndim), params)

    rate = learning_rate(config)
    return contrib.muon(
        rate,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        consistent_rms=0.2,
        adam_learning_rate=rate,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=as_matrices,
    )


def ema_update(ema: Any, params: Any, decay: float, step: Any) -> Any:
    """Return the moving average after optimiser step `step` (0, 1, …; may be traced) made `params`.

    `decay` is approached as (1 + step) / (10 + step), so that the random start is soon forgotten.
    Both trees have the same structure and shapes; `ema` keeps its dtypes.
    """
    step = jnp.asarray(step, jnp.float32)
    keep = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: (e + (1 - keep) * (p - e)).astype(e.dtype), ema, params)
