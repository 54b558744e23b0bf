"""Ensemble alignment against scipy, merging against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from segdiff_jax.diffusion import ensemble as E


def problem(seed, count, noise, shape=(12, 16)):  # one shape: each other one compiles for seconds
    """Maps in [0, 1] that are affine images of one map, plus noise."""
    rng = np.random.default_rng(seed)
    base = rng.random(shape)
    scale, shift = rng.uniform(0.4, 0.8, count), rng.uniform(0.05, 0.15, count)
    maps = base * scale[:, None, None] + shift[:, None, None]
    maps = np.clip(maps + noise * rng.normal(size=maps.shape), 0, 1)
    return maps.astype(np.float32), base, scale, shift


def numpy_terms(parameters, maps, reduce):
    """(mean pairwise RMS, merged map), in float64 and by the definition."""
    count = len(maps)
    scale, shift = np.split(np.asarray(parameters, np.float64), 2)
    aligned = maps * scale[:, None, None] + shift[:, None, None]
    pairs = [(i, j) for i in range(count) for j in range(i)]
    rms = np.mean([np.sqrt(np.mean((aligned[i] - aligned[j]) ** 2)) for i, j in pairs])
    return rms, np.median(aligned, 0) if reduce == "median" else np.mean(aligned, 0)


def numpy_objective(parameters, maps, reduce):
    rms, merged = numpy_terms(parameters, maps, reduce)
    return rms + 0.02 * (abs(merged.min()) + abs(1 - merged.max()))


def numpy_gauge_free(parameters, maps, reduce):
    rms, merged = numpy_terms(parameters, maps, reduce)
    return rms / (merged.max() - merged.min())


def marigold_start(maps):
    low, high = maps.min((1, 2)), maps.max((1, 2))
    return np.concatenate([1 / (high - low), -low / (high - low)]).astype(np.float64)


CASES = [(0, 2, 0.01), (1, 5, 0.1), (3, 5, 0.0), (4, 3, 0.3)]


@pytest.mark.parametrize(("seed", "count", "noise"), CASES)
@pytest.mark.parametrize("reduce", ["median", "mean"])
def test_no_worse_than_scipy_bfgs_from_the_same_start(seed, count, noise, reduce):
    maps, *_ = problem(seed, count, noise)
    start = marigold_start(maps)
    ours = np.concatenate(E.alignment(jnp.asarray(maps), reduce))
    # as published, which for noisy maps is (nearly) solved by shrinking them to a constant ...
    theirs = scipy.optimize.minimize(numpy_objective, start, (maps, reduce), method="BFGS").x
    found, bound = (numpy_objective(p, maps, reduce) for p in (ours, theirs))
    assert found <= bound + 2e-6
    assert found <= numpy_objective(start, maps, reduce) + 1e-6
    # (so there `found` says little about the alignment itself)
    # ... and for how well the maps agree once stretched again, where shrinking gains nothing
    theirs = scipy.optimize.minimize(numpy_gauge_free, start, (maps, reduce), method="BFGS").x
    found, bound = (numpy_gauge_free(p, maps, reduce) for p in (ours, theirs))
    assert found <= bound * 1.002 + 2e-6


@pytest.mark.parametrize("noise", [0.0, 0.002, 0.02])
def test_recovers_planted_scales_and_shifts(noise):
    maps, base, scale, shift = problem(3, 6, noise, shape=(32, 32))
    found_scale, found_shift = (np.asarray(x, np.float64) for x in E.alignment(jnp.asarray(maps)))
    # undoing the planted map gives found_scale * scale for every member: equal up to the gauge
    products = found_scale * scale
    np.testing.assert_allclose(products / products.mean(), 1.0, atol=1e-5 + noise)
    offsets = (found_shift + found_scale * shift) / products.mean()
    np.testing.assert_allclose(offsets - offsets.mean(), 0.0, atol=1e-5 + noise)
    merged, uncertainty = E.ensemble(jnp.asarray(maps), "affine")
    stretched = (base - base.min()) / np.ptp(base)
    np.testing.assert_allclose(merged, stretched, atol=1e-4 + 8 * noise)
    assert uncertainty.max() < 1e-4 + 8 * noise


def test_optimum_beats_the_start_where_extremes_mislead():
    # one outlier pixel per map: stretching by min and max is wrong, the maps otherwise agree
    maps, _, scale, _ = problem(2, 5, 0.0)
    for k in range(5):
        maps[k, k, k] = 1.0 if k % 2 else 0.0
    found_scale, _ = E.alignment(jnp.asarray(maps))
    products = np.asarray(found_scale) * scale
    start = marigold_start(maps)[:5] * scale
    assert np.std(products / products.mean()) < 0.3 * np.std(start / start.mean())


def test_jit_and_vmap_agree_with_one_at_a_time():
    maps = jnp.asarray(np.stack([problem(s, 5, 0.02)[0] for s in range(3)]))
    merged, uncertainty = jax.jit(jax.vmap(lambda m: E.ensemble(m, "affine")))(maps)
    for k in range(3):
        one, spread = E.ensemble(maps[k], "affine")
        np.testing.assert_allclose(merged[k], one, atol=2e-3)
        np.testing.assert_allclose(uncertainty[k], spread, atol=2e-3)


@pytest.mark.parametrize("reduce", ["median", "mean"])
def test_affine_result_fills_the_unit_range(reduce):
    for noise in (0.001, 0.05, 0.3):
        merged, uncertainty = E.ensemble(jnp.asarray(problem(0, 5, noise)[0]), "affine", reduce)
        assert merged.min() == 0 and abs(merged.max() - 1) < 1e-6
        assert merged.std() > 0.1  # not collapsed
        assert (uncertainty >= 0).all() and uncertainty.max() < 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_degenerate_maps_stay_finite(count):
    for maps in (jnp.zeros((count, 12, 16)), jnp.full((count, 12, 16), 0.7)):
        for result in E.ensemble(maps, "affine"):
            assert jnp.isfinite(result).all()
    identical = jnp.tile(jnp.linspace(0.2, 0.4, 192).reshape(12, 16), (count, 1, 1))
    merged, uncertainty = E.ensemble(identical, "affine")
    np.testing.assert_allclose(merged, jnp.linspace(0, 1, 192).reshape(12, 16), atol=1e-4)
    assert uncertainty.max() < 1e-4


@pytest.mark.parametrize("count", [1, 4, 5, E.MOST_COMPARED, E.MOST_COMPARED + 1])
def test_merge_matches_numpy(count):
    maps = np.random.default_rng(0).random((count, 6, 7)).astype(np.float32)
    for reduce, center in (("median", np.median), ("mean", np.mean)):
        merged, mad = E.merge(jnp.asarray(maps), reduce, "mad")
        expected = center(maps, axis=0)
        np.testing.assert_allclose(merged, expected, atol=1e-6)
        np.testing.assert_allclose(mad, np.median(np.abs(maps - expected), axis=0), atol=1e-6)
        _, std = E.merge(jnp.asarray(maps), reduce, "std")
        np.testing.assert_allclose(std, np.std(maps, axis=0), atol=1e-6)


def test_without_alignment_absolute_levels_survive():
    maps = jnp.asarray(problem(0, 5, 0.01)[0]) * 0.3
    merged, uncertainty = E.ensemble(maps, "none", "mean", "std")
    np.testing.assert_allclose(merged, maps.mean(0), atol=1e-6)
    np.testing.assert_allclose(uncertainty, maps.std(0), atol=1e-6)
    assert merged.max() < 0.4
    assert E.ensemble(maps, "affine", "mean", "std")[0].max() > 0.99
