"""The UNet against diffusers, on random weights that diffusers wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_oracles import from_torch, normal, random_ours, relative_error, run, to_torch, write
from torch_oracles import unet as torch_unet

from segdiff_jax.models import layers
from segdiff_jax.models.unet import UNet, UNetConfig
from segdiff_jax.weights import key_map, pretrained

_OTHER = {"in_channels": 32, "out_channels": 16, "norm_eps": 1e-4, "freq_shift": 1}
_OTHER |= {"transformer_layers_per_block": 2, "flip_sin_to_cos": False}
# name, attends, widths, groups, heads, linear projection, layers, latent [B, h, w], tokens, rest
_CASES: list[tuple] = [
    ("sd1", (1, 1, 0), (16, 32, 32), 8, 8, False, 2, (1, 8, 8), 7, {}),
    ("sd2", (1, 1, 1, 0), (8, 16, 24, 24), 4, [1, 2, 3, 4], True, 1, (2, 8, 16), 77, {}),
    ("odd_channels_and_groups", (1, 1), (15, 35), 5, [3, 7], True, 1, (3, 6, 4), 5, {}),
    ("three_layers_attention_below_only", (0, 1), (8, 12), 2, 2, False, 3, (2, 4, 6), 3, {}),
    ("attention_in_the_middle_only", (0,), (10,), 2, 1, True, 1, (3, 2, 5), 1, {"in_channels": 9}),
    ("odd_latent", (1, 0, 1), (8, 8, 16), 4, 2, False, 1, (2, 7, 5), 4, {"in_channels": 8}),
    ("deep_transformers_other_time_code", (1,), (16,), 16, 4, False, 1, (2, 5, 4), 6, _OTHER),
]
_NAMES = "block_out_channels", "norm_num_groups", "attention_head_dim", "use_linear_projection"
CASES = {  # name: (attends, options of diffusers, latent, tokens)
    name: (
        tuple(map(bool, attends)),
        dict(zip((*_NAMES, "layers_per_block"), values, strict=True)) | rest,
        latent,
        tokens,
    )
    for name, attends, *values, latent, tokens, rest in _CASES
}
MASKED = "odd_channels_and_groups"  # compared with a mask, of which one example has no use
CONTEXT = 12
# One level, heads of 32 channels: as little to compile as there can be.
SMALL = UNetConfig(8, 4, (32,), (True,), 1, 1, (1,), CONTEXT, True, 8)


def _inputs(config, latent, tokens):
    sample = normal(*latent, config.in_channels)
    timesteps = np.linspace(3, 997, latent[0]).astype(np.int32)
    return sample, timesteps, normal(latent[0], tokens, CONTEXT, seed=1)


def _expected(oracle, sample, timesteps, context, mask=None):
    with torch.no_grad():
        out = oracle(
            to_torch(sample),
            torch.from_numpy(timesteps),
            torch.from_numpy(context),
            encoder_attention_mask=None if mask is None else torch.from_numpy(mask),
        )
    return from_torch(out.sample)


@pytest.mark.parametrize("name", [name for name in CASES if name != MASKED])
def test_equals_diffusers(name, tmp_path):
    attends, options, latent, tokens = CASES[name]
    oracle = torch_unet(attends, cross_attention_dim=CONTEXT, **options)
    ours = pretrained.load(write(tmp_path, unet=oracle), ("unet",)).unet
    inputs = _inputs(oracle.config, latent, tokens)
    actual = run(UNet.__call__, ours, *inputs)
    error = relative_error(actual, _expected(oracle, *inputs))
    print(f"{name}: {error:.1e}")
    assert error <= 1e-4


def test_context_mask_and_bfloat16(tmp_path):
    attends, options, latent, tokens = CASES[MASKED]
    oracle = torch_unet(attends, cross_attention_dim=CONTEXT, **options)
    folder = write(tmp_path, unet=oracle)
    inputs = _inputs(oracle.config, latent, tokens)
    mask = np.arange(tokens) < np.array([[1], [3], [5]])  # [B, L]
    expected = _expected(oracle, *inputs, mask)
    assert relative_error(_expected(oracle, *inputs), expected) > 1e-3  # the mask matters
    for dtype, limit in ((jnp.float32, 1e-4), (jnp.bfloat16, 2e-2)):
        ours = pretrained.load(folder, ("unet",), dtype=dtype).unet
        actual = run(UNet.__call__, ours, *inputs, mask)
        error = relative_error(actual, expected)
        print(f"mask {dtype.__name__}: {error:.1e}")
        assert actual.dtype == jnp.float32
        assert error <= limit


def test_gradients_equal_torchs_with_recomputed_blocks(tmp_path):
    attends, options, latent, tokens = CASES["deep_transformers_other_time_code"]
    # With one channel per group, as there, the norm undoes biases: their gradient is rounding.
    oracle = torch_unet(attends, cross_attention_dim=CONTEXT, **options | {"norm_num_groups": 4})
    ours = pretrained.load(write(tmp_path, unet=oracle), ("unet",)).unet
    ours.kept = layers.KEEP_INPUTS  # of remat=True
    inputs = _inputs(oracle.config, latent, tokens)
    target = normal(*latent, oracle.config.out_channels, seed=2)
    sample, timesteps, context = inputs
    out = oracle(to_torch(sample), torch.from_numpy(timesteps), torch.from_numpy(context)).sample
    torch.nn.functional.mse_loss(out, to_torch(target)).backward()
    expected = {name: p.grad.numpy() for name, p in oracle.named_parameters()}

    loss = lambda m, target, *args: jnp.square(m(*args) - target).mean()  # noqa: E731
    gradients = nnx.to_flat_state(run(nnx.grad(loss), ours, target, *inputs))
    assert len(gradients) == len(expected)
    worst = 0.0
    for keys, gradient in gradients:
        path = "/".join(map(str, keys))
        actual = key_map.to_file(path, np.asarray(gradient[...]))
        worst = max(worst, relative_error(actual, expected[key_map.tensor_name("unet", path)]))
    print(f"gradients: {worst:.1e}")
    assert worst <= 1e-3


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_recomputed_blocks_can_be_sampled_from(dtype):
    """The sampler calls a network from inside vmap and scan, and so does validation in training."""
    make = lambda rngs: UNet(SMALL, dtype=jnp.dtype(dtype), remat=True, rngs=rngs)  # noqa: E731
    graph, params = nnx.split(random_ours(make))
    text = jnp.ones((1, 7, CONTEXT))

    @jax.jit
    def sample(params, start):
        network = nnx.merge(graph, params)

        def step(x, _):
            both = jnp.concatenate([x, x], axis=-1)[None]
            return network(both, jnp.ones(1), text)[0], None

        return jax.vmap(lambda x: jax.lax.scan(step, x, length=2)[0])(start)

    noise = jax.random.normal(jax.random.key(0), (2, 8, 8, SMALL.out_channels))
    assert np.isfinite(sample(params, noise)).all()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 1e-5), pytest.param("bfloat16", 2e-2, marks=pytest.mark.slow)],
)
def test_what_blocks_keep_changes_no_gradient(dtype, tolerance):
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32)  # noqa: E731
    # Not a real one: compiling its initialisers takes longer than all that follows.
    unet = nnx.eval_shape(lambda: UNet(SMALL, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: draw(leaf.shape), nnx.split(unet)[1])
    inputs = draw((2, 8, 8, SMALL.in_channels)), jnp.array([3, 900]), draw((2, 5, CONTEXT))

    def gradients(policy):
        unet.kept = policy
        graph = nnx.split(unet)[0]
        loss = lambda params: jnp.square(nnx.merge(graph, params)(*inputs)).mean()  # noqa: E731
        saved = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params))
        # Activations: by themselves layers also keep their kernels as they have rounded them.
        kept = sum(leaf.size for leaf in saved if leaf.ndim > 2 and leaf.shape[0] == len(inputs[0]))
        return jax.tree.leaves(jax.jit(jax.grad(loss))(params)), kept

    everything, most = gradients(None)
    for policy in (layers.KEEP_PRODUCTS, layers.KEEP_INPUTS):
        found, kept = gradients(policy)
        assert kept < most, "it makes nothing again"
        most = kept
        for actual, expected in zip(found, everything, strict=True):
            assert relative_error(actual, expected) <= tolerance
