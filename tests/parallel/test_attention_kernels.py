"""Attention kernels against attention as written; the TPU's is interpreted on the CPU."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from segdiff_jax.models.attention import plain
from segdiff_jax.parallel import attention_kernels, chips

AXES = ("data", "fsdp", "tensor")
interpreted = functools.partial(attention_kernels.splash, interpret=True)


def _inputs(length, others, heads=2, batch=2, width=64, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(batch, n, heads, width) for n in (length, others, others, length)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _run(attention, query, key, value, weights):
    """The output, and the gradients of a sum of it that is weighted at random."""
    loss = lambda *qkv: (attention(*qkv) * weights).sum()  # noqa: E731
    return attention(query, key, value), *jax.grad(loss, (0, 1, 2))(query, key, value)


def _relative(actual, expected):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def _worst(found, expected):
    return max(_relative(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("length", "width"),
    [
        (200, 40),  # filled up to whole blocks
        (1000, 64),  # several, and filled
        (900, 256),  # wide heads: smaller blocks
    ],
)
def test_the_kernel_and_its_gradients_equal_plain_attention(length, width):
    inputs = _inputs(length, length, width=width)
    worst = _worst(_run(interpreted, *inputs), _run(plain, *inputs))
    print(length, width, worst)
    assert worst < 1e-5


def test_the_kernel_is_as_close_to_float32_in_bfloat16_as_plain_attention_is():
    query, key, value, _ = _inputs(256, 256, dtype=jnp.bfloat16)
    exact = plain(*(x.astype(jnp.float32) for x in (query, key, value)))
    kernel, own = (_relative(f(query, key, value), exact) for f in (interpreted, plain))
    print(f"kernel {kernel:.1e}, plain {own:.1e}")
    assert kernel < max(1.5 * own, 5e-3)


@pytest.mark.parametrize(
    ("length", "others", "width"),
    [
        (300, 300, 40),  # the last block is shorter
        (512, 77, 64),  # to a text
        (400, 400, 256),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_of_queries_and_their_gradients_equal_plain_attention(length, others, width, dtype):
    inputs = _inputs(length, others, width=width, dtype=dtype)
    worst = _worst(_run(attention_kernels.in_blocks, *inputs), _run(plain, *inputs))
    assert worst < (1e-5 if dtype == jnp.float32 else 5e-3)


def test_gradients_of_blocks_hold_a_fraction_of_the_weights():
    """Of 4 heads of 1024 positions, those of 256 positions of one head at a time."""

    def held(attention):
        *arrays, weights = _inputs(1024, 1024)
        gradients = jax.grad(lambda *qkv: (attention(*qkv) * weights).sum(), (0, 1, 2))
        return jax.jit(gradients).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    blocks, whole = held(attention_kernels.in_blocks), held(plain)
    print(blocks, whole)
    assert blocks < whole / 3


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("others", [8, 6])
def test_every_platform_has_attention_with_a_mask_and_to_another_sequence(platform, others):
    query, key, value, _ = _inputs(8, others)
    attention = attention_kernels.on_device(platform)
    for mask in (None, (jnp.arange(others) < 4)[None, None, None]):
        if platform == "tpu" and mask is None and others == 8:
            continue  # the kernel itself
        expected = plain(query, key, value, mask)
        np.testing.assert_allclose(attention(query, key, value, mask), expected, atol=1e-6)


ON_MESH = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import functools, sys, jax, numpy as np
from jax.sharding import PartitionSpec as P
from segdiff_jax.parallel import attention_kernels

mesh = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
)
kernel = functools.partial(attention_kernels.splash, interpret=True)
attend = attention_kernels.in_parts(kernel, mesh)
for file in sys.argv[1:]:
    *arrays, weights = np.load(file).values()

    @jax.jit
    def run(*qkv):
        loss = lambda *qkv: (attend(*qkv) * weights).sum()
        return attend(*qkv), *jax.grad(loss, (0, 1, 2))(*qkv)

    rows = jax.sharding.NamedSharding(mesh, P(("data", "fsdp")))
    assert ("shard_map" in str(jax.make_jaxpr(attend)(*arrays))) == (len(arrays[0]) % 4 == 0)
    place = rows if len(arrays[0]) % 4 == 0 else None
    np.savez(file, *run(*jax.device_put(arrays, place)))
"""


def test_each_device_attends_in_its_part_of_the_batch_and_the_heads(tmp_path):
    """`tensor` cuts two heads, but not three; a batch of three is not cut at all."""
    cases = {}
    for heads, batch in [(2, 4), (3, 4), (2, 3)]:
        file = tmp_path / f"{heads}-{batch}.npz"
        inputs = _inputs(256, 256, heads, batch)
        np.savez(file, *inputs)
        cases[file] = _run(plain, *inputs)
    run = subprocess.run([sys.executable, "-c", ON_MESH, *cases], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for file, expected in cases.items():
        assert _worst(np.load(file).values(), expected) < 1e-5, file.name


@pytest.mark.parametrize(
    ("topology", "length", "heads", "width"),
    # The UNet's at 44 × 44, which is filled, and at 64 × 64; the VAE's one head, the largest.
    [
        *(("v5e:2x2", 1936, 2, 64), ("v6e:2x2", 4096, 2, 64), ("v4:2x2x1", 4096, 1, 512)),
        *(("v5e:2x2", 4096, 1, 512), ("v5p:2x2x1", 4096, 1, 512), ("v6e:2x2", 4096, 1, 512)),
    ],
)
def test_the_kernel_and_its_gradients_fit_the_chip(topology, length, heads, width):
    _, found = chips.stand_ins(topology)
    device = np.array(found[:1]).reshape(1, 1, 1)
    mesh = Mesh(device, AXES, axis_types=(AxisType.Auto,) * 3)
    attention = attention_kernels.on_mesh(mesh)

    def loss(query, key, value):
        return attention(query, key, value).astype(jnp.float32).sum()

    place = NamedSharding(mesh, P())
    array = jax.ShapeDtypeStruct((1, length, heads, width), jnp.bfloat16, sharding=place)
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(array, array, array).compile()
    assert "splash_mha_dkv" in program.as_text()
