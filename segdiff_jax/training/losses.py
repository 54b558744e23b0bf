"""What the stages minimise, as functions of a batch and what was drawn for it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segdiff_jax import codec
from segdiff_jax.config import Config, NoiseConfig
from segdiff_jax.diffusion import noise as noise_lib
from segdiff_jax.diffusion import sampler as samplers
from segdiff_jax.diffusion import schedule as schedule_lib
from segdiff_jax.models import linear_decoder
from segdiff_jax.models.joint_decoder import LOGITS_PER_GRAY, JointDecoder
from segdiff_jax.models.linear_decoder import LinearDecoder
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE, decode_latents, encode_latents
from segdiff_jax.text import conditioning

Batch = dict[str, Any]


class Frozen(NamedTuple):
    """What the stages of the UNet read and never change."""

    vae: Any  # its parameters; the network itself for a loss
    schedule: schedule_lib.Schedule
    table: conditioning.PromptTable  # encoded prompts of all classes
    decoder: LinearDecoder | None = None  # of masks, where the loss on labels goes through it
    unet: Any = None  # of the joint decoder's stage, as `vae`


class Corruption(NamedTuple):
    """What a batch is trained on: drawn once for the whole batch, whatever the micro-batching."""

    timesteps: jax.Array  # int [B]
    noise: jax.Array  # [B, h, w, c]


def corrupt(
    key: jax.Array,
    shape: tuple[int, int, int, int],
    schedule: schedule_lib.Schedule,
    config: NoiseConfig,
    terminal_share: float = 0.0,
) -> Corruption:
    """Timesteps, uniform but for a share at T - 1, and noise of `shape` [B, h, w, c]."""
    time_key, terminal_key, noise_key = jax.random.split(key, 3)
    last = schedule.num_train_timesteps - 1
    timesteps = jax.random.randint(time_key, shape[:1], 0, last + 1)
    terminal = jax.random.uniform(terminal_key, shape[:1]) < terminal_share
    timesteps = jnp.where(terminal, last, timesteps)
    noise = noise_lib.training_noise(
        noise_key, shape, timesteps, last + 1, config.kind, config.strength
    )
    return Corruption(timesteps, noise)


def latents(vae: VAE, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Image and mask latents [B, h, w, c]: from the cache where the batch has them."""
    if "image_latents" in batch:
        return batch["image_latents"], batch["mask_latents"]
    pixels = codec.to_pixels(batch["image"])
    masks = codec.mask_images(batch["labels"], batch["class_ids"])
    # In pairs: a photo and its mask stay on the chip that has the example. One after the other,
    # the rows of all chips would move, and XLA lose track of where a batch is cut.
    pairs = jnp.stack([pixels, masks], axis=1)  # [B, 2, H, W, 3]
    both = encode_latents(vae, pairs.reshape(-1, *pixels.shape[1:]))
    both = jax.lax.stop_gradient(both).reshape(len(pixels), 2, *both.shape[1:])
    return both[:, 0], both[:, 1]


def latent_weights(batch: Batch, factor: int, balance: float = 0.0) -> jax.Array:
    """[B, h, w], summing to 1: equal where labels are valid, 0 where a pixel is *ignore*.

    With `balance` γ > 0, positions that show the pass's classes weigh (rest / shown)^γ as much as
    the rest of their example, whose total stays: at γ = 1 both sides weigh the same, so that
    a class of few pixels is not outvoted by its surroundings.
    """
    valid = batch["valid"] if "valid" in batch else codec.latent_valid(batch["labels"], factor)
    valid = valid.astype(jnp.float32)
    if not balance:
        return valid / jnp.maximum(1.0, valid.sum())
    if "shown" in batch:
        shown = batch["shown"]
    else:
        shown = jax.vmap(codec.latent_shown, (0, 0, None))(
            batch["labels"], batch["class_ids"], factor
        )
    total = valid.sum((1, 2), keepdims=True)  # [B, 1, 1]
    inside = (valid * shown).sum((1, 2), keepdims=True)
    both = (inside > 0) & (inside < total)
    ratio = jnp.where(both, (total - inside) / jnp.where(both, inside, 1.0), 1.0)
    weights = valid * jnp.where(shown, ratio**balance, 1.0)
    weights *= total / jnp.maximum(1e-6, weights.sum((1, 2), keepdims=True))
    return weights / jnp.maximum(1.0, valid.sum())


def diffusion_loss(
    unet: UNet,
    frozen: Frozen,
    batch: Batch,
    corruption: Corruption,
    weights: jax.Array,
    config: Config,
) -> jax.Array:
    """Weighted squared error of the prediction.

    Additive over micro-batches: `weights` [B, h, w] are normalised over the whole batch.
    """
    timesteps, noise = corruption
    image_latents, mask_latents = latents(frozen.vae, batch)
    noisy = schedule_lib.add_noise(frozen.schedule, mask_latents, noise, timesteps)
    target = schedule_lib.target(frozen.schedule, mask_latents, noise, timesteps)
    context, mask = conditioning.context(frozen.table, batch["class_ids"], config.codec.context)
    sample = jnp.concatenate([image_latents, noisy], axis=-1)  # [B, h, w, 2c]
    prediction = unet(sample, timesteps, context, mask)
    return jnp.sum(weights * jnp.square(prediction - target).mean(-1))


