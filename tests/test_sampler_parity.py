"""The whole sampler against a loop over diffusers' and transformers' modules in torch."""

import itertools

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from torch_oracles import from_torch, relative_error, text_encoder, to_torch, unet, vae, write

from segdiff_jax.config import CodecConfig, Config, DataConfig, DiffusionConfig, SamplerConfig
from segdiff_jax.diffusion import sampler as sampler_lib
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.text import vocabulary
from segdiff_jax.text.tokenizer import train_tokenizer
from segdiff_jax.weights import hf_config, pretrained

SIZE, SEED, SCALE = (16, 24), 5, 0.9
NAMES = [["sky"], ["building", "edifice"], ["road"]]
SCHEDULES = {
    "zero_snr": DiffusionConfig(),
    "trailing": DiffusionConfig(rescale_betas_zero_snr=False),
    # As Stable Diffusion 1 was published, and the 2024 behaviour.
    "epsilon_leading": DiffusionConfig(
        prediction_type="epsilon", timestep_spacing="leading", rescale_betas_zero_snr=False
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights of every component as torch's libraries write them."""
    tokenizer = train_tokenizer(["a photo of a sky, building, road"], 600, 16)
    network = unet(
        (True,),
        in_channels=8,
        block_out_channels=(16,),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=32,
        layers_per_block=1,
    )
    with torch.no_grad():  # random weights hardly listen to the text
        for name, parameter in network.named_parameters():
            parameter.mul_(5.0 if "attn2" in name else 1.0)
    folder = write(
        tmp_path_factory.mktemp("sampler"),
        unet=network,
        vae=vae((8, 8), norm_num_groups=4, layers_per_block=1, scaling_factor=SCALE),
        text_encoder=text_encoder(
            vocab_size=tokenizer.vocab_size,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        ),
    )
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return pretrained.load(folder, ("unet", "vae", "text_encoder", "tokenizer"))[:4]


@torch.no_grad()
def torch_maps(folder, config, image, noise, steps):
    """Maps [P, H, W], one class per pass, from the noise [h, w, c] that all passes share."""
    network = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    autoencoder = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = diffusers.DDIMScheduler.from_config(hf_config.write_schedule(config))

    def context(names):
        texts = [f"a photo of a {name}" for name in names]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return encoder(ids.input_ids).last_hidden_state.mean(0)

    contexts = torch.stack([context(names) for names in NAMES])
    pixels = to_torch(image[None]).float() / 127.5 - 1
    photo = autoencoder.encode(pixels).latent_dist.mean * SCALE
    latents, photos = (x.expand(len(NAMES), -1, -1, -1) for x in (to_torch(noise[None]), photo))
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        prediction = network(torch.cat([photos, latents], 1), t, contexts).sample
        latents = scheduler.step(prediction, t, latents).prev_sample
    decoded = autoencoder.decode(latents / SCALE).sample
    return from_torch(decoded).mean(-1).clip(-1, 1)


@pytest.mark.parametrize(
    ("kind", "steps"),
    [*itertools.product(("zero_snr", "trailing"), (1, 4, 10)), ("epsilon_leading", 4)],
)
def test_maps_equal_torchs(kind, steps, folder, ours):
    config = Config(
        data=DataConfig(source="scenes", image_size=SIZE),
        codec=CodecConfig(classes_per_pass=1),
        diffusion=SCHEDULES[kind],
        sampler=SamplerConfig(steps=steps, batch_size=3),
    )
    model = Segmenter(*ours, config)
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    classes = vocabulary.from_names([", ".join(names) for names in NAMES]).classes
    found, _ = model.maps([image], classes, config.sampler, SEED)
    key = jax.random.fold_in(jax.random.key(SEED), 0)
    noise = np.asarray(sampler_lib.initial_noise(key, (SIZE[0] // 2, SIZE[1] // 2, 4)))
    expected = torch_maps(folder, config.diffusion, image, noise, steps)
    error = relative_error(found[0], expected)
    print(f"{kind}, T = {steps}: {error:.1e}, {(np.abs(expected) < 1).mean():.2f} inside (-1, 1)")
    assert error <= 1e-3
    assert (np.abs(expected) < 1).mean() > 0.5, "clipping hides what is compared"
    assert relative_error(expected[1], expected[0]) > 1e-2, "the text does nothing"
