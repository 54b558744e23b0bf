"""Blocks of Stable Diffusion 2's UNet compiled alone for one v5e, 4 examples: minutes, not an hour.

`python tests/roofline/pieces.py [xla_option=value ...]` prints FLOPs, XLA's bytes accessed, the
part with HBM, temporaries and code of each, how many cycles XLA estimates it to run, and what
compiling takes: time, and user time of all cores. Forward and with gradients. To try a change or an
option of the compiler before the whole step is compiled.
"""

import os
import resource
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from segdiff_jax.models.layers import ResnetBlock
from segdiff_jax.models.unet import SpatialTransformer, UNetConfig
from segdiff_jax.roofline import chips, compile, hlo, traffic
from segdiff_jax.roofline.steps import Step
from segdiff_jax.training import attention_kernels

DTYPE, CONFIG = jnp.bfloat16, UNetConfig()


def resnet(channels, size):
    def make():
        kw = {"groups": 32, "epsilon": 1e-5, "time_dim": 1280, "dtype": DTYPE}
        return ResnetBlock(channels, channels, rngs=nnx.Rngs(0), **kw)

    inputs = (array(4, size, size, channels), array(4, 1280, dtype=jnp.float32))
    return make, inputs, (), lambda block, x, time: block(x, time)


def transformer(channels, size):
    def make():
        kw = {"zero": False, "attention": attention_kernels.splash, "dtype": DTYPE}
        return SpatialTransformer(CONFIG, channels, channels // 64, rngs=nnx.Rngs(0), **kw)

    text = array(4, 77, CONFIG.cross_attention_dim)  # frozen: no gradient
    x = array(4, size, size, channels)
    return make, (x,), (text,), lambda block, x, text: block(x, text, None)


PIECES = {
    "resnet 320, 48 × 48": (resnet, 320, 48),
    "resnet 1280, 12 × 12": (resnet, 1280, 12),
    "transformer 320, 48 × 48": (transformer, 320, 48),
    "transformer 1280, 12 × 12": (transformer, 1280, 12),
}


def array(*shape, dtype=DTYPE):
    return jax.ShapeDtypeStruct(shape, dtype)


def functions(make, apply):
    """Parameters (abstract), the forward function, and the one that also gives all gradients."""
    graph, params = nnx.split(nnx.eval_shape(make))

    def forward(params, inputs, frozen):
        return apply(nnx.merge(graph, params), *inputs, *frozen)

    def both(params, inputs, frozen, cotangent):
        result, gradients = jax.vjp(lambda p, i: forward(p, i, frozen), params, inputs)
        return result, gradients(cotangent)

    return params, forward, both


def report(name, function, arguments, mesh, options):
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))  # noqa: E731
    jitted = jax.jit(function, compiler_options=options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    made = compile.compile_step(Step(jitted, tuple(jax.tree.map(place, arguments)), 1, 0))
    user = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    moved = traffic.hbm_bytes(made.text)
    sizes = (made.bytes_accessed, moved, made.temporaries, made.code)
    print(
        f"{name:<42}{made.flops / 1e9:8.1f}" + "".join(f"{size / 1e6:10.1f}" for size in sizes),
        f"{hlo.estimated_cycles(made.text) / 1e6:9.2f}{made.seconds:9.0f}{user:9.1f}",
        flush=True,
    )


def main(options):
    chip, topology = chips.parse_topology("v5e:2x2")
    device = np.array(compile.devices(chip, topology)[:1]).reshape(1, 1, 1)
    mesh = Mesh(device, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    print(
        f"{'':<42}{'GFLOP':>8}{'bytes, MB':>10}{'HBM, MB':>10}{'temp, MB':>10}{'code, MB':>10}"
        f"{'M cycles':>10}{'s':>9}{'user s':>9}"
    )
    for name, (kind, channels, size) in PIECES.items():
        make, inputs, frozen, apply = kind(channels, size)
        params, forward, both = functions(make, apply)
        given = (params, inputs, frozen)
        report(f"{name}, forward", forward, given, mesh, options)
        report(f"{name}, with gradients", both, (*given, inputs[0]), mesh, options)


if __name__ == "__main__":
    main(dict(argument.split("=", 1) for argument in sys.argv[1:]))
