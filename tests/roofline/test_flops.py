"""The analytic count against the matrix products that JAX traces."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from segdiff_jax.models import presets
from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE
from segdiff_jax.roofline import flops


def _traced(function, *arguments):
    """FLOPs of all dot_general and conv_general_dilated in the program, its inner ones included."""

    def count(jaxpr):
        total = 0.0
        for equation in jaxpr.eqns:
            out = math.prod(equation.outvars[0].aval.shape)
            if equation.primitive.name == "dot_general":
                contracted = equation.params["dimension_numbers"][0][0]
                shape = equation.invars[0].aval.shape
                total += 2.0 * out * math.prod(shape[i] for i in contracted)
            elif equation.primitive.name == "conv_general_dilated":
                kernel, spec = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
                total += 2.0 * out * math.prod(kernel) / kernel[spec.rhs_spec[0]]
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                total += count(inner) if hasattr(inner, "eqns") else 0.0
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(scope="module", params=["tiny", "sd2"])
def architecture(request):
    return presets.architecture(request.param)


def test_unet_forward_and_training(architecture):
    config = architecture.unet
    graph, params = nnx.split(nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0))))
    sample, tokens = _abstract(1, 16, 24, config.in_channels), 7
    context = _abstract(1, tokens, config.cross_attention_dim)
    run = lambda p, x, t, c: nnx.merge(graph, p)(x, t, c)  # noqa: E731
    inputs = sample, _abstract(1, dtype=jnp.int32), context
    count = flops.UNetCount(config, 16, 24, tokens)
    assert count.forward == pytest.approx(_traced(run, params, *inputs), rel=1e-12)

    gradient = jax.grad(lambda p, *args: run(p, *args).sum())
    whole = jax.make_jaxpr(gradient)(params, *inputs)
    names = {e.primitive.name for e in whole.jaxpr.eqns}
    assert names & {"dot_general", "conv_general_dilated", "pjit", "jit"}
    # A transposed strided convolution is traced with holes in its input, which the count leaves
    # out: so the trace may be above it, by what the few down-sampling layers add.
    traced = _traced(gradient, params, *inputs)
    assert count.train <= traced <= 1.04 * count.train


def test_vae(architecture):
    config = architecture.vae
    graph, params = nnx.split(nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0))))
    encode = lambda p, x: nnx.merge(graph, p).encode(x)  # noqa: E731
    decode = lambda p, x: nnx.merge(graph, p).decode(x)  # noqa: E731
    size = 32, 48
    latent = _abstract(1, 4, 6, config.latent_channels)
    assert flops.vae_encode(config, *size) == _traced(encode, params, _abstract(1, *size, 3))
    assert flops.vae_decode(config, *size) == _traced(decode, params, latent)


def test_text_encoder(architecture):
    config = architecture.text_encoder
    graph, params = nnx.split(nnx.eval_shape(lambda: CLIPText(config, rngs=nnx.Rngs(0))))
    encode = lambda p, ids: nnx.merge(graph, p)(ids)  # noqa: E731
    ids = _abstract(1, config.max_position_embeddings, dtype=jnp.int32)
    assert flops.text_encode(config) == _traced(encode, params, ids)
