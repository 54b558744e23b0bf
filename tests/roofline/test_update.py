"""What the optimiser's update of one large array moves between a v5e and its HBM."""

import jax
import jax.numpy as jnp
import small_config

from segdiff_jax.config import Config
from segdiff_jax.roofline import compile, traffic
from segdiff_jax.roofline.steps import Step
from segdiff_jax.training import sharding, step

SIZE = 4 * 8192 * 4096  # bytes in float32: as much as the VMEM of the chip


def test_the_update_reads_and_writes_parameter_and_moments_once():
    config, chip = Config(), small_config.one_chip()
    params = {"kernel": jax.ShapeDtypeStruct((8192, 4096), jnp.float32)}
    state = jax.eval_shape(lambda p: step.init_state(p, config), params)
    state, grads = (sharding.abstract(tree, chip) for tree in (state, params))
    function = jax.jit(lambda s, g: step._update(s, g, {}, config), donate_argnums=0)
    made = compile.compile_step(Step(function, (state, grads), 1, 0))
    assert isinstance(made, compile.Compiled)
    # The gradient's norm reads it; then gradient, parameter and two moments in, and three out.
    assert traffic.hbm_bytes(made.text) < 8.1 * SIZE
