"""Random Stable Diffusion folders as diffusers and transformers write them, and how to compare."""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers

UNET_BLOCKS = {True: "CrossAttn{}Block2D", False: "{}Block2D"}


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter: norms start at 1 and 0, so that mixing two up would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.3 if parameter.ndim == 1 else 0.05))
    return module.eval()


def unet(attends: tuple[bool, ...], **options) -> diffusers.UNet2DConditionModel:
    return randomise(
        diffusers.UNet2DConditionModel(
            down_block_types=tuple(UNET_BLOCKS[a].format("Down") for a in attends),
            up_block_types=tuple(UNET_BLOCKS[a].format("Up") for a in attends[::-1]),
            **options,
        )
    )


def vae(widths: tuple[int, ...], **options) -> diffusers.AutoencoderKL:
    return randomise(
        diffusers.AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            **options,
        )
    )


def text_encoder(**options) -> transformers.CLIPTextModel:
    config = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "eos_token_id": 98}
    return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config | options)))


def write(root: Path, **components) -> Path:
    """A folder with the components' files, as `save_pretrained` makes them."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    for name, module in components.items():
        module.save_pretrained(root / name)
    return root


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
