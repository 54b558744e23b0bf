"""A list of classes asked of the networks: which passes, how many members, and the maps they give.

latents [I, h, w, c] ─► shortlist   the passes worth the whole budget, kept [I, M]: one cheap
                        │           pass for every class, or all of them
                        └► in_full  gray maps and their spread [I, P, H, W], merged over members
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from segdiff_jax.config import SamplerConfig
from segdiff_jax.data import geometry
from segdiff_jax.inference import sampling
from segdiff_jax.inference.networks import Contexts, Networks
from segdiff_jax.progress import Progress


class Passes:
    """The `count` passes of a list of classes, with the budget of `sampler` and one seed.

    contexts: of numbers of passes, as `Networks.maps` takes them.
    progress: called with (done, total) passes through the UNet, once `begin` has told how many.
    """

    def __init__(
        self,
        networks: Networks,
        contexts: Contexts,
        count: int,
        sampler: SamplerConfig,
        seed: int,
        progress: Progress | None = None,
    ):
        self._networks, self._contexts, self.count = networks, contexts, count
        self.sampler, self._seed, self._progress = sampler, seed, progress
        self._short = 0 < sampler.shortlist < count
        self.budget = (sampler.shortlist if self._short else count) * sampler.ensemble  # of a view
        self._done = self._total = 0

    def begin(self, images: int, views: int) -> None:
        """Tells what is to come: `views` in full of `images` with a shortlist each."""
        self._total = views * self.budget + images * self.count * self._short
        self._tell(0)

    def _tell(self, more: int) -> None:
        self._done += more
        if self._progress:
            self._progress(self._done, self._total)

    def shortlist(self, latents: np.ndarray, filled: Sequence[geometry.Size]) -> np.ndarray:
        """The numbers int [I, M] of the passes that are most present in each image, ascending.

        filled: the part (height, width) of each view that its photo fills, for padding is no area.
        """
        images = len(latents)
        if not self._short:
            return np.tile(np.arange(self.count), (images, 1))
        decoder = "linear" if "linear" in self._networks.decoders else self.sampler.decoder
        cheap = dataclasses.replace(self.sampler, steps=1, ensemble=1, decoder=decoder)
        jobs = sampling.grid(images, self.count, 1)
        first = self._maps(latents, jobs, cheap)
        first = first.reshape(images, self.count, *first.shape[1:])
        seen = [maps[:, :down, :across] for maps, (down, across) in zip(first, filled, strict=True)]
        presence = np.stack([maps.clip(0.0, 1.0).mean((1, 2)) for maps in seen])  # [I, K] of area
        brightness = np.stack([maps.mean((1, 2)) for maps in seen])
        order = np.lexsort((-brightness, -presence))  # the brighter map of two absent ones
        return np.sort(order[:, : self.sampler.shortlist], axis=1)

    def in_full(self, latents: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unclipped maps and their spread [I, P, H, W], of the passes `kept` [I, M] of each image.

        Others are darker than all that was asked for: what was not asked for wins nowhere.
        """
        (images, some), members = kept.shape, self.sampler.ensemble
        jobs = sampling.grid(images, some, members)
        jobs[:, 1] = kept[jobs[:, 0], jobs[:, 1]]
        maps = self._maps(latents, jobs, self.sampler)
        size = maps.shape[1:]
        maps = maps.reshape(images, some, members, *size)
        merged, merged_spread = sampling.merge(maps, self.sampler, self._networks.mesh)
        gray, spread = merged, merged_spread
        if some < self.count:
            gray = np.full((images, self.count, *size), min(-1.0, merged.min()) - 1.0, np.float32)
            spread = np.zeros_like(gray)
            rows = np.arange(images)[:, None]
            gray[rows, kept], spread[rows, kept] = merged, merged_spread
        sampling.check_finite(gray + spread, np.moveaxis(np.indices(gray.shape[:2]), 0, -1))
        return gray, spread

    def _maps(self, latents: np.ndarray, jobs: np.ndarray, sampler: SamplerConfig) -> np.ndarray:
        return self._networks.maps(latents, self._contexts, jobs, sampler, self._seed, self._tell)
