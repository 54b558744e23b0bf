"""Random Stable Diffusion folders as diffusers and transformers write them, and how to compare."""

import json
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

UNET_BLOCKS = {True: "CrossAttn{}Block2D", False: "{}Block2D"}


def random(make) -> torch.nn.Module:
    """`make()` with every parameter moved: two norms mixed up would not show at 1 and 0."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        module = make()
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape)
            parameter.add_(noise * (0.3 if parameter.ndim == 1 else 0.05))
    return module.eval()


def random_ours(make) -> nnx.Module:
    """Our module `make(rngs)` with random arrays, without compiling an initialiser per shape."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    draw = np.random.default_rng(0).standard_normal
    return nnx.merge(graph, jax.tree.map(lambda a: jnp.asarray(draw(a.shape, a.dtype)), state))


def unet(attends: tuple[bool, ...], **options) -> diffusers.UNet2DConditionModel:
    return random(
        lambda: diffusers.UNet2DConditionModel(
            down_block_types=tuple(UNET_BLOCKS[a].format("Down") for a in attends),
            up_block_types=tuple(UNET_BLOCKS[a].format("Up") for a in attends[::-1]),
            **options,
        )
    )


def vae(widths: tuple[int, ...], **options) -> diffusers.AutoencoderKL:
    return random(
        lambda: diffusers.AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            **options,
        )
    )


def tiny_vae(width: int, blocks: tuple[int, ...], **options) -> diffusers.AutoencoderTiny:
    widths = (width,) * len(blocks)
    return random(
        lambda: diffusers.AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=blocks,
            num_decoder_blocks=blocks[::-1],
            **options,
        )
    )


def text_encoder(**options) -> transformers.CLIPTextModel:
    config = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "eos_token_id": 98}
    return random(
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**config | options))
    )


def write(root: Path, **components) -> Path:
    """A folder with the components' files, as `save_pretrained` makes them."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    for name, module in components.items():
        module.save_pretrained(root / name)
    return root


def run(function, module, *args):
    """`function(module, *args)` compiled in a hurry: compiling is what takes the time here."""
    graph, state = nnx.split(module)
    jitted = jax.jit(
        lambda state, *args: function(nnx.merge(graph, state), *args),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return jitted(state, *map(jnp.asarray, args))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """[B, H, W, C] → [B, C, H, W]."""
    return torch.from_numpy(array.transpose(0, 3, 1, 2).copy())


def from_torch(tensor: torch.Tensor) -> np.ndarray:
    """The inverse of `to_torch`."""
    return tensor.numpy().transpose(0, 2, 3, 1)


def relative_error(actual, expected) -> float:
    """‖a − b‖ / ‖b‖."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
