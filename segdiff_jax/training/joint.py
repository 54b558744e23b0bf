"""The joint decoder's stage: what it trains, on which networks, and the file that it leaves.

W, a finished training ─► UNet, VAE, linear decoder, prompts: frozen ─► maps of the classes asked
photo, maps, text ─► JointDecoder ─► loss on labels                      (`losses.joint_loss`)
W/joint/STEP, the workdir of this stage ─► joint_decoder.safetensors
"""

import functools
import logging

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from segdiff_jax import files, ownership
from segdiff_jax.data import preference
from segdiff_jax.diffusion.schedule import make_schedule
from segdiff_jax.models import flops
from segdiff_jax.models.attention import plain
from segdiff_jax.models.joint_decoder import JointDecoder
from segdiff_jax.models.layers import kernels_as_multiplied
from segdiff_jax.parallel import attention_kernels, processes
from segdiff_jax.text import conditioning
from segdiff_jax.training.loop import Run, Stage
from segdiff_jax.training.losses import Frozen
from segdiff_jax.training.step import TrainState, joint_step
from segdiff_jax.weights import loading, mask_decoders
from segdiff_jax.weights import workdir as workdirs
from segdiff_jax.weights.tensors import shapes_of

log = logging.getLogger(__name__)


def prepare(run: Run) -> Stage:
    """Prepare the "joint" stage.

    Its `init_from` is the workdir of the UNet, its own `workdirs.joint_folder` of the UNet's step.
    """
    config, workdir = run.config, run.config.init_from
    dtype = jnp.dtype(config.model.dtype)
    step = epath.Path(run.workdir).name
    unet, *_ = loading.load_unet(workdir, mesh=run.mesh, which=step)
    folder = str(epath.Path(workdir) / workdirs.PRETRAINED)
    vae, text_encoder, tokenizer = loading.load_frozen(folder, dtype)
    table = conditioning.encode_prompts(
        text_encoder, tokenizer, run.source.vocabulary.classes, config.prompts.templates
    )
    attention = attention_kernels.on_mesh(run.mesh)
    unet_graph, unet_params = nnx.split(attention_kernels.with_attention(unet, attention))
    vae_graph, vae_params = nnx.split(attention_kernels.with_attention(vae, plain))
    build = functools.partial(JointDecoder, table.pooled.shape[1], dtype=dtype)
    decoder = shapes_of(build)
    return Stage(
        network=decoder,
        build=build,
        step=joint_step(nnx.graphdef(decoder), unet_graph, vae_graph, config, run.mesh),
        frozen=Frozen(
            vae=vae_params,
            schedule=make_schedule(config.diffusion),
            table=table,
            decoder=mask_decoders.read_linear(workdir, vae.config),
            unet=kernels_as_multiplied(unet_graph, unet_params),
        ),
        flops=flops.example(config, unet.config, vae.config, table.hidden.shape[1]),
        preferred=preference.of_training(run.source, config, np.asarray(table.pooled)),
    )


def forget_after(step: int, workdir: str) -> None:
    """Remove the decoders of later UNets than that of `step`, from which a training goes on.

    Their UNets are gone: training on from `step` will make other ones. All processes call this.
    """
    folder = epath.Path(workdir) / workdirs.JOINT_STAGE
    if processes.is_first() and ownership.is_ours(folder) and folder.is_dir():
        for path in folder.iterdir():
            if path.name.isdecimal() and int(path.name) > step:
                log.info("%s: removed: it is of a UNet whose checkpoint is gone", path)
                path.rmtree()
    processes.barrier()


def write(run: Run, state: TrainState) -> None:
    """Write the decoder of a finished stage. All processes call this."""
    params = processes.gathered(state.ema or state.params)
    if processes.is_first():
        path = epath.Path(run.workdir) / mask_decoders.JOINT
        files.write_bytes(path, mask_decoders.joint_to_bytes(params))
    processes.barrier()
