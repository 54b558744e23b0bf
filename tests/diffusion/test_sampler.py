"""The scanned sampler against diffusers' Python loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusion.test_schedule import both

from segdiff_jax.diffusion import sampler as P
from segdiff_jax.diffusion.schedule import sampling_timesteps
from segdiff_jax.errors import UserError

SHAPE = (6, 5, 4)
MIX = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32) / 2


def predict(x, t):
    """A small nonlinear stand-in for the network, which depends on the time."""
    return jnp.tanh(x @ MIX) * (0.5 + t / 2000.0) + 0.1 * jnp.sin(t / 100.0)


def predict_torch(x, t):
    wave = torch.sin(torch.tensor(t / 100.0))
    return torch.tanh(x @ torch.tensor(MIX)) * (0.5 + t / 2000.0) + 0.1 * wave


def diffusers_loop(oracle, latents, steps, eta, noises):
    """Where T // steps is not the way to the next timestep, the scheduler is told what is."""
    oracle.set_timesteps(steps)
    timesteps = oracle.timesteps.tolist() if steps > 1 else [999]
    x = torch.tensor(np.asarray(latents))
    for i, t in enumerate(timesteps):
        if i + 1 < steps:
            oracle.num_inference_steps = 1000 // (t - timesteps[i + 1])  # its stride is T // this
            assert 1000 // oracle.num_inference_steps == t - timesteps[i + 1]
        else:
            oracle.num_inference_steps = 1  # to x_0
        noise = torch.tensor(np.asarray(noises[i])) if eta else None
        x = oracle.step(predict_torch(x, t), t, x, eta=eta, variance_noise=noise).prev_sample
    return x.numpy()


# Where T // steps is the way to the next timestep, and where it is not.
@pytest.mark.parametrize(("steps", "eta"), [(1, 0.0), (10, 0.5), (30, 0.0), (30, 0.5)])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_equals_the_diffusers_loop(steps, eta, spacing, zero_snr):
    schedule, oracle = both(spacing=spacing, zero_snr=zero_snr)
    key = jax.random.key(7)
    latents = P.initial_noise(jax.random.key(1), SHAPE)
    noises = [P.step_noise(key, i, SHAPE) for i in range(steps)]
    found = jax.jit(lambda x: P.sample(predict, schedule, x, steps, eta, key))(latents)
    expected = diffusers_loop(oracle, latents, steps, eta, noises)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_equals_the_diffusers_loop_for_other_predictions(prediction):
    schedule, oracle = both(prediction, zero_snr=False)
    latents = P.initial_noise(jax.random.key(1), SHAPE)
    found = P.sample(predict, schedule, latents, 10)
    expected = diffusers_loop(oracle, latents, 10, 0.0, [])
    np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_a_perfect_network_is_recovered_in_one_step_and_in_many(spacing):
    schedule, _ = both(spacing=spacing)
    x0 = jax.random.normal(jax.random.key(3), SHAPE)

    def perfect(x, t):
        a = schedule.alphas_cumprod[t]
        noise = (x - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a)
        return jnp.sqrt(a) * noise - jnp.sqrt(1 - a) * x0

    a0 = schedule.final_alpha_cumprod
    noise = P.initial_noise(jax.random.key(1), SHAPE)
    for steps in (1, 4, 30, 50):
        # `leading` starts below T - 1, where there is a little signal
        start = schedule.alphas_cumprod[sampling_timesteps(schedule, steps)[0]]
        latents = jnp.sqrt(start) * x0 + jnp.sqrt(1 - start) * noise
        found = P.sample(perfect, schedule, latents, steps)
        expected = jnp.sqrt(a0) * x0 + jnp.sqrt(1 - a0) * noise  # the final a_t is not quite 1
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_member_is_the_same_whatever_the_ensemble_size_and_batching(eta):
    schedule, _ = both()
    key = jax.random.key(5)

    def ensemble(n):
        return jax.vmap(member)(P.member_keys(key, n))

    @jax.jit
    def member(k):
        return P.sample_member(predict, schedule, k, SHAPE, 4, eta)

    whole = jax.jit(ensemble, static_argnums=0)
    large, small = whole(7), whole(3)
    np.testing.assert_allclose(small, large[:3], atol=1e-6)

    alone = jnp.stack([member(k) for k in P.member_keys(key, 7)])
    np.testing.assert_allclose(alone, large, atol=1e-6)
    tail = jax.vmap(member)(P.member_keys(key, 7)[5:])
    np.testing.assert_allclose(tail, large[5:], atol=1e-6)


def test_members_differ_and_start_from_plain_gaussian_noise():
    keys = P.member_keys(jax.random.key(0), 400)
    noise = jax.vmap(lambda k: P.initial_noise(k, SHAPE))(keys)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    correlation = np.corrcoef(np.asarray(noise).reshape(400, -1)) - np.eye(400)
    assert np.abs(correlation).max() < 0.6  # 120 numbers each: 6 sigma


def test_bad_arguments():
    schedule, _ = both()
    with pytest.raises(UserError, match="sampler.steps=0"):
        P.sample(predict, schedule, jnp.zeros(SHAPE), 0)
    with pytest.raises(ValueError, match="key"):
        P.sample(predict, schedule, jnp.zeros(SHAPE), 4, eta=1.0)


def test_members_may_start_from_multi_resolution_noise():
    """Unit variance as Gaussian noise has, but neighbours agree."""
    keys, shape = P.member_keys(jax.random.key(0), 40), (16, 16, 3)
    draw = lambda kind: jax.jit(jax.vmap(lambda k: P.initial_noise(k, shape, kind)))  # noqa: E731
    starts = {kind: np.asarray(draw(kind)(keys)) for kind in ("gaussian", "multires")}
    for noise in starts.values():
        np.testing.assert_allclose(noise.std(axis=(1, 2, 3)).mean(), 1.0, atol=0.05)
    alike = {k: (n[:, 1:] * n[:, :-1]).mean() for k, n in starts.items()}
    assert abs(alike["gaussian"]) < 0.05 and alike["multires"] > 0.15
    assert not np.allclose(starts["multires"][0], starts["multires"][1])
