"""Suite `gpu`: Stable Diffusion 2 in bfloat16 on one NVIDIA card, against diffusers and PyTorch.

With `small` a dry run of narrow networks on whatever JAX computes on. What would not end within
eight minutes is left out, and named.
"""

import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from segdiff_jax.benchmarks import cpu, steps, twins
from segdiff_jax.benchmarks.timing import NotRun, Ratio, Result, check_equal, in_turn, side_by_side
from segdiff_jax.config import Config, DataConfig, ModelConfig, SamplerConfig
from segdiff_jax.errors import UserError
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.models import flops
from segdiff_jax.models.attention import plain
from segdiff_jax.models.clip_text import CLIPText, CLIPTextConfig
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.models.vae import VAE, VAEConfig
from segdiff_jax.parallel import attention_kernels
from segdiff_jax.text import vocabulary
from segdiff_jax.text.tokenizer import train_tokenizer
from segdiff_jax.weights import hf_config

_LIMIT = 330.0  # seconds after which no other part is begun: each takes up to two minutes
# Dense bfloat16 products of a card in FLOP/s, by a word in its name (NVIDIA's data sheets).
_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


class _Sizes(NamedTuple):
    unet: UNetConfig
    vae: VAEConfig
    latent: int
    batches: tuple[int, ...]
    classes: int
    members: int
    steps: int
    rounds: int
    dtype: str
    tolerance: float


_FULL = _Sizes(UNetConfig(), VAEConfig(), 64, (8, 16), 16, 10, 10, 5, "bfloat16", 5e-2)
_SMALL = _Sizes(cpu.NARROW, cpu.NARROW_VAE, 8, (2,), 3, 2, 2, 2, "float32", 1e-3)


def run(small: bool) -> Iterator[Result]:
    """Time training steps, the sampler, the kinds of attention, the VAE's decoder."""
    if not small and jax.default_backend() != "gpu":
        raise UserError(
            f"bench gpu: JAX finds no NVIDIA card here, only {jax.default_backend()}: "
            "pip install 'jax[cuda13]' on a machine that has one, or give --small for a dry run"
        )
    sizes, started = _SMALL if small else _FULL, time.monotonic()
    parts: dict[str, Callable[[], Iterator[Result]]] = {}
    for batch in sizes.batches:  # first: what memory has seen at most is counted for the process
        parts[f"training step, batch {batch}"] = functools.partial(_training, sizes, batch)
    parts["attention"] = functools.partial(_attention, sizes)
    parts["sampler"] = functools.partial(_sampler, sizes)
    parts["VAE decode"] = functools.partial(_decode, sizes)
    with twins.cores(small) if small else contextlib.nullcontext():
        for name, part in parts.items():
            if time.monotonic() - started > _LIMIT and not small:
                yield NotRun(name, f"{_LIMIT:.0f} s were over")
                continue
            try:
                yield from part()
            except (UserError, RuntimeError) as error:  # memory, too: what others say is worth it
                if small:
                    raise
                yield NotRun(name, " ".join(str(error).split())[:300], failed=True)
            gc.collect()
            if twins.device() == "cuda":
                torch._dynamo.reset()  # it holds on to the networks that it compiled
                torch.cuda.empty_cache()


def _training(sizes: _Sizes, batch: int) -> Iterator[Result]:
    ours, theirs = steps.pair(sizes.unet, sizes.latent, batch, sizes.dtype, sizes.rounds)
    name = f"training step, {sizes.dtype}, batch {batch}, {sizes.latent} × {sizes.latent} latents"
    found = side_by_side(name, ours, theirs, sizes.rounds, sizes.tolerance, 1.0)
    needed = batch * flops.unet(sizes.unet, sizes.latent, sizes.latent, 77).train
    yield dataclasses.replace(found, notes=_memory() | _mfu(needed, found))


def _mfu(needed: float, found: Ratio) -> dict[str, float]:
    """Return the share of the card's peak, by the analytic count; of an unknown card nothing."""
    kind = jax.devices()[0].device_kind
    peaks = [peak for word, peak in _PEAKS.items() if word in kind]
    sides = {"MFU ours": found.ours, "MFU theirs": found.theirs} if peaks else {}
    return {name: needed / side.median / peaks[0] for name, side in sides.items()}


def _memory() -> dict[str, float]:
    if twins.device() == "cpu":
        return {}
    own = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    made = {"GiB ours": own / 2**30, "GiB theirs": torch.cuda.max_memory_allocated() / 2**30}
    torch.cuda.reset_peak_memory_stats()
    return made


