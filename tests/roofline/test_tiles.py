"""What training and sampling ask of XLA's choice of tiles, seen in two convolutions for a v5e."""

import jax
import jax.numpy as jnp
import small_config

from segdiff_jax.roofline import compile
from segdiff_jax.roofline.steps import Step
from segdiff_jax.runtime import TPU_OPTIONS


def convolution(options: dict[str, str]) -> compile.Compiled:
    """Two of the size of Stable Diffusion 2's first level, and what is between them."""
    chip = small_config.one_chip()
    image = jax.ShapeDtypeStruct((4, 48, 48, 320), jnp.bfloat16, sharding=chip)
    kernel = jax.ShapeDtypeStruct((3, 3, 320, 320), jnp.bfloat16, sharding=chip)
    layout = ("NHWC", "HWIO", "NHWC")

    def apply(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout)

    function = jax.jit(lambda x, w: apply(jax.nn.silu(apply(x, w)), w), compiler_options=options)
    made = compile.compile_step(Step(function, (image, kernel), 1, 0))
    assert isinstance(made, compile.Compiled)
    return made


def test_nearly_the_fastest_tiles_make_less_code_of_the_same_program():
    ours, fastest = convolution(TPU_OPTIONS), convolution({})
    assert ours.code < 0.9 * fastest.code
    for figure in ("flops", "bytes_accessed", "arguments", "temporaries"):
        assert getattr(ours, figure) == getattr(fastest, figure)
