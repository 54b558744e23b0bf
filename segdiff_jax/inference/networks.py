"""The networks on the devices of a mesh, called with few shapes. They know no words and no files.

latents   views uint8 [I, H, W, 3], one a device and call → latents [I, h, w, c]
sharpened views, maps of classes, their text → maps by the joint decoder
maps      jobs (image, pass, member) int [J, 3], in equal calls that are halved where memory ends:
            pass → context, image → latent
            → sampling.sampler_on, each device by itself, one call ahead
          → gray maps [J, H, W]
"""

import logging
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from segdiff_jax.config import Config, SamplerConfig
from segdiff_jax.diffusion.schedule import make_schedule
from segdiff_jax.errors import UserError
from segdiff_jax.inference import sampling
from segdiff_jax.models import joint_decoder
from segdiff_jax.models.attention import plain
from segdiff_jax.models.layers import kernels_as_multiplied
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE
from segdiff_jax.parallel import attention_kernels, processes
from segdiff_jax.parallel.mesh import put, replicated
from segdiff_jax.parallel.placement import equal_parts, rows_of_call, spread_rows, whole
from segdiff_jax.weights.mask_decoders import Decoders

# Numbers of passes int [B] → their contexts [B, L, D] and mask [B, L] or None.
Contexts = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
Done = Callable[[int], None]  # is told how many more jobs are finished

log = logging.getLogger(__name__)