def _attention(sizes: _Sizes) -> Iterator[Result]:
    """Time the first level's self-attention with its gradients; training uses cuDNN's."""
    length, width = sizes.latent**2, 64
    shape = 2 * sizes.batches[0], length, sizes.unet.heads[0], width
    *arrays, pull = (jnp.asarray(twins.normal(*shape, seed=i), sizes.dtype) for i in range(4))
    by_xla = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    kinds: dict[str, Any] = {"cuDNN's": attention_kernels.cudnn, "XLA's": by_xla}

    def timed(attention: Any) -> Callable[[], Any]:
        loss = lambda *x: jnp.sum(attention(*x) * pull, dtype=jnp.float32)  # noqa: E731
        forward, backward = jax.jit(attention), jax.jit(jax.grad(loss, (0, 1, 2)))
        return lambda: jax.block_until_ready((forward(*arrays), backward(*arrays)))

    for name, attention in kinds.items():
        shown = f"{name} attention to plain, {length} positions, with gradients"
        own, other = timed(attention), timed(plain)
        yield side_by_side(shown, own, other, sizes.rounds, sizes.tolerance)


def _sampler(sizes: _Sizes) -> Iterator[Result]:
    """Time all classes and members of a photo, against a loop with the classes in one batch."""
    model, twin, decoder = _segmenter(sizes)
    names = [f"thing {i}" for i in range(sizes.classes)]
    classes = vocabulary.from_names(names).classes
    pixels = np.random.default_rng(0).integers(0, 256, (*model.config.data.image_size, 3), np.uint8)
    photo = model.encode(pixels)
    few = dataclasses.replace(model.config.sampler, steps=2, ensemble=1)
    noise = twins.noise(photo.latent.shape, sizes.members)
    contexts = torch.from_numpy(np.array(model.table(classes).hidden)).to(twins.device())
    settings = hf_config.write_schedule(model.config.diffusion)
    scheduler = diffusers.DDIMScheduler.from_config(settings)
    latent = twins.to_torch(photo.latent[None])

    @torch.no_grad()
    def theirs(members: int, count: int) -> np.ndarray:
        scheduler.set_timesteps(count)
        found = []
        with torch.autocast(twins.device(), torch.bfloat16, enabled=sizes.dtype == "bfloat16"):
            for start in noise[:members]:
                latents = twins.to_torch(start[None]).expand(sizes.classes, -1, -1, -1)
                images = latent.expand(sizes.classes, -1, -1, -1)
                for t in scheduler.timesteps:
                    output = twin(torch.cat([images, latents], 1), t, contexts).sample
                    latents = scheduler.step(output.float(), t, latents).prev_sample
                decoded = decoder.decode(latents / sizes.vae.scaling_factor).sample
                found.append(decoded.float().mean(1).cpu().numpy())
        return np.median(np.stack(found).clip(-1, 1), axis=0)  # [K, H, W]

    name = f"sampler, {sizes.classes} classes, N = {sizes.members}, T = {sizes.steps}"
    maps = lambda sampler: model.maps([photo], classes, sampler, 0)[0][0]  # noqa: E731
    check_equal(name, maps(few), theirs(1, 2), 2 * sizes.tolerance)
    maps(model.config.sampler)  # compiled
    yield in_turn(
        name,
        lambda: maps(model.config.sampler),
        lambda: theirs(sizes.members, sizes.steps),
        min(3, sizes.rounds),
        0.6,
    )


def _segmenter(sizes: _Sizes) -> tuple[Segmenter, Any, Any]:
    """Make a segmenter with a small text encoder, and diffusers' UNet and VAE of its weights."""
    words = ["a photo of a", *(f"thing {i}" for i in range(sizes.classes))]
    tokenizer = train_tokenizer(words, 1024, 77)
    text = CLIPTextConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=sizes.unet.cross_attention_dim,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    dtype = jnp.dtype(sizes.dtype)
    unet = twins.filled(lambda: UNet(sizes.unet, dtype=dtype, rngs=nnx.Rngs(0)))
    vae = twins.filled(lambda: VAE(sizes.vae, dtype=dtype, rngs=nnx.Rngs(0)))
    encoder = twins.filled(lambda: CLIPText(text, rngs=nnx.Rngs(0)))
    side = 8 * sizes.latent
    config = Config(
        data=DataConfig(source="scenes", image_size=(side, side)),
        model=ModelConfig(dtype=sizes.dtype),
        sampler=SamplerConfig(steps=sizes.steps, ensemble=sizes.members),
    )
    pair = twins.of_unet(unet).to(twins.device()), twins.of_vae(vae).to(twins.device())
    return Segmenter(unet, vae, encoder, tokenizer, config), *pair


def _decode(sizes: _Sizes) -> Iterator[Result]:
    vae = twins.filled(lambda: VAE(sizes.vae, dtype=jnp.dtype(sizes.dtype), rngs=nnx.Rngs(0)))
    twin = twins.of_vae(vae).to(twins.device())
    latents = twins.normal(4, sizes.latent, sizes.latent, sizes.vae.latent_channels)
    codes, decode = twins.to_torch(latents), twins.jitted(VAE.decode, vae)

    @torch.no_grad()
    def theirs() -> np.ndarray:
        with torch.autocast(twins.device(), torch.bfloat16, enabled=sizes.dtype == "bfloat16"):
            return twins.from_torch(twin.decode(codes).sample)

    side = 8 * sizes.latent
    name = f"VAE decode, 4 images of {side} × {side}"
    yield side_by_side(name, lambda: decode(latents), theirs, sizes.rounds, sizes.tolerance)
