"""Both losses against torch and diffusers; where labels count; what a batch is trained on."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDIMScheduler

from segdiff_jax.config import CodecConfig, Config, DiffusionConfig, NoiseConfig
from segdiff_jax.diffusion.schedule import make_schedule
from segdiff_jax.models.vae import VAE
from segdiff_jax.text import conditioning
from segdiff_jax.training import losses

FACTOR, CHANNELS, K = 4, 2, 5
PLAIN = NoiseConfig(kind="gaussian")
MIX = np.random.default_rng(0).normal(size=(3, CHANNELS)).astype(np.float32)


class PoolingVAE(VAE):
    """A VAE that anyone can recompute: mean colour of 4×4 blocks, mixed into two channels."""

    def __init__(self):
        pass  # no parameters

    config = SimpleNamespace(scaling_factor=0.7, downsampling=FACTOR, latent_channels=CHANNELS)

    def encode(self, pixels):
        n, height, width, _ = pixels.shape
        blocks = pixels.reshape(n, height // FACTOR, FACTOR, width // FACTOR, FACTOR, 3)
        mean = blocks.mean((2, 4)) @ MIX
        return mean, 0.1 * mean - 0.3

    def decode(self, latents):
        flat = latents @ jnp.asarray(MIX.T)
        return jnp.repeat(jnp.repeat(flat, FACTOR, 1), FACTOR, 2)


def unet(sample, timesteps, context, context_mask):
    """Depends on each of its inputs."""
    noisy, image = sample[..., CHANNELS:], sample[..., :CHANNELS]
    text = context.mean((1, 2)) if context_mask is None else context.sum((1, 2))
    return jnp.tanh(noisy * 0.5 + image) + (timesteps / 1000 + text)[:, None, None, None]


def make_batch(classes_per_pass=1, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(0, K, (3, 4, 4)), np.ones((1, 2, 3))).astype(np.uint8)
    labels[:, :3, :5] = 255
    labels[2] = 255
    return {
        "image": rng.integers(0, 256, (3, 8, 12, 3), dtype=np.uint8),
        "labels": labels,
        "class_ids": rng.permuted(np.tile(np.arange(K), (3, 1)), axis=1)[:, :classes_per_pass],
    }


def make_table(seed=0):
    rng = np.random.default_rng(seed)
    return conditioning.PromptTable(
        jnp.asarray(rng.normal(size=(K, 7, 6)), jnp.float32),
        jnp.asarray(rng.normal(size=(K, 6)), jnp.float32),
    )


def torch_encode(pixels):
    """[B, H, W, 3] in [-1, 1] → scaled latents, by torch's own pooling."""
    pooled = torch.nn.functional.avg_pool2d(torch.tensor(pixels).permute(0, 3, 1, 2), FACTOR)
    return (pooled.permute(0, 2, 3, 1) @ torch.tensor(MIX)) * 0.7


def painted(labels, class_ids):
    """The gray masks of the design: class j of G at -1 + 2j/G, everything else at -1."""
    gray = np.full(labels.shape, -1.0, np.float32)
    for row, ids in enumerate(class_ids):
        for j, class_id in enumerate(ids, 1):
            gray[row][labels[row] == class_id] = -1 + 2 * j / len(ids)
    return np.repeat(gray[..., None], 3, -1)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("group", [1, 3])
def test_diffusion_loss_is_the_masked_error_of_the_scheduler_target(prediction, group):
    batch, table = make_batch(group), make_table()
    zero_snr = prediction != "epsilon"
    config = DiffusionConfig(prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(3, 2, 3, CHANNELS)).astype(np.float32)
    timesteps = np.array([3, 999, 500])

    weights = losses.latent_weights(batch, FACTOR)
    found = losses.diffusion_loss(
        unet,
        losses.Frozen(PoolingVAE(), make_schedule(config), table),
        batch,
        losses.Corruption(jnp.asarray(timesteps), jnp.asarray(noise)),
        weights,
        Config(codec=CodecConfig(classes_per_pass=group)),
    )

    theirs = DDIMScheduler(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
    )
    image = torch_encode(batch["image"].astype(np.float32) / 127.5 - 1)
    mask = torch_encode(painted(batch["labels"], batch["class_ids"]))
    eps, t = torch.tensor(noise), torch.tensor(timesteps)
    noisy = theirs.add_noise(mask, eps, t)
    target = {
        "v_prediction": theirs.get_velocity(mask, eps, t),
        "epsilon": eps,
        "sample": mask,
    }[prediction]
    text = table.hidden[batch["class_ids"]].mean(1)  # [B, L, D]
    sample = np.concatenate([image, noisy], -1)
    error = (np.asarray(unet(sample, timesteps, text, None)) - target.numpy()) ** 2
    ignored = torch.nn.functional.max_pool2d(
        torch.tensor((batch["labels"] == 255).astype(np.float32))[:, None], FACTOR
    )[:, 0]
    valid = ignored.numpy() == 0
    assert 0 < valid.sum() < valid[:2].size
    np.testing.assert_allclose(found, error[valid].mean(), rtol=2e-5)


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_balance_raises_the_weight_of_positions_that_show_the_class(balance):
    labels = np.zeros((3, 8, 8), np.uint8)
    labels[0, 0, 0] = 1  # one latent pixel of 16 shows class 1
    labels[0, 7] = 255  # four are not valid
    labels[1, :, :6] = 1  # 12 of 16
    batch = {"labels": labels, "class_ids": np.array([[1], [1], [2]])}  # class 2 is nowhere
    weights = np.asarray(losses.latent_weights(batch, 2, balance))
    np.testing.assert_allclose(weights.sum((1, 2)), np.array([12, 16, 16]) / 44, rtol=1e-6)
    np.testing.assert_allclose(weights[0, 0, 0] / weights[0, 1, 1], 11**balance, rtol=1e-5)
    np.testing.assert_allclose(weights[1, 0, 0] / weights[1, 0, 3], (1 / 3) ** balance, rtol=1e-5)
    assert (weights[0, 3] == 0).all()
    assert np.ptp(weights[2]) == 0
    plain = np.asarray(losses.latent_weights(batch, 2))
    np.testing.assert_allclose(weights[2], plain[2], rtol=1e-6)


