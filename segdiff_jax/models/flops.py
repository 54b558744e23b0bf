"""How many FLOPs the networks need: their matrix products and convolutions, no more.

Two counts. The analytic one is made from the networks' configs; it is the numerator of an MFU. A
multiply-add is two FLOPs, a convolution counts k² taps at every output position, borders included;
norms, activations and the optimiser count nothing. With P positions, C channels and L tokens of
width D:

    k × k convolution        2 k² P C_in C_out
    resnet                   two 3 × 3, a 1 × 1 where the width changes, 8 C₀ C_out for the time
    self-attention           8 P C² (q, k, v, out) + 4 P² C
    attention to the text    4 P C² (q, out) + 4 P L C, and 4 L D C (k, v)
    GEGLU                    24 P C²
    around a transformer     4 P C² (projections in and out)

The second, `traced`, counts what a traced function does: recomputation, loops and Pallas kernels
included, which a compiler's own count leaves out or counts once.
"""

import math
from typing import Any, NamedTuple

from segdiff_jax.config import Config, SamplerConfig
from segdiff_jax.models import joint_decoder
from segdiff_jax.models.unet import UNetConfig
from segdiff_jax.models.vae import VAEConfig


class UNetCount(NamedTuple):
    """FLOPs of one example through the UNet."""

    dead_ends: float  # products whose input needs no gradient: sample, timestep and text
    others: float

    @property
    def forward(self) -> float:
        return self.dead_ends + self.others

    @property
    def train(self) -> float:
        """The forward pass, the gradients of weights, and of inputs that depend on weights."""
        return 2.0 * self.dead_ends + 3.0 * self.others


def unet(config: UNetConfig, height: int, width: int, tokens: int) -> UNetCount:
    """Count the UNet's FLOPs for an example of height × width latents and `tokens` of context."""
    widths, last = config.block_out_channels, len(config.block_out_channels) - 1
    time = 4 * widths[0]
    sizes = [(height, width)]
    for _ in widths[1:]:
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    positions = [float(h * w) for h, w in sizes]
    others = 2.0 * time**2 + _conv(positions[0], widths[0], config.out_channels)
    layers: list[tuple[float, int, int, bool]] = []  # positions, channels in and out, attends
    skips, running = [widths[0]], widths[0]
    for i, channels in enumerate(widths):
        for _ in range(config.layers_per_block):
            layers.append((positions[i], running, channels, config.cross_attention[i]))
            running = channels
            skips.append(channels)
        if i < last:
            others += _conv(positions[i + 1], channels, channels)
            skips.append(channels)
    layers += [(positions[-1], running, running, attends) for attends in (True, False)]
    for i in reversed(range(len(widths))):
        for _ in range(config.layers_per_block + 1):
            before = running + skips.pop()
            layers.append((positions[i], before, widths[i], config.cross_attention[i]))
            running = widths[i]
        if i > 0:
            others += _conv(positions[i - 1], running, running)
    dead_ends = 2.0 * widths[0] * time + _conv(positions[0], config.in_channels, widths[0])
    for p, before, after, attends in layers:
        others += _resnet(p, before, after) + 2.0 * time * after
        if attends:
            block = 36.0 * p * after**2 + 4.0 * p * (p + tokens) * after
            others += 4.0 * p * after**2 + config.transformer_layers * block
            text = 4.0 * tokens * config.cross_attention_dim * after
            dead_ends += config.transformer_layers * text
    return UNetCount(dead_ends, others)


def vae_encode(config: VAEConfig, height: int, width: int) -> float:
    """Count the encoder's FLOPs for one image of height × width pixels."""
    widths = config.block_out_channels
    positions, running = float(height * width), widths[0]
    total = _conv(positions, config.in_channels, running)
    for i, channels in enumerate(widths):
        for _ in range(config.layers_per_block):
            total += _resnet(positions, running, channels)
            running = channels
        if i < len(widths) - 1:
            positions /= 4
            total += _conv(positions, channels, channels)
    moments = 2 * config.latent_channels
    total += _vae_middle(config, positions) + _conv(positions, running, moments)
    return total + _conv(positions, moments, moments, 1)


def vae_decode(config: VAEConfig, height: int, width: int) -> float:
    """Count the decoder's FLOPs for one image of height × width pixels."""
    widths, latent = config.block_out_channels[::-1], config.latent_channels
    positions, running = float(height * width) / config.downsampling**2, widths[0]
    total = _conv(positions, latent, latent, 1) + _conv(positions, latent, running)
    total += _vae_middle(config, positions)
    for i, channels in enumerate(widths):
        for _ in range(config.layers_per_block + 1):
            total += _resnet(positions, running, channels)
            running = channels
        if i < len(widths) - 1:
            positions *= 4
            total += _conv(positions, channels, channels)
    return total + _conv(positions, running, config.out_channels)


def linear_decode(latent_channels: int, factor: int, height: int, width: int) -> float:
    """Count the linear decoder's FLOPs for one map of height × width pixels at f = `factor`."""
    return _conv(float(height * width) / factor**2, latent_channels, factor**2)


def mask_decode(config: VAEConfig, decoder: str, height: int, width: int) -> float:
    """Count the FLOPs of one map of height × width pixels by a `sampler.decoder`, but "tiny".

    "joint" decodes as "linear" does; what follows is in `sharpening`.
    """
    if decoder in ("linear", "joint"):
        return linear_decode(config.latent_channels, config.downsampling, height, width)
    return vae_decode(config, height, width)


