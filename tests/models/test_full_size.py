"""Stable Diffusion 1.5 and 2 at full size: parity from disk, and the memory that loading takes.

Random weights as diffusers and transformers write them. Some minutes, 6 GB of disk and 12 GB of
memory for each of the two.
"""

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_oracles import (
    from_torch,
    normal,
    relative_error,
    run,
    text_encoder,
    to_torch,
    unet,
    vae,
    write,
)

from segdiff_jax.models.clip_text import CLIPText
from segdiff_jax.models.presets import PRESETS
from segdiff_jax.models.unet import UNet
from segdiff_jax.models.vae import VAE
from segdiff_jax.weights import pretrained

pytestmark = pytest.mark.slow

ATTENDS = (True, True, True, False)
UNETS = {  # the published config.json files, as far as they differ from diffusers' defaults
    "sd15": {"attention_head_dim": 8, "cross_attention_dim": 768},
    "sd2": {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
}
TEXTS = {
    "sd15": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
    },
    "sd2": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
}
LATENT, PIXELS, TOKENS = (1, 24, 32), (1, 64, 96), 77


def unet_inputs(name):
    context = normal(1, TOKENS, UNETS[name]["cross_attention_dim"], seed=1)
    return normal(*LATENT, 4), np.array([501], np.int32), context


def token_ids():
    ids = np.random.default_rng(2).integers(0, 49_000, (2, TOKENS)).astype(np.int32)
    return np.where(np.arange(TOKENS) < np.array([[9], [77]]), ids, 49_407).astype(np.int32)


@pytest.fixture(scope="module", params=list(PARAMETERS))
def published(request, tmp_path_factory):
    """(name, a folder of that size, what torch computes with it); one module in memory a time."""
    name, expected = request.param, {}
    folder = write(tmp_path_factory.mktemp(name))

    def save(component, module):
        count = sum(p.numel() for p in module.parameters())
        assert count == PARAMETERS[name][component]
        module.save_pretrained(folder / component)
        return module

    with torch.no_grad():
        module = save("unet", unet(ATTENDS, **UNETS[name]))
        sample, timesteps, context = unet_inputs(name)
        arguments = to_torch(sample), torch.from_numpy(timesteps), torch.from_numpy(context)
        expected["unet"] = from_torch(module(*arguments).sample)
        widths = (128, 256, 512, 512)
        module = save("vae", vae(widths, layers_per_block=2, norm_num_groups=32))
        encoded = module.encode(to_torch(normal(*PIXELS, 3))).latent_dist.parameters
        expected["vae encode"] = from_torch(encoded.chunk(2, 1)[0])
        expected["vae decode"] = from_torch(module.decode(to_torch(normal(*LATENT, 4))).sample)
        options = {"vocab_size": 49_408, "eos_token_id": 49_407} | TEXTS[name]
        module = save("text_encoder", text_encoder(**options))
        expected["text"] = module(torch.from_numpy(token_ids()).long()).last_hidden_state.numpy()
    del module
    gc.collect()
    yield name, folder, expected
    shutil.rmtree(folder)  # pytest keeps the folders of three runs


def test_parity(published):
    name, folder, expected = published
    preset = PRESETS[name]
    network = pretrained.load(folder, ("unet",)).unet
    assert network.config == dataclasses.replace(preset.unet, in_channels=4)
    assert parameter_bytes(network) == 4 * PARAMETERS[name]["unet"]
    found = {"unet": np.asarray(run(UNet.__call__, network, *unet_inputs(name)))}
    del network
    half = pretrained.load(folder, ("unet",), dtype=jnp.bfloat16).unet
    found["unet, bfloat16"] = np.asarray(run(UNet.__call__, half, *unet_inputs(name)))
    expected = expected | {"unet, bfloat16": expected["unet"]}
    del half
    gc.collect()
    autoencoder = pretrained.load(folder, ("vae",)).vae
    assert autoencoder.config == preset.vae
    found["vae encode"] = run(lambda m, x: m.encode(x)[0], autoencoder, normal(*PIXELS, 3))
    found["vae decode"] = run(VAE.decode, autoencoder, normal(*LATENT, 4))
    text = pretrained.load(folder, ("text_encoder",)).text_encoder
    assert text.config == preset.text_encoder
    found["text"] = run(CLIPText.__call__, text, token_ids())
    errors = {part: relative_error(found[part], expected[part]) for part in expected}
    for part, error in errors.items():
        print(f"{name} {part}: {error:.1e}")
    assert errors.pop("unet, bfloat16") <= 2e-2
    assert max(errors.values()) <= 1e-4


def parameter_bytes(module: nnx.Module) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(module)))


# VmHWM, not getrusage: ru_maxrss of a new program starts at the peak of the one that started it.
LOADING = """
import json, re, sys
import jax
from flax import nnx
from segdiff_jax.weights import pretrained

def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])

jax.numpy.zeros(1).block_until_ready()
before = peak()
parts = pretrained.load(sys.argv[1], ("unet", "vae", "text_encoder"))
leaves = jax.tree.leaves([nnx.state(part) for part in parts if part is not None])
jax.block_until_ready(leaves)
size = sum(leaf.nbytes for leaf in leaves)
print(json.dumps({"before": before, "peak": peak(), "parameters": size}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
def test_peak_memory_of_loading(published):
    """The whole process, Python and its libraries included, on the CPU backend."""
    name, folder, _ = published
    command = [sys.executable, "-c", LOADING, str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seen = json.loads(output.splitlines()[-1])
    assert seen["parameters"] == 4 * sum(PARAMETERS[name].values())
    share = seen["peak"] / seen["parameters"]
    print(f"{name}: {seen}, peak {share:.2f} of the parameters")
    assert share <= 1.3
