"""Layers whose gradient keeps their input activations and makes the rest again.

By itself JAX keeps for the backward pass what the forward pass made: activations in float32 inside
a norm, what the norm gives to a convolution. Both are quickly made again from the norm's input.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Channels up to which a product is rather done again than kept. One over C channels takes 2 · C
# FLOPs for each element of its result; to write that in bfloat16 and read it again takes a v5e,
# with its 240 FLOPs per byte (roofline/chips.py), the time of 962.
NARROW = 480


def is_narrow(x: jax.Array) -> bool:
    """Whether products of x [..., C] are rather done again than kept."""
    return x.shape[-1] <= NARROW


def from_inputs(
    function: Callable[..., Any],
    x: Any,
    *modules: nnx.Module,
    keep: Callable[..., bool] | None = None,
) -> Any:
    """`function(x, *modules)`; for its gradient, what is needed of it is computed again.

    x: an array, or a tree whose first leaf is the activation. keep: a policy of `jax.checkpoint`,
    for what is kept as well; only for small modules, see below.

    So would `jax.checkpoint`, but it would cast and gather the kernels again too, and only when the
    gradient has come in: more traffic, and no gather under way ahead of use. In float32 (on CPUs)
    this is `function` itself: nothing is cast there, and time counts more than memory.
    """
    if jax.tree.leaves(x)[0].dtype == jnp.float32:
        return function(x, *modules)
    graph, state = nnx.split(modules)

    def pure(x: Any, state: Any) -> Any:
        return function(x, *nnx.merge(graph, state))

    if keep is not None:
        return jax.checkpoint(pure, policy=keep)(x, state)

    @jax.custom_vjp
    def apply(x: Any, state: Any) -> Any:
        return pure(x, state)

    def backward(saved: tuple[Any, Any], gradient: Any) -> tuple[Any, Any]:
        x, state = saved
        # Without a barrier XLA finds that it has computed all this before, and keeps it. With one
        # around x alone it computes it early, while x is on the chip, and keeps it as well.
        x, gradient = jax.lax.optimization_barrier((x, gradient))
        _, pull = jax.vjp(pure, x, state)
        return pull(gradient)

    apply.defvjp(lambda x, state: (pure(x, state), (x, state)), backward)
    return apply(x, state)


def whole(method: Callable[..., jax.Array], module: nnx.Module, *inputs: Any) -> jax.Array:
    """`method(module, *inputs)`, all of it computed again in the backward pass: `jax.checkpoint`.

    Not `nnx.remat`, which writes to the module and so fails where a sampler closes over it, inside
    `vmap` and `scan`.
    """
    graph, state = nnx.split(module)
    return jax.checkpoint(lambda state, *inputs: method(nnx.merge(graph, state), *inputs))(
        state, *inputs
    )