def sharpening(classes: int, height: int, width: int) -> float:
    """Count the FLOPs of the joint decoder for `classes` maps of one photo of height × width."""
    blocks, channels = height * width / joint_decoder.BLOCK**2, joint_decoder.WIDTH
    seen = _conv(blocks, 3 * joint_decoder.BLOCK**2, channels, 1)
    seen += len(joint_decoder.DILATIONS) * _conv(blocks, channels, channels)
    return seen + 2.0 * classes * height * width * channels


def unet_calls(passes: int, sampler: SamplerConfig) -> int:
    """Count the calls of the UNet for one image of `passes` groups, those for a shortlist too."""
    full, ranked = _in_full(passes, sampler)
    return full * sampler.ensemble * sampler.steps + ranked


def _in_full(passes: int, sampler: SamplerConfig) -> tuple[int, int]:
    """Of `passes` those with the whole budget, and those that a shortlist looks at before."""
    full = min(sampler.shortlist, passes) or passes
    return full, passes if full < passes else 0


def maps(
    unet_call: float, passes: int, sampler: SamplerConfig, decode: float, rank: float
) -> float:
    """Count the FLOPs of all gray maps of one image whose image latent is given.

    Args:
      unet_call: of the UNet on one latent.
      passes: groups of classes, K of one class each.
      decode: of one map.
      rank: of one map by which the shortlist, if there is one, finds its classes.
    """
    full, ranked = _in_full(passes, sampler)
    members = full * sampler.ensemble
    return members * (sampler.steps * unet_call + decode) + ranked * (unet_call + rank)


def example(
    config: Config, unet_config: UNetConfig | None, vae_config: VAEConfig, tokens: int
) -> float:
    """Count the FLOPs of one training example of `config.stage`, without those of remat.

    unet_config: None in the VAE stage. tokens: length of the context that the UNet attends to.
    Photo and mask are encoded unless they come from the latent cache. In the single-step and the
    joint decoder's stage each class is a pass; the former's gradient comes back through the
    decoder, whose own gradients nobody needs.
    """
    size = config.data.image_size
    encode = vae_encode(vae_config, *size)
    if unet_config is None:
        return 3.0 * (encode + vae_decode(vae_config, *size))
    height, width = (pixels // vae_config.downsampling for pixels in size)
    call = unet(unet_config, height, width, tokens)
    if config.stage == "e2e":
        decoded = 2.0 * mask_decode(vae_config, config.e2e.decoder, *size)
        return config.e2e.classes * (call.train + decoded) + encode
    if config.stage == "joint":
        classes, decoded = config.joint.classes, mask_decode(vae_config, "joint", *size)
        return classes * (call.forward + decoded) + encode + 3.0 * sharpening(classes, *size)
    return call.train if config.data.cache_latents else call.train + 2.0 * encode


def _conv(positions: float, channels_in: int, channels_out: int, size: int = 3) -> float:
    return 2.0 * size**2 * positions * channels_in * channels_out


def _resnet(positions: float, before: int, after: int) -> float:
    shortcut = _conv(positions, before, after, 1) if before != after else 0.0
    return _conv(positions, before, after) + _conv(positions, after, after) + shortcut


def _vae_middle(config: VAEConfig, positions: float) -> float:
    channels = config.block_out_channels[-1]
    attention = 8.0 * positions * channels**2 + 4.0 * positions**2 * channels
    return 2 * _resnet(positions, channels, channels) + (attention if config.mid_attention else 0.0)


class Traced(NamedTuple):
    """FLOPs of a traced function's matrix products and convolutions, over all devices."""

    run: float  # outside of Pallas kernels
    once: float  # the same with the body of each loop counted once, as XLA counts it
    kernels: float  # in Pallas kernels, which XLA counts as 0


def traced(jaxpr: Any) -> Traced:
    """Count the FLOPs of a jaxpr and those inside it: `traced(jax.jit(f).trace(*arguments).jaxpr)`.

    What no result needs is left out. Of the branches of a condition the costliest counts; a `while`
    of unknown length runs once.
    """
    total, inner = Traced(0.0, 0.0, 0.0), getattr(jaxpr, "jaxpr", jaxpr)
    needed = set(map(id, inner.outvars))
    for equation in reversed(inner.eqns):
        if equation.effects or not needed.isdisjoint(map(id, equation.outvars)):  # else dead code
            needed.update(map(id, equation.invars))
            found = _equation(equation)
            total = Traced(*(a + b for a, b in zip(total, found, strict=True)))
    return total


def _equation(equation: Any) -> Traced:
    name, params = equation.primitive.name, equation.params
    shape = lambda variable: variable.aval.shape  # noqa: E731
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        inner = math.prod(shape(equation.invars[0])[i] for i in contracted)
        flops = 2.0 * math.prod(shape(equation.outvars[0])) * inner
        return Traced(flops, flops, 0.0)
    if name == "conv_general_dilated":
        kernel, layout = shape(equation.invars[1]), params["dimension_numbers"].rhs_spec
        taps = math.prod(kernel) / kernel[layout[0]]  # spatial × input channels
        flops = 2.0 * math.prod(shape(equation.outvars[0])) * taps
        return Traced(flops, flops, 0.0)
    values = [v for p in params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
    inside = [traced(v) for v in values if hasattr(getattr(v, "jaxpr", v), "eqns")]
    if not inside:
        return Traced(0.0, 0.0, 0.0)
    run, once, kernels = (max(parts) for parts in zip(*inside, strict=True))
    if name == "scan":
        return Traced(params["length"] * run, once, params["length"] * kernels)
    if name == "pallas_call":
        return Traced(0.0, 0.0, math.prod(params["grid_mapping"].grid) * run)
    if name == "shard_map":  # what is inside is one device's
        return Traced(*(params["mesh"].size * part for part in (run, once, kernels)))
    return Traced(run, once, kernels)
