"""How many FLOPs the networks need, counted from their configs: the matrix products, no more.

A multiply-add is two FLOPs. A convolution counts k² taps at every output position, borders
included; norms, activations and the optimiser count nothing. docs/performance.md derives the sums.
"""

from segdiff_jax import codec
from segdiff_jax.config import Config
from segdiff_jax.models.clip_text import CLIPTextConfig
from segdiff_jax.models.unet import UNetConfig
from segdiff_jax.models.vae import VAEConfig


def _conv(pixels: float, channels_in: int, channels_out: int, size: int = 3) -> float:
    return 2.0 * size**2 * pixels * channels_in * channels_out


def _resnet(pixels: float, channels_in: int, channels_out: int) -> float:
    shortcut = _conv(pixels, channels_in, channels_out, 1) if channels_in != channels_out else 0.0
    return (
        _conv(pixels, channels_in, channels_out)
        + _conv(pixels, channels_out, channels_out)
        + shortcut
    )


class UNetCount:
    """FLOPs of one example through the UNet: `forward`, and `train` = forward and backward."""

    def __init__(self, config: UNetConfig, height: int, width: int, tokens: int):
        self.config, self.tokens = config, tokens
        self.once = 0.0  # has no input that gradients flow to: the backward costs once, not twice
        self.twice = 0.0
        widths, layers, last = (
            config.block_out_channels,
            config.layers_per_block,
            len(config.heads) - 1,
        )
        time = 4 * widths[0]
        self.once += 2.0 * widths[0] * time
        self.twice += 2.0 * time * time
        pixels = float(height * width)
        self.once += _conv(pixels, config.in_channels, widths[0])
        heads = [
            n if on else None for n, on in zip(config.heads, config.cross_attention, strict=True)
        ]
        sizes = [(height, width)]
        skips = [widths[0]]
        running = widths[0]
        for i, channels in enumerate(widths):
            pixels = float(sizes[i][0] * sizes[i][1])
            for _ in range(layers):
                self._layer(pixels, running, channels, time, heads[i] is not None)
                running = channels
                skips.append(channels)
            if i < last:
                sizes.append(((sizes[i][0] + 1) // 2, (sizes[i][1] + 1) // 2))
                self.twice += _conv(float(sizes[-1][0] * sizes[-1][1]), channels, channels)
                skips.append(channels)
        pixels = float(sizes[-1][0] * sizes[-1][1])
        self._layer(pixels, running, running, time, True)
        self._layer(pixels, running, running, time, False)
        for i in reversed(range(len(widths))):
            pixels = float(sizes[i][0] * sizes[i][1])
            for _ in range(layers + 1):
                self._layer(pixels, running + skips.pop(), widths[i], time, heads[i] is not None)
                running = widths[i]
            if i > 0:
                self.twice += _conv(float(sizes[i - 1][0] * sizes[i - 1][1]), running, running)
        self.twice += _conv(float(height * width), widths[0], config.out_channels)

    def _layer(self, pixels: float, before: int, after: int, time: int, attends: bool) -> None:
        self.twice += _resnet(pixels, before, after) + 2.0 * time * after
        if attends:
            self.twice += 4.0 * pixels * after**2  # projections in and out
            for _ in range(self.config.transformer_layers):
                self._transformer(pixels, after)

    def _transformer(self, positions: float, channels: int) -> None:
        own = 8.0 * positions * channels**2 + 4.0 * positions**2 * channels
        across = 4.0 * positions * channels**2 + 4.0 * positions * self.tokens * channels
        feed_forward = 24.0 * positions * channels**2
        self.twice += own + across + feed_forward
        # Keys and values of the text, which is not trained.
        self.once += 4.0 * self.tokens * self.config.cross_attention_dim * channels

    @property
    def forward(self) -> float:
        return self.once + self.twice

    @property
    def train(self) -> float:
        """Forward, gradient of every weight, gradient of every input that depends on a weight."""
        return 2.0 * self.once + 3.0 * self.twice


def vae_encode(config: VAEConfig, height: int, width: int) -> float:
    """Of one image of height × width pixels."""
    widths, last = config.block_out_channels, len(config.block_out_channels) - 1
    pixels, running = float(height * width), widths[0]
    total = _conv(pixels, config.in_channels, widths[0])
    for i, channels in enumerate(widths):
        for _ in range(config.layers_per_block):
            total += _resnet(pixels, running, channels)
            running = channels
        if i < last:
            pixels /= 4
            total += _conv(pixels, channels, channels)
    moments = 2 * config.latent_channels
    total += _vae_middle(config, pixels) + _conv(pixels, running, moments)
    return total + _conv(pixels, moments, moments, 1)


def vae_decode(config: VAEConfig, height: int, width: int) -> float:
    """Of one image of height × width pixels."""
    widths = config.block_out_channels[::-1]
    pixels, running = float(height * width) / config.downsampling**2, widths[0]
    latent = config.latent_channels
    total = _conv(pixels, latent, latent, 1) + _conv(pixels, latent, running)
    total += _vae_middle(config, pixels)
    for i, channels in enumerate(widths):
        for _ in range(config.layers_per_block + 1):
            total += _resnet(pixels, running, channels)
            running = channels
        if i < len(widths) - 1:
            pixels *= 4
            total += _conv(pixels, channels, channels)
    return total + _conv(pixels, running, config.out_channels)


def train_example(
    config: Config, unet: UNetConfig | None, vae: VAEConfig, classes: int, tokens: int
) -> float:
    """Of one example of `config.stage`; recomputation is no work that the networks need.

    unet: None for the VAE stage. classes, tokens: K, and the length of a prompt.
    """
    height, width = config.data.image_size
    encode = vae_encode(vae, height, width)
    if unet is None:
        return 3 * (encode + vae_decode(vae, height, width))
    frozen = 0.0 if config.data.cache_latents else 2 * encode  # photo and mask image
    return unet_count(config, unet, vae, classes, tokens).train + frozen


def unet_count(
    config: Config, unet: UNetConfig, vae: VAEConfig, classes: int, tokens: int
) -> UNetCount:
    """Of one example at the size that `config` gives it; arguments as of `train_example`."""
    if config.codec.context == "bound":
        tokens = codec.group_size(classes, config.codec.classes_per_pass)
    height, width = (size // vae.downsampling for size in config.data.image_size)
    return UNetCount(unet, height, width, tokens)


def _vae_middle(config: VAEConfig, positions: float) -> float:
    channels = config.block_out_channels[-1]
    attention = 8.0 * positions * channels**2 + 4.0 * positions**2 * channels
    return 2 * _resnet(positions, channels, channels) + (attention if config.mid_attention else 0.0)


def text_encode(config: CLIPTextConfig) -> float:
    """Of one prompt."""
    length, width = config.max_position_embeddings, config.hidden_size
    attention = 8.0 * length * width**2 + 4.0 * length**2 * width
    return config.num_hidden_layers * (attention + 4.0 * length * width * config.intermediate_size)
