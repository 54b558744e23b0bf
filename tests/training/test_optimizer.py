import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from segdiff_jax.config import OptimizerConfig
from segdiff_jax.training.optimizer import ema_update, learning_rate, make_optimizer


def test_warm_up_then_exponential_decay_to_the_final_fraction():
    config = OptimizerConfig(
        learning_rate=2.0, warmup_steps=10, decay_steps=1000, final_fraction=0.01
    )
    rate = jax.vmap(learning_rate(config))(jnp.arange(3000))
    assert 0 < rate[0] <= 2.0 / 10
    assert np.all(np.diff(rate[:10]) > 0)  # rises through the warm-up
    assert np.all(np.diff(rate[10:1001]) < 0)  # falls afterwards
    ratios = np.asarray(rate[11:1001] / rate[10:1000])
    np.testing.assert_allclose(ratios, 0.01 ** (1 / 1000), rtol=1e-4)  # by equal factors
    np.testing.assert_allclose(rate[500], 2.0 * 0.1, rtol=1e-5)  # half way: the geometric mean
    np.testing.assert_allclose(rate[1000:], 0.02, rtol=1e-5)


def test_final_fraction_one_and_no_warm_up_is_constant():
    config = OptimizerConfig(learning_rate=0.3, warmup_steps=0, final_fraction=1.0)
    np.testing.assert_allclose(jax.vmap(learning_rate(config))(jnp.arange(30_000)), 0.3, rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.05, 1.0, 1e6])  # always, sometimes, never at work
def test_adamw_with_clipping_agrees_with_torch(clip_norm):
    config = OptimizerConfig(
        learning_rate=1e-2,
        warmup_steps=4,
        decay_steps=12,
        final_fraction=0.1,
        clip_norm=clip_norm,
        weight_decay=0.1,
        beta1=0.8,
        beta2=0.95,
    )
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(5, 3)), "bias": rng.normal(size=3)}
    inputs, targets = rng.normal(size=(7, 5)), rng.normal(size=(7, 3))
    scales = rng.uniform(0.02, 1.5, size=20)  # so that the gradient norm crosses 1

    optimizer = make_optimizer(config)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    state = optimizer.init(params)

    def loss(p, scale):
        return scale * jnp.mean((jnp.asarray(inputs) @ p["kernel"] + p["bias"] - targets) ** 2)

    model = {k: torch.tensor(v, dtype=torch.float32, requires_grad=True) for k, v in start.items()}
    reference = torch.optim.AdamW(
        model.values(), lr=1.0, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1
    )
    x, y = (torch.tensor(a, dtype=torch.float32) for a in (inputs, targets))
    rate = learning_rate(config)
    for step, scale in enumerate(scales):
        updates, state = optimizer.update(jax.grad(loss)(params, scale), state, params)
        params = optax.apply_updates(params, updates)

        reference.zero_grad()
        (scale * ((x @ model["kernel"] + model["bias"] - y) ** 2).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.values(), clip_norm)
        reference.param_groups[0]["lr"] = float(rate(step))
        reference.step()
    for name in params:
        np.testing.assert_allclose(params[name], model[name].detach().numpy(), atol=1e-6)


def test_ema_with_decay_zero_is_the_parameters_and_keeps_the_dtype():
    ema = {"a": jnp.ones((2,), jnp.bfloat16)}
    update = jax.jit(ema_update, static_argnums=2)
    out = update(ema, {"a": jnp.full((2,), 2.0)}, 0.0, jnp.asarray(1000))
    np.testing.assert_array_equal(out["a"], 2.0)
    assert out["a"].dtype == jnp.bfloat16


def _newton_schulz(gradient: np.ndarray) -> np.ndarray:
    """Five steps of the published quintic (kellerjordan.github.io/posts/muon), on a matrix."""
    x = gradient / np.linalg.norm(gradient)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


@pytest.mark.parametrize("shape", [(6, 4), (3, 3, 2, 5)])
def test_muon_moves_all_directions_of_a_matrix_alike(shape):
    config = OptimizerConfig(
        method="muon", learning_rate=0.1, warmup_steps=0, final_fraction=1.0, weight_decay=0.0
    )
    rng = np.random.default_rng(0)
    matrix = (int(np.prod(shape[:-1])), shape[-1])
    left, values, right = np.linalg.svd(rng.normal(size=matrix), full_matrices=False)
    steep = left @ np.diag(values * np.logspace(0, -1, len(values))) @ right  # one is 10 × another
    optimizer = make_optimizer(config)
    params = {"kernel": jnp.zeros(shape)}
    state = optimizer.init(params)
    update, _ = optimizer.update({"kernel": jnp.asarray(steep.reshape(shape))}, state, params)
    found = np.asarray(update["kernel"]).reshape(matrix)
    # Momentum and Nesterov only scale the first gradient. Liu et al. 2025, eq. 4.
    expected = -0.1 * 0.2 * np.sqrt(max(matrix)) * _newton_schulz(steep)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    singular = np.linalg.svd(found, compute_uv=False)
    assert singular.max() < 2 * singular.min()  # of the gradient they differ by ten and more


def test_muon_moves_vectors_by_adamw_with_nesterov_momentum():
    config = OptimizerConfig(
        method="muon", learning_rate=0.1, warmup_steps=0, final_fraction=1.0, weight_decay=0.1
    )
    optimizer = make_optimizer(config)
    bias = np.array([1.0, -2.0, 3.0])
    state = optimizer.init({"bias": jnp.asarray(bias)})
    first, second = np.zeros(3), np.zeros(3)
    for step, scale in enumerate((1.0, -2.0, 0.5), start=1):
        gradient = scale * np.array([0.1, 0.2, -0.3])
        update, state = optimizer.update(
            {"bias": jnp.asarray(gradient)}, state, {"bias": jnp.asarray(bias)}
        )
        # Dozat 2016, "Incorporating Nesterov momentum into Adam", algorithm 8.
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        ahead = 0.9 * first / (1 - 0.9 ** (step + 1)) + 0.1 * gradient / (1 - 0.9**step)
        direction = ahead / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(update["bias"], -0.1 * (direction + 0.1 * bias), rtol=1e-4)
        bias = bias + np.asarray(update["bias"])
