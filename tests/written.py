"""What trainings leave in a workdir: their states, and the events of TensorBoard."""

import functools
import struct
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tensorboardX.proto.event_pb2 import Event

from segdiff_jax.models.unet import UNet
from segdiff_jax.training.step import init_state
from segdiff_jax.weights import loading
from segdiff_jax.weights import workdir as workdirs
from segdiff_jax.weights.checkpoint import Checkpoints


def steps_of(workdir):
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    checkpoints.close()
    return steps


def state_of(workdir, step=None):
    config = workdirs.read_config(str(workdir))
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
    params = abstract_params(loading.unet_config_from(checkpoints.metadata()))
    abstract = jax.eval_shape(lambda p: init_state(p, config), params)
    state, _ = checkpoints.restore(abstract, step)
    checkpoints.close()
    return state


@functools.cache
def abstract_params(architecture):
    return nnx.state(nnx.eval_shape(lambda: UNet(architecture, rngs=nnx.Rngs(0))))


def same_bits(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves
    )


def read_events(directory):
    """The events of all files: each record is length, checksum, bytes, checksum (TFRecord)."""
    events = []
    for path in sorted(directory.rglob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += length + 16
    return events


def read_scalars(workdir):
    values = {}
    for event in read_events(workdir / "tensorboard"):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                values.setdefault(value.tag, {})[event.step] = value.simple_value
    return values