class Networks:
    """UNet and VAE of a trained model, whole on each device of `mesh`."""

    def __init__(self, unet: UNet, vae: VAE, config: Config, mesh: Mesh):
        self.mesh, self._dtype = mesh, config.model.dtype
        # Each device works by itself (`sampler_on`), whatever mesh the networks were trained on.
        attention = attention_kernels.on_device(mesh.devices.flat[0].platform)
        self.unet, unet_params = nnx.split(attention_kernels.with_attention(unet, attention))
        self.vae, vae_params = nnx.split(attention_kernels.with_attention(vae, plain))
        # Not the VAE's: a tenth of the size, and training has the same arrays in use. Rounded
        # before they are gathered: half of the bytes to send and to hold.
        rounded = kernels_as_multiplied(self.unet, unet_params)
        self.unet_params = whole(rounded, mesh)
        self.vae_params = whole(vae_params, mesh)
        self.schedule = whole(make_schedule(config.diffusion), mesh)
        # By the names of `config.sampler.decoder`; of a linear one no graph, only its arrays.
        self.decoders: dict[str, tuple[Any, Any]] = {"vae": (self.vae, self.vae_params)}
        self._joint: tuple[nnx.GraphDef, Any] | None = None  # graph and parameters
        self._most: int | None = None  # jobs in one call that fit into memory; None: not known

    def add_decoders(self, decoders: Decoders) -> None:
        """Add choices for `config.sampler.decoder`; a linear decoder also ranks shortlists."""
        if decoders.linear is not None:
            self.decoders["linear"] = None, whole(decoders.linear, self.mesh)
        if decoders.tiny is not None:
            graph, params = nnx.split(decoders.tiny)
            self.decoders["tiny"] = graph, whole(params, self.mesh)
        if decoders.joint is not None and "linear" in self.decoders:
            joint, joint_params = nnx.split(decoders.joint)
            self._joint = joint, whole(joint_params, self.mesh)
            self._joint_head = jax.tree.map(np.asarray, decoders.joint.head())
            # What it sharpens are maps like those that it was trained on.
            self.decoders["joint"] = self.decoders["linear"]

    def check_decoder(self, name: str) -> None:
        """Raise `UserError` that says how to come by a decoder if there is none of this `name`."""
        mend = {
            "linear": "run its training again, which only fits one if it is finished (of an "
            "export: then export it again)",
            "joint": "run its training again with config.joint.steps, which trains one for the "
            "newest checkpoint",
            "tiny": "copy an AutoencoderTiny of its latent space (madebyollin/taesd is one of "
            "Stable Diffusion 1 and 2) to tiny_vae/, of a workdir pretrained/tiny_vae/",
        }
        if name not in self.decoders:
            raise UserError(
                f"config.sampler.decoder={name!r}: this model has no such decoder: {mend[name]}, "
                "or use vae"
            )

    def latents(self, views: np.ndarray) -> np.ndarray:
        """Encode views uint8 [I, H, W, 3] as latents [I, h, w, c]."""
        return self._of_views(sampling.encode, self.vae, self.vae_params, views)

    def _of_views(self, call: Any, graph: nnx.GraphDef, params: Any, views: np.ndarray) -> Any:
        """Return what `call(graph, params, views)` gives [I, ...], one view a device at a time.

        So no number of views compiles anew, and two processes give the bits that one gives: those
        of a batch of several views were seen to differ on CPUs.
        """
        each = equal_parts(views, self.mesh.size)
        parts = [call(graph, params, spread_rows(part, self.mesh)) for part in each]
        return np.concatenate([processes.gathered(p) for p in parts])[: len(views)]

    def sharpened(self, views: np.ndarray, maps: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Sharpen maps by the joint decoder.

        Args:
          views: uint8 [I, H, W, 3], what the networks saw of each photo.
          maps: of C classes of each, unclipped [I, C, H, W].
          text: the pooled prompts of these classes [I, C, D].
        """
        assert self._joint is not None  # as `check_decoder` makes sure
        seen = self._of_views(sampling.features, *self._joint, views)
        return joint_decoder.to_maps(joint_decoder.logits(self._joint_head, seen, text, maps))

    def reconstruct(self, pixels: np.ndarray) -> np.ndarray:
        """Send images [I, H, W, 3] in [-1, 1], at the networks' size, through the VAE and back.

        Raise `UserError` if the result is not finite.
        """
        decoded = self._of_views(sampling.reconstruct, self.vae, self.vae_params, pixels)
        if not np.isfinite(decoded).all():
            raise UserError(f"what the VAE decodes is not finite: {self.why_not_finite()}")
        return decoded

    def maps(
        self,
        latents: np.ndarray,
        contexts: Contexts,
        jobs: np.ndarray,
        sampler: SamplerConfig,
        seed: int,
        done: Done,
    ) -> np.ndarray:
        """Return the unclipped gray maps [J, H, W] of jobs (image, pass, member) int [J, 3].

        They run in equal calls of `sampler.batch_size` rows (or the next multiple of the devices)
        where there are as many, else of one of the few sizes of `rows_of_call`. A size that does
        not fit into memory is halved for this call and all later ones.

        Raise `NotFinite` if a map is, and `UserError` if not even one job a device fits.
        """
        start = self._starter(latents, contexts, sampler, seed)
        while True:
            most = min(sampler.batch_size, self._most or sampler.batch_size)
            size = rows_of_call(len(jobs), most, self.mesh.size)
            try:
                maps = _in_calls_of(size, jobs, start, done)
            except jax.errors.JaxRuntimeError as error:
                # Other processes, whose memory did suffice, would wait for this one for ever.
                if "RESOURCE_EXHAUSTED" not in str(error) or processes.count() > 1:
                    raise
                if size <= self.mesh.size:
                    raise UserError(
                        "the memory does not suffice for one pass: free some, or use a model of "
                        "a smaller config.data.image_size"
                    ) from error
                self._most = size // 2
                log.warning(
                    "%d passes at once do not fit into memory: going on with %d", size, self._most
                )
            else:
                sampling.check_finite(maps, jobs)
                return maps

    def _starter(
        self, latents: np.ndarray, contexts: Contexts, sampler: SamplerConfig, seed: int
    ) -> Callable[[np.ndarray], jax.Array]:
        """Return a function that starts jobs on the devices and does not wait for their maps."""
        key = jax.random.key_data(jax.random.key(seed))
        key = jax.random.wrap_key_data(put(key, replicated(self.mesh)))
        sample = sampling.sampler_on(self.mesh)
        decoder, decoder_params = self.decoders[sampler.decoder]
        settings = sampler.steps, sampler.eta, sampler.initial_noise
        how = sampling.How(self.unet, decoder, *settings)

        def start(jobs: np.ndarray) -> jax.Array:
            image, pass_, member = jobs.T
            rows = sampling.Jobs(*contexts(pass_), latents[image], member.astype(np.int32))
            with processes.at_work("compiles or runs the sampler"):
                spread = jax.tree.map(lambda array: spread_rows(array, self.mesh), rows)
                return sample(how, self.unet_params, decoder_params, self.schedule, spread, key)

        return start

    def checksum(self) -> str:
        """Return the CRC-32 of what a training changes, eight digits: it tells models apart."""
        found = 0
        for leaf in jax.tree.leaves((self.unet_params, self._joint and self._joint[1])):
            found = zlib.crc32(np.asarray(leaf.addressable_data(0)).tobytes(), found)
        return f"{found:08x}"

    def why_not_finite(self) -> str:
        """Return the likely reason for a value that is not finite, and what to do."""
        weights = {"UNet": self.unet_params, "VAE": self.vae_params}
        weights |= {f"{name} decoder": params for name, (_, params) in self.decoders.items()}
        if self._joint is not None:
            weights["joint decoder"] = self._joint[1]  # and not what gives it its maps
        for name, params in weights.items():
            if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
                return f"the weights of the {name} are not: use another checkpoint, or restore it"
        if self._dtype == "bfloat16":
            return (
                "the weights are, so it is an overflow, most likely of bfloat16: "
                'set "dtype" of "model" to "float32" in the config.json (of an export: '
                "segdiff.json) of the checkpoint"
            )
        return (
            "the weights are, so it is an overflow on the way: use an earlier checkpoint, "
            "or train on with a lower optimizer.learning_rate"
        )


def _in_calls_of(
    size: int, jobs: np.ndarray, start: Callable[[np.ndarray], jax.Array], done: Done
) -> np.ndarray:
    """Return the maps [J, H, W] of jobs that `start` gets in equal parts of `size`."""
    found: list[np.ndarray] = []
    running: list[jax.Array] = []

    def finish(maps: jax.Array) -> None:
        found.append(processes.gathered(maps))
        done(min(size, len(jobs) - size * (len(found) - 1)))

    for part in equal_parts(jobs, size):
        running.append(start(part))
        # One call ahead: the devices do not wait, nor do they hold the inputs of all calls.
        if len(running) > 1:
            finish(running.pop(0))
    finish(running.pop())
    return np.concatenate(found)[: len(jobs)]
