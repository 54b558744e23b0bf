"""The paper's pipeline with the modules of diffusers and transformers, and scipy's alignment.

One gray image of all classes. Each member of the ensemble encodes the text and the photo again and
is sampled by itself; the members are aligned as Marigold's code does it (arXiv 2312.02145).
"""

import itertools
from pathlib import Path

import diffusers
import numpy as np
import scipy.optimize
import torch
import transformers

_REGULARIZER, _TOLERANCE, _ITERATIONS = 0.02, 1e-3, 2  # Marigold's


class Pipeline:
    """Of a Stable Diffusion folder."""

    def __init__(self, folder: Path):
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        self.vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
        self.encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")

    @torch.no_grad()
    def members(
        self, photo: np.ndarray, names: list[str], noise: np.ndarray, steps: int
    ) -> np.ndarray:
        """Return gray maps [N, H, W] of a photo uint8 [H, W, 3] from noise [N, h, w, c]."""
        return np.stack([self._member(photo, names, start, steps) for start in noise])

    def _member(
        self, photo: np.ndarray, names: list[str], start: np.ndarray, steps: int
    ) -> np.ndarray:
        texts = [f"a photo of a {name}" for name in names]
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        context = self.encoder(ids.input_ids).last_hidden_state.mean(0, keepdim=True)
        pixels = torch.from_numpy(photo.transpose(2, 0, 1).copy())[None].float() / 127.5 - 1
        scale = self.vae.config.scaling_factor
        image = self.vae.encode(pixels).latent_dist.mean * scale
        latents = torch.from_numpy(start.transpose(2, 0, 1).copy())[None]
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            prediction = self.unet(torch.cat([image, latents], 1), t, context).sample
            latents = self.scheduler.step(prediction, t, latents).prev_sample
        return self.vae.decode(latents / scale).sample[0].mean(0).numpy()


def merged(members: np.ndarray) -> np.ndarray:
    """Return the median of aligned members [N, H, W] in [-1, 1], as a map in [0, 1]."""
    maps = (members.clip(-1, 1) + 1) / 2
    low, high = maps.min((1, 2)), maps.max((1, 2))
    scale = 1 / np.maximum(high - low, 1e-6)
    pairs = np.array(list(itertools.combinations(range(len(maps)), 2))).T

    def aligned(parameters: np.ndarray) -> np.ndarray:
        s, t = np.split(parameters.astype(np.float32), 2)
        return maps * s[:, None, None] + t[:, None, None]

    def objective(parameters: np.ndarray) -> float:
        moved = aligned(parameters)
        apart = np.sqrt(np.mean((moved[pairs[0]] - moved[pairs[1]]) ** 2))
        middle = np.median(moved, axis=0)
        return float(apart + _REGULARIZER * (abs(middle.min()) + abs(1 - middle.max())))

    found = scipy.optimize.minimize(
        objective,
        np.concatenate([scale, -scale * low]),
        method="BFGS",
        tol=_TOLERANCE,
        options={"maxiter": _ITERATIONS},
    )
    middle = np.median(aligned(found.x), axis=0)
    return (middle - middle.min()) / max(float(middle.max() - middle.min()), 1e-6)
