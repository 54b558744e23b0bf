"""A list of classes asked of the networks: which passes, how many members, and the maps they give.

A pass paints one gray map, of one class or of a group of them. A job is one member of one pass of
one image.

latents [I, h, w, c] ─► shortlist   the passes kept [I, M] for the whole budget: all, or the most
                        │           present in one job of one step for each
                        └► in_full  gray maps and their spread [I, P, H, W], merged over members
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from segdiff_jax import codec
from segdiff_jax.combinations import check_sampler
from segdiff_jax.config import Config, SamplerConfig
from segdiff_jax.data import geometry
from segdiff_jax.errors import UserError
from segdiff_jax.inference import sampling
from segdiff_jax.inference.networks import Contexts, Networks
from segdiff_jax.progress import Progress


def check_sampling(sampler: SamplerConfig, config: Config) -> None:
    """Raise `UserError` for a sampler that a model of `config` cannot run."""
    check_sampler(sampler)
    total = config.diffusion.num_train_timesteps
    if sampler.steps > total:
        raise UserError(
            f"steps={sampler.steps}: this model has {total} steps, ask for 1 to {total}"
        )


def check_request(sampler: SamplerConfig, config: Config, classes: int) -> None:
    """Raise `UserError` for what a model of `config` cannot be asked with so many `classes`."""
    check_sampling(sampler, config)
    group = codec.group_size(classes, config.codec.classes_per_pass)
    if group > 1 and (sampler.shortlist or sampler.decoder == "joint"):
        joint = not sampler.shortlist
        what = "decoder=joint" if joint else f"shortlist={sampler.shortlist}"
        raise UserError(
            f"{what}: needs one class per pass, but this model paints {group} classes in one: "
            f"{'use vae' if joint else 'set it to 0'}"
        )


class Passes:
    """The passes of a list of classes, with the budget of `sampler` and one seed.

    contexts: of numbers of passes, as `Networks.maps` takes them.
    text: the pooled prompts of the passes' classes [P, D], for the joint decoder.
    progress: called with (done, total) jobs, from `begin` on.
    budget: jobs that one view takes in full.
    """

    def __init__(
        self,
        networks: Networks,
        contexts: Contexts,
        text: np.ndarray,
        sampler: SamplerConfig,
        seed: int,
        progress: Progress | None,
    ):
        self._networks, self._contexts, self._text = networks, contexts, text
        self._count = count = len(text)
        self._sampler, self._seed, self._progress = sampler, seed, progress
        self._short = 0 < sampler.shortlist < count
        self.budget = (sampler.shortlist if self._short else count) * sampler.ensemble
        self._done = self._total = 0

    def begin(self, images: int, views: int) -> None:
        """Announce `images` with a shortlist each, and `views` of them in full."""
        self._total = views * self.budget + images * self._count * self._short
        self._tell(0)

    def _tell(self, more: int) -> None:
        self._done += more
        if self._progress:
            self._progress(self._done, self._total)

    def shortlist(self, latents: np.ndarray, filled: Sequence[geometry.Size]) -> np.ndarray:
        """Return the numbers int [I, M] of the passes most present in each image, ascending.

        filled: the part (height, width) of each view that its photo fills: padding does not count.
        """
        images = len(latents)
        if not self._short:
            return np.tile(np.arange(self._count), (images, 1))
        decoder = "linear" if "linear" in self._networks.decoders else self._sampler.decoder
        cheap = dataclasses.replace(self._sampler, steps=1, ensemble=1, decoder=decoder)
        jobs = sampling.grid(images, self._count, 1)
        first = self._maps(latents, jobs, cheap)
        first = first.reshape(images, self._count, *first.shape[1:])
        seen = [maps[:, :down, :across] for maps, (down, across) in zip(first, filled, strict=True)]
        presence = np.stack([maps.clip(0.0, 1.0).mean((1, 2)) for maps in seen])  # [I, K] of area
        brightness = np.stack([maps.mean((1, 2)) for maps in seen])
        order = np.lexsort((-brightness, -presence))  # the brighter map of two absent ones
        return np.sort(order[:, : self._sampler.shortlist], axis=1)

    def in_full(
        self, latents: np.ndarray, views: np.ndarray | None, kept: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return unclipped maps and their spread [I, P, H, W]; only passes `kept` [I, M] are run.

        views: uint8 [I, H, W, 3], of which `latents` are, for the joint decoder.
        The maps of all others are darker than any of these, so that their classes win nowhere.
        Raise `NotFinite` if a map or its spread is.
        """
        (images, passes), members = kept.shape, self._sampler.ensemble
        jobs = sampling.grid(images, passes, members)
        jobs[:, 1] = kept[jobs[:, 0], jobs[:, 1]]
        maps = self._maps(latents, jobs, self._sampler)
        size = maps.shape[1:]
        maps = maps.reshape(images, passes, members, *size)
        merged, merged_spread = sampling.merge(maps, self._sampler, self._networks.mesh)
        if views is not None:
            merged = self._networks.sharpened(views, merged, self._text[kept])
        gray, spread = merged, merged_spread
        if passes < self._count:
            gray = np.full((images, self._count, *size), min(-1.0, merged.min()) - 1.0, np.float32)
            spread = np.zeros_like(gray)
            rows = np.arange(images)[:, None]
            gray[rows, kept], spread[rows, kept] = merged, merged_spread
        sampling.check_finite(gray + spread, np.moveaxis(np.indices(gray.shape[:2]), 0, -1))
        return gray, spread

    def _maps(self, latents: np.ndarray, jobs: np.ndarray, sampler: SamplerConfig) -> np.ndarray:
        return self._networks.maps(latents, self._contexts, jobs, sampler, self._seed, self._tell)
