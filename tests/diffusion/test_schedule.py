"""The schedule against diffusers' DDIMScheduler."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from segdiff_jax.config import DiffusionConfig
from segdiff_jax.diffusion import schedule as S
from segdiff_jax.errors import UserError

PREDICTIONS = ("v_prediction", "epsilon", "sample")
SPACINGS = ("trailing", "leading", "linspace")
COMBINATIONS = list(itertools.product(PREDICTIONS, SPACINGS, (False, True)))


def both(
    prediction="v_prediction",
    spacing="trailing",
    zero_snr=True,
    to_one=False,
    beta_schedule="scaled_linear",
):
    """Our schedule and diffusers' of the same fields."""
    fields = {
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": zero_snr,
        "set_alpha_to_one": to_one,
        "steps_offset": 1,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": beta_schedule,
    }
    oracle = DDIMScheduler(**fields, clip_sample=False)
    return S.make_schedule(DiffusionConfig(**fields)), oracle


def arrays(*shape, count=2, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("to_one", [False, True])
def test_alphas_match_diffusers(zero_snr, beta_schedule, to_one):
    ours, oracle = both(zero_snr=zero_snr, to_one=to_one, beta_schedule=beta_schedule)
    np.testing.assert_allclose(ours.alphas_cumprod, oracle.alphas_cumprod, atol=1e-5, rtol=0)
    roots = np.sqrt(ours.alphas_cumprod), np.sqrt(oracle.alphas_cumprod)
    np.testing.assert_allclose(*roots, atol=1e-5, rtol=0)
    np.testing.assert_allclose(ours.final_alpha_cumprod, oracle.final_alpha_cumprod, atol=1e-6)
    assert (ours.alphas_cumprod[-1] == 0) == zero_snr


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_match_diffusers_for_every_step_count_above_one(spacing):
    ours, oracle = both(spacing=spacing)
    longest = 999 if spacing == "leading" else 1000
    for steps in range(2, longest + 1):
        oracle.set_timesteps(steps)
        expected = oracle.timesteps.numpy()
        # diffusers' float arange sometimes appends a timestep -1, which is no timestep
        expected = expected[expected >= 0]
        found = S.sampling_timesteps(ours, steps)
        assert found.shape == (steps,) and found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_step_is_taken_from_pure_noise_whatever_the_spacing(spacing):
    ours, _ = both(spacing=spacing)
    assert S.sampling_timesteps(ours, 1).tolist() == [999]
    assert S.previous_timesteps(ours, 1).tolist() == [-1]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_each_step_lands_where_the_next_one_begins(spacing):
    ours, oracle = both(spacing=spacing)
    for steps in (2, 3, 7, 10, 30, 50, 64, 333, 600):
        timesteps, previous = S.sampling_timesteps(ours, steps), S.previous_timesteps(ours, steps)
        assert previous.dtype == np.int32
        assert previous.tolist() == [*timesteps[1:].tolist(), -1]
        if 1000 % steps == 0 and spacing != "linspace":  # there diffusers says the same
            oracle.set_timesteps(steps)
            theirs = oracle.timesteps.numpy() - 1000 // steps
            assert np.maximum(theirs, -1).tolist() == previous.tolist()


@pytest.mark.parametrize(
    ("steps", "spacing", "says"),
    [
        *[(n, "trailing", f"sampler.steps={n}: must be between 1 and 1000") for n in (-1, 0, 1001)],
        (1000, "leading", "steps_offset=1"),  # diffusers would index alphas_cumprod[1000]
    ],
)
def test_step_count_out_of_range_is_a_one_line_error(steps, spacing, says):
    with pytest.raises(UserError, match=says) as error:
        S.sampling_timesteps(both(spacing=spacing)[0], steps)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_add_noise_and_velocity_match_diffusers(zero_snr):
    ours, oracle = both(zero_snr=zero_snr)
    x0, noise = arrays(6, 4, 5, 3)
    t = np.array([0, 1, 250, 500, 998, 999])
    torch_args = torch.tensor(x0), torch.tensor(noise), torch.tensor(t)
    noisy = S.add_noise(ours, x0, noise, t)
    np.testing.assert_allclose(noisy, oracle.add_noise(*torch_args), atol=1e-5)
    v = S.velocity(ours, x0, noise, t)
    np.testing.assert_allclose(v, oracle.get_velocity(*torch_args), atol=1e-5)
    one = S.add_noise(ours, x0[3], noise[3], 500)  # scalar t, no batch
    np.testing.assert_allclose(one, noisy[3], atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_inverts_to_x0_and_noise(prediction):
    ours, _ = both(prediction, zero_snr=False)
    x0, noise = arrays(4, 5, 3, 2)
    t = jnp.array([0, 10, 400, 800])
    noisy = S.add_noise(ours, x0, noise, t)
    found_x0, found_noise = S.to_x0_and_noise(ours, S.target(ours, x0, noise, t), noisy, t)
    np.testing.assert_allclose(found_x0, x0, atol=2e-5)
    # x0 prediction at t = 0 recovers the noise from 3 % of the signal: rounding grows 34-fold
    np.testing.assert_allclose(found_noise, noise, atol=2e-5)


@pytest.mark.parametrize(("prediction", "spacing", "zero_snr"), COMBINATIONS)
@pytest.mark.parametrize(("to_one", "eta"), [(False, 0.7), (True, 0.0)])
def test_ddim_step_matches_diffusers(prediction, spacing, zero_snr, to_one, eta):
    ours, oracle = both(prediction, spacing, zero_snr, to_one)
    oracle.set_timesteps(10)
    model_output, sample, noise = arrays(3, 4, 2, count=3)
    timesteps, previous = S.sampling_timesteps(ours, 10), S.previous_timesteps(ours, 10)
    np.testing.assert_array_equal(timesteps, oracle.timesteps)
    for t, t_prev in zip(timesteps.tolist(), previous.tolist(), strict=True):
        # Its stride is T // this. For linspace, where it would be another, told to land as ours.
        oracle.num_inference_steps = 1000 // (t - t_prev) if t_prev >= 0 else 10
        step = oracle.step(
            torch.tensor(model_output), t, torch.tensor(sample), eta=eta,
            variance_noise=torch.tensor(noise),
        )  # fmt: skip
        found_x0, _ = S.to_x0_and_noise(ours, model_output, sample, t)
        found = S.ddim_step(ours, model_output, sample, t, t_prev, eta, noise if eta else None)
        if prediction == "epsilon" and zero_snr and t == 999:
            # no signal to divide by: neither side can give a number
            assert not np.isfinite(found_x0).any()
            assert not np.isfinite(step.pred_original_sample).any()
            continue
        expected_x0, expected = step.pred_original_sample, step.prev_sample
        np.testing.assert_allclose(found_x0, expected_x0, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_ddim_step_takes_a_timestep_per_sample():
    ours, _ = both()
    prediction, sample, noise = arrays(3, 4, 4, 2, count=3)
    t, t_prev = jnp.array([999, 500, 99]), jnp.array([899, 400, -1])
    batched = S.ddim_step(ours, prediction, sample, t, t_prev, 0.5, noise)
    for b in range(3):
        inputs = prediction[b], sample[b], int(t[b]), int(t_prev[b]), 0.5, noise[b]
        np.testing.assert_allclose(batched[b], S.ddim_step(ours, *inputs), atol=1e-6)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_full_eta_is_finite_at_every_timestep(zero_snr):
    # (1 - a_prev) - std**2 is 0 up to rounding here: its root must not be NaN
    ours, _ = both(zero_snr=zero_snr)
    t = jnp.arange(1000)
    ones = jnp.ones((1000, 1))
    for stride in (1, 100, 1000):
        assert jnp.isfinite(S.ddim_step(ours, ones, ones, t, t - stride, 1.0, ones)).all()
