"""The attention kernel against attention as written; the kernel is interpreted on the CPU."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segdiff_jax.models import attention
from segdiff_jax.parallel import chips

WIDTH = 64


def _inputs(length, others, dtype, heads=2, batch=2, width=WIDTH):
    rng = np.random.default_rng(0)
    shapes = [(batch, n, heads * width) for n in (length, others, others)]
    shapes.append((batch, heads, length, width))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _relative(actual, expected):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def _plain(query, key, value, width=WIDTH):
    return attention.plain(query, key, value, width)


def _fused(query, key, value, width=WIDTH):  # interpreted, in the shape of `plain`
    return attention.fused(query, key, value, width, interpret=True)[:, :, : query.shape[1]]


@pytest.mark.parametrize(
    ("length", "others", "width"),
    [
        (256, 256, WIDTH),
        (384, 128, WIDTH),
        (200, 200, WIDTH),
        (256, 77, WIDTH),
        (128, 1536, WIDTH),
        (128, 5120, WIDTH),
        (1024, 1024, 256),  # a wide head: smaller blocks, two kernels of gradients
    ],
)
def test_kernel_and_its_gradients_equal_plain_attention(length, others, width):
    query, key, value, weights = _inputs(length, others, jnp.float32, width=width)

    def run(function):
        function = functools.partial(function, width=width)
        loss = lambda *qkv: (function(*qkv) * weights).sum()  # noqa: E731
        arguments = query, key, value
        return function(*arguments), *jax.grad(loss, (0, 1, 2))(*arguments)

    pairs = zip(run(_fused), run(_plain), strict=True)
    errors = [_relative(actual, expected) for actual, expected in pairs]
    print(length, others, width, errors)
    assert max(errors) < 1e-5


ON_MESH = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import functools, sys, jax, numpy as np
from jax.sharding import PartitionSpec as P
from segdiff_jax.models import attention

mesh = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
)
*arrays, weights = np.load(sys.argv[1]).values()

@jax.jit
def run(*qkv):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        attend = functools.partial(attention._on_mesh, width=64, interpret=True)
        loss = lambda *qkv: (attend(*qkv) * weights).sum()
        return attend(*qkv), *jax.grad(loss, (0, 1, 2))(*qkv)

rows = jax.sharding.NamedSharding(mesh, P(("data", "fsdp")))
np.savez(sys.argv[1], *run(*jax.device_put(arrays, rows)))
"""


@pytest.mark.parametrize("heads", [2, 3])  # `tensor` cuts the heads, or where it cannot the queries
def test_kernel_on_a_mesh_of_all_axes_equals_plain_attention(heads, tmp_path):
    query, key, value, weights = _inputs(256, 77, jnp.float32, heads, batch=4)
    file = tmp_path / "arrays.npz"
    np.savez(file, query, key, value, weights)
    run = subprocess.run([sys.executable, "-c", ON_MESH, file], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    loss = lambda *qkv: (_plain(*qkv) * weights).sum()  # noqa: E731
    expected = _plain(query, key, value), *jax.grad(loss, (0, 1, 2))(query, key, value)
    pairs = zip(np.load(file).values(), expected, strict=True)
    errors = [_relative(found, exact) for found, exact in pairs]
    print(heads, errors)
    assert max(errors) < 1e-5


def test_bfloat16_kernel_is_as_close_to_float32_as_plain_attention_is():
    query, key, value, _ = _inputs(256, 256, jnp.bfloat16)
    exact = _plain(*(x.astype(jnp.float32) for x in (query, key, value)))
    kernel = _relative(_fused(query, key, value), exact)
    plain = _relative(_plain(query, key, value), exact)
    print(f"kernel {kernel:.1e}, plain {plain:.1e}")
    assert kernel < max(1.5 * plain, 5e-3)


def test_a_mask_removes_what_it_hides():
    query, key, value, _ = _inputs(8, 6, jnp.float32)
    mask = jnp.arange(6) < 4
    shorter = _plain(query, key[:, :4], value[:, :4])
    np.testing.assert_allclose(
        attention.attention(query, key, value, WIDTH, mask[None, None, None]), shorter, atol=1e-6
    )


@pytest.mark.parametrize(
    ("length", "filled", "block"),
    [
        (576, 640, 640),
        (1024, 1024, 1024),
        (1152, 1280, 640),
        (1600, 1792, 896),
        (2304, 2304, 768),
        (4096, 4096, 1024),
        (9216, 9216, 1024),
    ],
)
def test_blocks_are_whole_and_not_small(length, filled, block):
    assert attention._filled(length) == filled
    assert attention._block(filled) == block


def test_the_kernel_is_for_tpu_meshes_only():
    query, *_ = _inputs(1024, 1024, jnp.bfloat16)
    assert not attention._kernel_pays(query, WIDTH)
    mesh = jax.make_mesh(
        (1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert not attention._kernel_pays(query, WIDTH)


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("length", "heads", "width"),
    # The UNet's at 44 × 44, which is filled, and 64 × 64; the VAE's one head.
    [(1936, 2, WIDTH), (4096, 2, WIDTH), (4096, 1, 512)],
)
def test_the_kernel_and_its_gradients_fit_the_chip(length, heads, width, topology):
    _, found = chips.stand_ins(topology)
    axes = ("data", "fsdp", "tensor")
    device = np.array(found[:1]).reshape(1, 1, 1)
    mesh = jax.sharding.Mesh(device, axes, axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def loss(query, key, value):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            assert attention._kernel_pays(query, width)
            return attention.attention(query, key, value, width).astype(jnp.float32).sum()

    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = jax.ShapeDtypeStruct((1, length, heads * width), jnp.bfloat16, sharding=place)
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(array, array, array).compile()
    assert "splash_mha_dkv" in program.as_text()
