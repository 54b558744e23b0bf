"""Training against torch: the loss's gradients, and steps of the whole recipe, with diffusers."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_oracles import normal, relative_error, to_torch, unet, vae, write

from segdiff_jax.config import Config, OptimizerConfig, TrainConfig
from segdiff_jax.diffusion.schedule import make_schedule
from segdiff_jax.text.conditioning import PromptTable
from segdiff_jax.training import losses
from segdiff_jax.training.losses import Frozen
from segdiff_jax.training.optimizer import learning_rate
from segdiff_jax.training.step import diffusion_step, init_state
from segdiff_jax.weights import hf_config, key_map, pretrained

B, SIZE, K, TOKENS, WIDTH = 4, 16, 3, 5, 12


def make_networks(folder, attends, widths):
    """(diffusers' UNet and VAE, ours): random, the same weights, read from disk."""
    their_unet = unet(
        attends,
        in_channels=8,
        block_out_channels=widths,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
        layers_per_block=1,
    )
    their_vae = vae((8, 8), norm_num_groups=4, layers_per_block=1, scaling_factor=0.9)
    write(folder, unet=their_unet, vae=their_vae)
    return their_unet, their_vae, pretrained.load(folder, ("unet", "vae"))


def make_batch(seed):
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(0, K, (B, 4, 4)), np.ones((1, 4, 4))).astype(np.uint8)
    labels[0, :5, :7] = 255  # cuts through latent pixels
    return {
        "image": rng.integers(0, 256, (B, SIZE, SIZE, 3), dtype=np.uint8),
        "labels": labels,
        "class_ids": rng.integers(0, K, (B, 1)),
    }


def table():
    return PromptTable(jnp.asarray(normal(K, TOKENS, WIDTH)), jnp.zeros((K, WIDTH)))


@torch.no_grad()
def torch_latents(autoencoder, batch):
    """Latents of photos and mask images, and which latent pixels count."""
    labels, ids = torch.tensor(batch["labels"]), torch.tensor(batch["class_ids"])
    pixels = to_torch(batch["image"]).float() / 127.5 - 1
    masks = torch.where(labels == ids[:, :, None], 1.0, -1.0)[:, None].expand(-1, 3, -1, -1)
    encode = lambda x: autoencoder.encode(x).latent_dist.mean * 0.9  # noqa: E731
    ignored = torch.nn.functional.max_pool2d((labels == 255).float()[:, None], 2)[:, 0]
    return encode(pixels), encode(masks), 1 - ignored


def torch_loss(network, latents, config, class_ids, drawn):
    """The loss as a PyTorch user would write it. `drawn`: timesteps and noise."""
    scheduler = diffusers.DDIMScheduler.from_config(hf_config.write_schedule(config))
    photo, mask, valid = latents
    noise, timesteps = to_torch(np.asarray(drawn.noise)), torch.tensor(np.asarray(drawn.timesteps))
    noisy = scheduler.add_noise(mask, noise, timesteps)
    target = scheduler.get_velocity(mask, noise, timesteps)
    context = torch.tensor(np.asarray(table().hidden))[class_ids[:, 0]]
    prediction = network(torch.cat([photo, noisy], 1), timesteps, context).sample
    return ((prediction - target).square().mean(1) * valid).sum() / valid.sum()


def draw(key, config):
    shape = (B, SIZE // 2, SIZE // 2, 4)
    schedule = make_schedule(config.diffusion)
    return losses.corrupt(key, shape, schedule, config.noise, config.train.terminal_share)


def compare(tree, expected):
    """Relative error of each parameter-shaped array against torch's, by torch's name."""
    found = {}
    for keys, leaf in nnx.to_flat_state(tree):
        path = "/".join(map(str, keys))
        name = key_map.tensor_name("unet", path)
        found[name] = key_map.to_file(path, np.asarray(leaf[...]))
    assert found.keys() == expected.keys()
    return {name: relative_error(found[name], expected[name]) for name in expected}, found


def test_three_steps_of_the_recipe(tmp_path):
    """Warm-up, decay, clipping, weight decay, two micro-batches, EMA: the change of parameters."""
    their_unet, their_vae, ours = make_networks(tmp_path, (True,), (8,))
    config = Config(
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            warmup_steps=2,
            decay_steps=4,
            weight_decay=0.1,
            accumulation=2,
            ema_decay=0.5,
        ),
        train=TrainConfig(batch_size=B, terminal_share=0.25),
    )
    graph, start = nnx.split(ours.unet)
    vae_graph, vae_params = nnx.split(ours.vae)
    frozen = Frozen(vae_params, make_schedule(config.diffusion), table())
    step = jax.jit(diffusion_step(graph, vae_graph, config))
    state, key = init_state(start, config), jax.random.key(7)

    before = {name: p.detach().clone() for name, p in their_unet.named_parameters()}
    average = dict(before)
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        their_unet.parameters(), 1.0, (o.beta1, o.beta2), o.epsilon, o.weight_decay
    )
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: 1e-3 * min(1, (i + 1) / 2) * 0.01 ** min(i / 4, 1)
    )
    for i in range(3):
        batch = make_batch(i)
        latents = torch_latents(their_vae, batch)
        photo, mask, valid = (np.asarray(x) for x in latents)
        cached = {
            "image_latents": photo.transpose(0, 2, 3, 1),
            "mask_latents": mask.transpose(0, 2, 3, 1),
            "valid": valid,
            "class_ids": batch["class_ids"],
        }
        state, metrics = step(state, frozen, cached, key)
        optimizer.zero_grad()
        drawn = draw(jax.random.fold_in(key, i), config)
        loss = torch_loss(their_unet, latents, config.diffusion, batch["class_ids"], drawn)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(their_unet.parameters(), o.clip_norm)
        assert norm > 1, "nothing is clipped"
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-4)
        assert float(metrics["gradient_norm"]) == pytest.approx(float(norm), rel=1e-4)
        assert float(learning_rate(o)(i)) == pytest.approx(rates.get_last_lr()[0])
        optimizer.step()
        rates.step()
        keep = min(o.ema_decay, (1 + i) / (10 + i))
        for name, p in their_unet.named_parameters():
            average[name] = keep * average[name] + (1 - keep) * p.detach()
    after = {name: p.detach().clone() for name, p in their_unet.named_parameters()}

    for name, tree, end in (("raw", state.params, after), ("ema", state.ema, average)):
        change = {n: (end[n] - before[n]).numpy() for n in before}
        errors, found = compare(jax.tree.map(jnp.subtract, tree, start), change)
        flat = lambda values: np.concatenate([values[n].ravel() for n in change])  # noqa: E731
        total = relative_error(flat(found), flat(change))
        worst = max(errors, key=errors.get)
        print(f"{name}: change {total:.1e}, worst tensor {errors[worst]:.1e} ({worst})")
        assert total <= 1e-3
