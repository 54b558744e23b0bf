"""Multi-resolution noise against the reference process, written plainly in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from segdiff_jax.diffusion import noise as N

draw_batch = jax.jit(N.training_noise, static_argnums=(1, 3, 4))


def reference(base, normal, ratios, strength):
    """The process as published. base [c, h, w]; normal(i, h, w) -> [c, h, w]; ratios: iterator."""
    up = torch.nn.Upsample(size=base.shape[1:], mode="bilinear")
    (h, w), total = base.shape[1:], base
    for i, r in enumerate(ratios):
        h, w = max(1, int(h / r**i)), max(1, int(w / r**i))
        total = total + up(normal(i, h, w)[None])[0] * strength**i
        if h == 1 or w == 1:
            break
    return total / total.std()


@pytest.mark.parametrize("shape", [(24, 32, 4), (17, 64, 3), (5, 5, 1), (96, 40, 2)])
@pytest.mark.parametrize("strength", [0.0, 0.3, 0.9])
def test_forced_sizes_equal_a_torch_pyramid(shape, strength):
    h, w, c = shape
    sizes = N.level_sizes(h, w)
    jitted = jax.jit(N.pyramid)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        # the first time the smallest ratios: every level counts, at its largest size
        ratios = np.full(len(sizes), 2.0) if seed == 0 else rng.uniform(2, 4, len(sizes))
        ratios = ratios.astype(np.float32)
        base = rng.normal(size=shape).astype(np.float32)
        grids = [rng.normal(size=(*s, c)).astype(np.float32) for s in sizes]

        def normal(i, height, width, grids=grids):
            return torch.tensor(grids[i][:height, :width]).permute(2, 0, 1)

        expected = reference(
            torch.tensor(base).permute(2, 0, 1), normal, ratios.tolist(), strength
        ).permute(1, 2, 0)
        found = jitted(base, grids, ratios, strength)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("out", "size", "room"), [(32, 7, 16), (9, 1, 4), (12, 12, 12), (5, 4, 9)])
def test_bilinear_matrix_is_torch_upsampling(out, size, room):
    x = np.random.default_rng(0).normal(size=(1, 1, size)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.tensor(x), size=out, mode="linear")[0, 0]
    matrix = jax.jit(N.bilinear_matrix, static_argnums=(0, 2))(out, size, room)
    assert matrix.shape == (out, room)
    assert not matrix[:, size:].any()  # what lies beyond the traced size must not leak in
    np.testing.assert_allclose(matrix[:, :size] @ x[0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-6)


def test_a_draw_in_one_row_has_the_values_of_one_with_axes():
    key, keys, shape = jax.random.key(0), jax.random.split(jax.random.key(1), 3), (4, 5, 2)
    assert (N.gaussian(key, (6, *shape)) == jax.random.normal(key, (6, *shape))).all()
    in_batch = [
        jax.vmap(lambda k, draw=draw: draw(k, shape))(keys)
        for draw in (N.gaussian, jax.random.normal)
    ]
    assert (in_batch[0] == in_batch[1]).all()


def power_by_band(samples, bands=8):
    """Radially averaged power spectrum of [n, h, w, c] -> [bands]."""
    h, w = samples.shape[1:3]
    power = (np.abs(np.fft.fft2(samples, axes=(1, 2))) ** 2).mean((0, 3)) / (h * w)
    radius = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None])
    edges = np.linspace(0, radius.max() + 1e-6, bands + 1)
    band = np.digitize(radius, edges) - 1
    return np.array([power[band == b].mean() for b in range(bands)])


def reference_samples(count, shape, strength, seed=0):
    h, w, c = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(i, height, width):
        return torch.randn(c, height, width, generator=generator)

    def ratios():
        while True:
            yield float(torch.rand(1, generator=generator)) * 2 + 2

    draws = [reference(normal(0, h, w), normal, ratios(), strength) for _ in range(count)]
    return torch.stack(draws).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("strength", [0.45, 0.9])
def test_same_spectrum_and_variance_as_the_reference_process(strength):
    shape, count = (16, 24, 2), 2500
    t = jnp.zeros(count, jnp.int32)
    ours = draw_batch(jax.random.key(1), (count, *shape), t, 1000, "multires", strength)
    theirs = reference_samples(count, shape, strength)
    found, expected = power_by_band(np.asarray(ours)), power_by_band(theirs)
    np.testing.assert_allclose(found, expected, rtol=0.05)
    assert expected[0] > 1.5 * expected[-1]  # there is a slope to match
    np.testing.assert_allclose(np.var(ours), np.var(theirs), rtol=0.01)
    np.testing.assert_allclose(np.std(ours, axis=(1, 2, 3), ddof=1), 1.0, atol=1e-5)
    # the mean of a sample spreads because the coarsest level is nearly constant
    spread = np.std(np.mean(ours, (1, 2))), np.std(np.mean(theirs, (1, 2)))
    np.testing.assert_allclose(*spread, rtol=0.08)


def assert_plain_gaussian(samples):
    samples = np.asarray(samples)
    np.testing.assert_allclose(power_by_band(samples), 1.0, rtol=0.05)
    assert abs(samples.mean()) < 0.01
    assert abs(samples.std() - 1) < 0.01
    assert abs((samples**4).mean() - 3) < 0.05
    neighbours = (samples[:, 1:] * samples[:, :-1]).mean()
    assert abs(neighbours) < 0.01


@pytest.mark.parametrize(
    ("kind", "strength", "t"),
    [("multires", 0.0, 900), ("annealed", 0.9, 0), ("gaussian", 0.9, 900)],
)
def test_strength_zero_and_time_zero_are_plain_gaussian(kind, strength, t):
    shape = (1200, 16, 16, 2)
    steps = jnp.full(shape[0], t)
    assert_plain_gaussian(draw_batch(jax.random.key(2), shape, steps, 1000, kind, strength))


def test_each_sample_of_a_batch_has_its_own_scales_and_strength():
    key, shape = jax.random.key(5), (4, 24, 32, 3)
    t = jnp.array([0, 300, 700, 999])
    batch = draw_batch(key, shape, t, 1200, "annealed", 0.9)
    keys = jax.random.split(key, 4)
    single = jax.jit(N.multires_noise, static_argnums=1)
    for b in range(4):
        alone = single(keys[b], shape[1:], 0.9 * t[b] / 1200)
        np.testing.assert_allclose(batch[b], alone, atol=1e-5)
    # one more sample changed does not touch the others
    other = draw_batch(key, shape, t.at[2].set(0), 1200, "annealed", 0.9)
    assert np.abs(other[2] - batch[2]).max() > 0.01
    np.testing.assert_allclose(other[jnp.array([0, 1, 3])], batch[jnp.array([0, 1, 3])], atol=1e-6)
