"""A training step on cached latents, ours and as a user of diffusers writes it."""

from collections.abc import Callable
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from segdiff_jax.benchmarks import twins
from segdiff_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
)
from segdiff_jax.diffusion.schedule import make_schedule
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE, VAEConfig
from segdiff_jax.parallel import attention_kernels, rules
from segdiff_jax.parallel import mesh as meshes
from segdiff_jax.parallel.placement import whole
from segdiff_jax.text.conditioning import PromptTable
from segdiff_jax.training import losses
from segdiff_jax.training.losses import Frozen
from segdiff_jax.training.step import diffusion_step, init_state, jitted
from segdiff_jax.weights import hf_config

_TOKENS, _CLASSES = 77, 16


def pair(
    unet_config: UNetConfig, size: int, batch: int, dtype: str, rounds: int
) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """Return (our step, diffusers' step) on size × size latents; both give [loss, gradient norm].

    Each call is the next step of its own training: same weights, batch, timesteps, noise and
    optimiser (AdamW, clipping). Theirs is handed its noise; it may do `rounds` + 1 steps.
    """
    config = Config(
        model=ModelConfig(dtype=dtype),
        noise=NoiseConfig(kind="gaussian"),
        optimizer=OptimizerConfig(warmup_steps=0, final_fraction=1.0),
        train=TrainConfig(batch_size=batch),
    )
    shape = (batch, size, size, unet_config.out_channels)
    rng = np.random.default_rng(0)
    given = {
        "image_latents": twins.normal(*shape, seed=1),
        "mask_latents": twins.normal(*shape, seed=2),
        "valid": np.ones(shape[:3], bool),
        "class_ids": rng.integers(0, _CLASSES, (batch, 1)).astype(np.int32),
    }
    hidden = twins.normal(_CLASSES, _TOKENS, unet_config.cross_attention_dim, seed=3)
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    attention = attention_kernels.on_mesh(mesh)
    unet = twins.filled(
        lambda: UNet(unet_config, attention=attention, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    )
    twin = twins.of_unet(unet)
    drawn = [_drawn(step, shape, config) for step in range(rounds + 1)]
    return (
        _ours(unet, given, hidden, config, mesh),
        _theirs(twin, given, hidden, config, drawn),
    )


def _drawn(step: int, shape: tuple[int, int, int, int], config: Config) -> losses.Corruption:
    """Draw the timesteps and the noise of a step, which depend on its number alone."""
    key = jax.random.fold_in(jax.random.key(0), step)
    schedule = make_schedule(config.diffusion)
    return losses.corrupt(key, shape, schedule, config.noise, config.train.terminal_share)


def _ours(unet: UNet, given: Any, hidden: np.ndarray, config: Config, mesh: Any) -> Any:
    # Latents are given: of the VAE only its factor and its channels count.
    channels = unet.config.out_channels
    small = VAEConfig(latent_channels=channels, block_out_channels=(4,) * 4, norm_groups=4)
    vae_graph, vae_params = nnx.split(twins.filled(lambda: VAE(small, rngs=nnx.Rngs(0))))
    graph, params = nnx.split(unet)
    table = PromptTable(hidden, np.zeros((len(hidden), hidden.shape[-1]), np.float32))
    frozen = whole(Frozen(vae_params, make_schedule(config.diffusion), table), mesh)
    state = init_state(jax.tree.map(jnp.copy, params), config)
    # Where the step leaves it: it would be compiled again for the second call.
    state = jax.device_put(state, rules.state_sharding(state, mesh))
    step = jitted(diffusion_step(graph, vae_graph, config, mesh), state, mesh)
    batch = meshes.place_batch(given, mesh, len(given["class_ids"]))
    key = jax.device_put(jax.random.key(0), meshes.replicated(mesh))
    held = [state]

    def run() -> np.ndarray:
        held[0], metrics = step(held[0], frozen, batch, key)
        jax.block_until_ready(held[0])
        return np.array([metrics["loss"], metrics["gradient_norm"]], np.float64)

    return run


def _theirs(twin: Any, given: Any, hidden: np.ndarray, config: Config, drawn: Any) -> Any:
    where = twins.device()
    twin = twin.to(where).train()
    network = twin
    if where == "cuda":
        twin.to(memory_format=torch.channels_last)
        network = torch.compile(twin)
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        twin.parameters(),
        lr=o.learning_rate,
        betas=(o.beta1, o.beta2),
        eps=o.epsilon,
        weight_decay=o.weight_decay,
        fused=where == "cuda",
    )
    scheduler = diffusers.DDIMScheduler.from_config(hf_config.write_schedule(config.diffusion))
    photo, mask = twins.to_torch(given["image_latents"]), twins.to_torch(given["mask_latents"])
    context = torch.from_numpy(hidden[given["class_ids"][:, 0]]).to(where)
    noises = [
        (twins.to_torch(d.noise), torch.tensor(np.asarray(d.timesteps)).long().to(where))
        for d in drawn
    ]
    half, queue = config.model.dtype == "bfloat16", iter(noises)

    def run() -> np.ndarray:
        noise, timesteps = next(queue)
        noisy = scheduler.add_noise(mask, noise, timesteps)
        target = scheduler.get_velocity(mask, noise, timesteps)
        with torch.autocast(where, torch.bfloat16, enabled=half):
            prediction = network(torch.cat([photo, noisy], 1), timesteps, context).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), target)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), o.clip_norm)
        optimizer.step()
        found = np.array([loss.item(), float(norm)])
        if where == "cuda":
            torch.cuda.synchronize()
        return found

    return run
