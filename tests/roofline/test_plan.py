"""A step that is planned, in a process of its own, against the same step compiled."""

import math
import signal

import pytest
import small_config

from segdiff_jax.errors import UserError
from segdiff_jax.roofline import compile, hlo, plan, traffic


def test_the_plan_has_the_figures_of_the_compiled_step():
    made = compile.compile_step(small_config.train_step("v5e:2x2"))
    planned = plan.plan_step(small_config.train_step, "v5e:2x2")
    assert isinstance(planned, compile.Compiled) and isinstance(made, compile.Compiled)
    assert planned.flops == made.flops > 0
    for count in (traffic.hbm_bytes, hlo.kernel_flops, lambda text: hlo.collectives(text, 4, 1)):
        assert count(planned.text) == count(made.text)
    # Code generation adds to the temporaries; it is not known what.
    print(planned._replace(text=""), made._replace(text=""))
    assert planned.arguments == pytest.approx(made.arguments, rel=0.02)
    assert planned.aliased == pytest.approx(made.aliased, rel=0.02)
    assert 0.5 < planned.temporaries / made.temporaries <= 1
    assert (planned.code, planned.bytes_accessed) == (None, None)


def test_what_does_not_fit_is_a_result():
    made = plan.plan_step(small_config.step_too_large)
    assert isinstance(made, compile.OutOfMemory)
    assert "(32.00G) exceeds available HBM" in made.message


def test_a_compiler_that_ends_is_not_waited_for():
    with pytest.raises(RuntimeError, match="exit code 1"):
        plan.plan_step(math.sqrt, -1)


def test_a_compiler_that_is_killed_is_said_to_have_lacked_memory():
    with pytest.raises(UserError, match="memory runs out"):
        plan.plan_step(signal.raise_signal, signal.SIGKILL)