def test_bound_context_reaches_the_network():
    batch, table = make_batch(3), make_table()
    schedule = make_schedule(DiffusionConfig())
    corruption = losses.corrupt(jax.random.key(0), (3, 2, 3, CHANNELS), schedule, PLAIN)
    seen = []

    def recording(sample, timesteps, context, context_mask):
        seen.append((context, context_mask))
        return unet(sample, timesteps, context, context_mask)

    losses.diffusion_loss(
        recording,
        losses.Frozen(PoolingVAE(), schedule, table),
        batch,
        corruption,
        losses.latent_weights(batch, FACTOR),
        Config(codec=CodecConfig(classes_per_pass=3, context="bound")),
    )
    assert seen[0][0].shape == (3, 3, 6) and seen[0][1].shape == (3, 3)


def test_mixing_is_uniform_for_its_share_of_the_rows():
    drawn = np.asarray(losses.mixing(jax.random.key(0), 4000, 0.4))
    assert abs((drawn > 0).mean() - 0.4) < 0.03
    assert scipy.stats.kstest(drawn[drawn > 0], "uniform").pvalue > 0.01
    assert (np.asarray(losses.mixing(jax.random.key(0), 10, 0.0)) == 0).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_terminal_share_of_samples_starts_where_one_step_sampling_does(share):
    schedule = make_schedule(DiffusionConfig())
    drawn = losses.corrupt(jax.random.key(1), (20_000, 1, 1, 1), schedule, PLAIN, share)
    timesteps = np.asarray(drawn.timesteps)
    assert abs((timesteps == 999).mean() - (share + (1 - share) / 1000)) < 0.015
    assert timesteps.min() >= 0 and timesteps.max() == 999
    others = timesteps[timesteps < 999]
    if share < 1:
        counts = np.bincount(others // 100, minlength=10)
        assert len(others) / 10 * 0.85 < counts.min() <= counts.max() < len(others) / 10 * 1.15
    np.testing.assert_allclose(np.std(drawn.noise), 1, atol=0.03)


def test_corruption_is_drawn_for_each_sample_and_by_the_key():
    schedule, shape = make_schedule(DiffusionConfig()), (4, 8, 8, 2)
    first, again, other = (
        losses.corrupt(jax.random.key(k), shape, schedule, PLAIN) for k in (0, 0, 1)
    )
    assert (first.noise == again.noise).all() and (first.timesteps == again.timesteps).all()
    assert np.abs(first.noise - other.noise).max() > 0.1
    assert np.abs(first.noise[0] - first.noise[1]).max() > 0.1
    assert len(set(np.asarray(first.timesteps).tolist())) > 1


def test_vae_loss_is_the_reconstruction_error_and_the_divergence():
    batch = make_batch()
    noise = np.random.default_rng(2).normal(size=(3, 2, 3, CHANNELS)).astype(np.float32)
    is_mask, mixing = np.array([True, False, True]), np.array([0.3, 0.9, 0.0], np.float32)
    loss, parts = losses.vae_loss(
        PoolingVAE(), batch, jnp.asarray(noise), mixing, is_mask=is_mask, kl_weight=0.01
    )

    masks = painted(batch["labels"], batch["class_ids"])
    pixels = batch["image"].astype(np.float32) / 127.5 - 1
    pixels[is_mask] = masks[is_mask]
    mean = torch_encode(pixels) / 0.7
    posterior = torch.distributions.Normal(mean, torch.exp(0.5 * (0.1 * mean - 0.3)))
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    mixed = torch.stack([0.7 * mean[0] + 0.3 * mean[2], mean[1], mean[2]])
    pixels[0] = 0.7 * masks[0] + 0.3 * masks[2]
    drawn = mixed + posterior.stddev * torch.tensor(noise)
    decoded = np.kron((drawn @ torch.tensor(MIX.T)).numpy(), np.ones((1, FACTOR, FACTOR, 1)))
    error = decoded - pixels
    reconstruction = np.stack([error[0] ** 2, np.abs(error[1]), error[2] ** 2]).mean()
    np.testing.assert_allclose(parts["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(parts["reconstruction"], reconstruction, rtol=1e-5)
    np.testing.assert_allclose(loss, reconstruction + 0.01 * kl.item(), rtol=1e-5)


@pytest.mark.parametrize(("count", "share"), [(8, 0.5), (16, 0.25), (7, 0.0), (5, 1.0), (10, 0.33)])
def test_mask_rows_are_the_share_spread_evenly(count, share):
    rows = np.asarray(losses.mask_rows(count, share))
    assert rows.shape == (count,) and abs(rows.sum() - count * share) < 1
    running = np.cumsum(rows) - share * np.arange(1, count + 1)
    assert np.abs(running).max() <= 1


def test_latents_of_pixels_carry_no_gradient():
    batch = make_batch()

    def total(scale):
        vae = PoolingVAE()
        vae.encode = lambda pixels: (PoolingVAE().encode(pixels)[0] * scale, None)
        return sum(x.sum() for x in losses.latents(vae, batch))

    assert jax.grad(total)(1.0) == 0 and total(1.0) != total(2.0)