class LabelWeights(NamedTuple):
    """What each part of the label loss counts for. Each sums to 1 over the batch, or is 0."""

    pixels: jax.Array  # [B, H, W]: equal where labels are valid, 0 where they are *ignore*
    classes: jax.Array  # [B, C]: equal for classes asked that have a pixel, 0 for others


def label_weights(batch: Batch) -> LabelWeights:
    valid = codec.valid_mask(jnp.asarray(batch["labels"])).astype(jnp.float32)
    shown = _truth(batch).any((2, 3)).astype(jnp.float32)
    return LabelWeights(*(part / jnp.maximum(1.0, part.sum()) for part in (valid, shown)))


def _truth(batch: Batch) -> jax.Array:
    """bool [B, C, H, W]: where the labels show the classes asked; empty slots nowhere."""
    ids = jnp.asarray(batch["class_ids"])[:, :, None, None]
    return jnp.asarray(batch["labels"], jnp.int32)[:, None] == ids


def label_loss(maps: jax.Array, batch: Batch, weights: LabelWeights) -> jax.Array:
    """Cross-entropy of pixels + Dice loss of classes, of unclipped gray maps [B, C, H, W].

    The classes asked of a photo and "none of these" compete in a softmax. A class has
    `LOGITS_PER_GRAY` × its map, "none of these" 0: gray 0 is a score of 1/2, the threshold below
    which the codec too says none. Empty slots, class_ids of -1, take no part. Dice makes a class of
    few pixels count as much as one of many; it is not defined for an absent class, to which
    the cross-entropy says no. Additive over micro-batches, as `weights` are of the whole batch.
    """
    truth = _truth(batch)
    asked = (jnp.asarray(batch["class_ids"]) != codec.PAD)[:, :, None, None]
    logits = jnp.where(asked, LOGITS_PER_GRAY * maps, -jnp.inf)
    none = jnp.zeros_like(maps[:, :1])
    log_shares = jax.nn.log_softmax(jnp.concatenate([none, logits], axis=1), axis=1)
    answer = jnp.concatenate([~truth.any(1, keepdims=True), truth], axis=1)
    cross_entropy = -jnp.where(answer, log_shares, 0.0).sum(1)  # [B, H, W]
    dice = _dice(jnp.exp(log_shares[:, 1:]), truth, batch)
    return (weights.pixels * cross_entropy).sum() + (weights.classes * dice).sum()


def mask_loss(logits: jax.Array, batch: Batch, weights: LabelWeights) -> jax.Array:
    """Binary cross-entropy of pixels, summed over classes, + Dice loss of classes [B, C, H, W].

    Each class asked is judged by itself, as in MaskFormer (arXiv 2107.06278), so that its score
    does not depend on the others. In a softmax over all classes there are, of which one is always
    right, all logits may rise together, and as scores of their own they would all be 1. Empty
    slots take no part. Additive as `label_loss` is.
    """
    truth = _truth(batch)
    asked = (jnp.asarray(batch["class_ids"]) != codec.PAD)[:, :, None, None]
    entropy = jnp.where(asked, jax.nn.softplus(jnp.where(truth, -logits, logits)), 0.0).sum(1)
    dice = _dice(jax.nn.sigmoid(logits), truth, batch)
    return (weights.pixels * entropy).sum() + (weights.classes * dice).sum()


def _dice(shares: jax.Array, truth: jax.Array, batch: Batch) -> jax.Array:
    """Dice loss [B, C] of shares of pixels [B, C, H, W]; a class that counts has a pixel."""
    shares = shares * codec.valid_mask(jnp.asarray(batch["labels"]))[:, None]
    overlap, total = (shares * truth).sum((2, 3)), (shares + truth).sum((2, 3))
    return 1.0 - 2.0 * overlap / jnp.maximum(1.0, total)


def e2e_loss(
    unet: UNet,
    frozen: Frozen,
    batch: Batch,
    noise: jax.Array,
    weights: LabelWeights,
    config: Config,
) -> jax.Array:
    """`label_loss` of the maps that the sampler's single step gives from `noise` [B, h, w, c].

    The gradient comes through the decoder.
    """
    return label_loss(_asked_maps(unet, frozen, batch, noise, config), batch, weights)


