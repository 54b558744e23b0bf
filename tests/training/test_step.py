"""The training step on a network small enough to follow: gradients, averages, randomness."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import K, unet_steps

from segdiff_jax.config import Config, NoiseConfig, OptimizerConfig, TrainConfig
from segdiff_jax.training import losses
from segdiff_jax.training.step import diffusion_step, init_state

B, H, W, C = 8, 4, 6, 4


def make_config(**optimizer):
    defaults = {"learning_rate": 1e-2, "warmup_steps": 1, "clip_norm": 1e9}
    return Config(
        noise=NoiseConfig(kind="gaussian"),
        optimizer=OptimizerConfig(**defaults | optimizer),
        train=TrainConfig(batch_size=B),
    )


@pytest.fixture(scope="module")
def run(tiny_networks):
    return unet_steps(diffusion_step, tiny_networks[1])


def make_batch(seed=0):
    """Cached latents, whose valid pixels are spread unevenly over the rows."""
    rng = np.random.default_rng(seed)
    share = np.linspace(0, 1, B)[:, None, None]
    return {
        "image_latents": rng.normal(size=(B, H, W, C)).astype(np.float32),
        "mask_latents": rng.normal(size=(B, H, W, C)).astype(np.float32),
        "valid": rng.random((B, H, W)) < share,
        "class_ids": rng.integers(0, K, (B, 1)).astype(np.int32),
    }


def close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_micro_batches_add_up_to_the_batch(run):
    batch = make_batch()
    ((whole, metrics),) = run(make_config(), [batch])
    ((parts, part_metrics),) = run(make_config(accumulation=8), [batch])
    np.testing.assert_allclose(part_metrics["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(part_metrics["gradient_norm"], metrics["gradient_norm"], rtol=1e-5)
    close(parts.opt_state, whole.opt_state, rtol=1e-4, atol=1e-7)  # the moments are the gradient
    close(parts.params, whole.params, rtol=1e-4, atol=1e-6)


def test_moving_average_follows_the_parameters(run):
    """And `test_parity.py` has what the parameters do."""
    decay = 0.15
    found = run(make_config(ema_decay=decay), [make_batch(s) for s in range(3)])
    expected = last = run.params
    for step, (state, metrics) in enumerate(found):
        keep = min(decay, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda e, p, keep=keep: keep * e + (1 - keep) * p, expected, state.params
        )
        close(state.ema, expected, rtol=1e-5, atol=1e-6)
        change = jax.tree.map(jnp.subtract, state.params, last)
        np.testing.assert_allclose(metrics["update_norm"], optax.global_norm(change), rtol=1e-4)
        assert int(state.step) == step + 1
        last = state.params
    assert keep == decay, "both branches of the schedule"
    np.testing.assert_allclose(found[0][1]["learning_rate"], 1e-2, rtol=1e-6)


def test_the_state_owns_its_buffers(run):
    """The step donates them: parameters and moving average must not be one array."""
    config = make_config(ema_decay=0.9)
    step = jax.jit(run.make_step(config), donate_argnums=0)
    state = init_state(jax.tree.map(jnp.copy, run.params), config)
    for _ in range(2):
        state, _ = step(state, run.frozen, make_batch(), jax.random.key(0))
    assert np.isfinite(jax.tree.leaves(state.params)[0]).all()


def test_randomness_is_that_of_the_step_number_and_the_key(run):
    config, batch = make_config(learning_rate=0.0), make_batch()
    straight = [m["loss"] for _, m in run(config, [batch] * 4)]
    assert len(set(straight)) == 4
    later = init_state(run.params, config)._replace(step=jnp.asarray(2, jnp.int32))
    resumed = [m["loss"] for _, m in run(config, [batch] * 2, state=later)]
    assert resumed == straight[2:]
    other = [m["loss"] for _, m in run(config, [batch] * 4, key=1)]
    assert not set(other) & set(straight)


def test_all_ignored_is_no_step_in_any_direction(run):
    batch = make_batch()
    batch["valid"] = np.zeros_like(batch["valid"])
    ((state, metrics),) = run(make_config(weight_decay=0.0), [batch])
    assert metrics["loss"] == 0 and metrics["gradient_norm"] == 0
    close(state.params, run.params, rtol=0)


def test_from_pixels_and_from_their_latents_are_the_same_step(run, tiny_networks):
    vae = tiny_networks[1]
    rng = np.random.default_rng(3)
    labels = rng.integers(0, K, (B, 2 * H, 2 * W)).astype(np.uint8)
    labels[:, :3, :3] = 255
    pixels = {
        "image": rng.integers(0, 256, (B, 2 * H, 2 * W, 3), dtype=np.uint8),
        "labels": labels,
        "class_ids": rng.integers(0, K, (B, 1)).astype(np.int32),
    }
    image, mask = losses.latents(vae, pixels)
    cached = {
        "image_latents": image,
        "mask_latents": mask,
        "valid": np.asarray(losses.latent_weights(pixels, vae.config.downsampling)) > 0,
        "class_ids": pixels["class_ids"],
    }
    a, b = (run(make_config(), [batch])[0][1] for batch in (pixels, cached))
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