def joint_loss(
    decoder: JointDecoder,
    frozen: Frozen,
    batch: Batch,
    noise: jax.Array,
    weights: LabelWeights,
    config: Config,
) -> jax.Array:
    """`mask_loss` of what a joint decoder makes of those maps: no gradient reaches the UNet."""
    maps = jax.lax.stop_gradient(_asked_maps(frozen.unet, frozen, batch, noise, config))
    text = jnp.asarray(frozen.table.pooled)[jnp.maximum(batch["class_ids"], 0)]  # [B, C, D]
    return mask_loss(decoder.logits(codec.to_pixels(batch["image"]), text, maps), batch, weights)


def _asked_maps(
    unet: UNet, frozen: Frozen, batch: Batch, noise: jax.Array, config: Config
) -> jax.Array:
    """Unclipped gray maps [B, C, H, W] of the classes asked, by one step of the sampler.

    Each of the C classes of a photo is a pass of the UNet; the photo is encoded once.
    """
    asked = batch["class_ids"].shape[1]
    ids = jnp.maximum(batch["class_ids"], 0).reshape(-1, 1)  # [B·C, 1]; empty slots do not count
    context, mask = conditioning.context(frozen.table, ids, config.codec.context)
    photo = jax.lax.stop_gradient(encode_latents(frozen.vae, codec.to_pixels(batch["image"])))
    photos, start = (jnp.repeat(x, asked, axis=0) for x in (photo, noise))  # a photo's in a row

    def predict(noisy: jax.Array, t: jax.Array) -> jax.Array:
        sample = jnp.concatenate([photos, noisy], axis=-1)
        return unet(sample, jnp.full(len(ids), t), context, mask)

    x0 = samplers.sample(predict, frozen.schedule, start, steps=1)
    return _decoded(frozen, x0, asked, config.model.remat)


def _decoded(frozen: Frozen, latents: jax.Array, asked: int, remat: bool) -> jax.Array:
    """Gray maps [B, C, H, W] of latents [B·C, h, w, c], by the linear decoder if there is one.

    With remat, classes are decoded one at a time, and again in the backward pass: at full size the
    activations of the VAE's decoder are hundreds of times the latents.
    """
    if frozen.decoder is not None:
        maps = linear_decoder.decode(frozen.decoder, latents)
        return maps.reshape(-1, asked, *maps.shape[1:])
    decode = lambda z: codec.to_gray(decode_latents(frozen.vae, z))  # noqa: E731
    if remat:
        by_class = latents.reshape(-1, asked, *latents.shape[1:]).swapaxes(0, 1)
        return jax.lax.map(jax.checkpoint(decode), by_class).swapaxes(0, 1)
    maps = decode(latents)
    return maps.reshape(-1, asked, *maps.shape[1:])


def vae_loss(
    vae: VAE,
    batch: Batch,
    noise: jax.Array,
    mixing: jax.Array,
    *,
    is_mask: np.ndarray,
    kl_weight: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Reconstruction error + KL to N(0, I) (arXiv 1312.6114, eq. 10), per element.

    is_mask bool [B] says which rows show the mask image in place of the photo. noise
    [B, h, w, c] reparametrises the posterior. mixing [B] in [0, 1] is how much of the following
    mask goes into a mask row, as latent and as image.

    Photos have the absolute error, which keeps edges. Masks have the squared one and are mixed,
    because their decoded values are scores: the UNet answers with the mean of the latents of what
    is possible, and the decoder has to turn it into the mean of the masks. One that has seen clean
    masks, with absolute error, rounds to the likeliest: thin and rare classes have no score.
    """
    masks = codec.mask_images(batch["labels"], batch["class_ids"])
    rows = is_mask[:, None, None, None]
    pixels = jnp.where(rows, masks, codec.to_pixels(batch["image"]))
    mean, logvar = vae.encode(pixels)
    following = _following(is_mask)  # a photo follows itself: nothing to mix
    mix = lambda x: x + mixing[:, None, None, None] * (x[following] - x)  # noqa: E731
    decoded = vae.decode(mix(mean) + jnp.exp(0.5 * logvar) * noise)
    error = decoded - mix(pixels)
    reconstruction = jnp.where(rows, jnp.square(error), jnp.abs(error)).mean()
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()
    return reconstruction + kl_weight * kl, {"reconstruction": reconstruction, "kl": kl}


def mixing(key: jax.Array, count: int, share: float) -> jax.Array:
    """[count]: uniform in [0, 1] for a `share` of the rows, 0 for the others."""
    mixed_key, amount_key = jax.random.split(key)
    mixed = jax.random.uniform(mixed_key, (count,)) < share
    return jnp.where(mixed, jax.random.uniform(amount_key, (count,)), 0.0)


def mask_rows(count: int, share: float) -> np.ndarray:
    """bool [count]: a `share` of the rows, spread evenly."""
    steps = np.floor(np.arange(count + 1) * np.float32(share))
    return steps[1:] > steps[:-1]


def _following(is_mask: np.ndarray) -> np.ndarray:
    """int [B]: of each mask row the next one, the first after the last; of others themselves."""
    following, rows = np.arange(len(is_mask)), np.flatnonzero(is_mask)
    following[rows] = np.roll(rows, -1)
    return following
