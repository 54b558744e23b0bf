"""One class in one step as ONNX files, for onnxruntime and whatever else reads them.

    segment.onnx       image uint8 [H, W, 3], context float32 [1, L, D] → score float32 [H, W]
    text_encoder.onnx  token_ids int32 [1, L] → context float32 [1, L, D]
    tokenizer/         as Stable Diffusion has it
    onnx.json          what a program must know beside them

`jax2onnx` translates what JAX traces. ONNX has no random numbers that equal JAX's: the noise that a
member starts from is a constant of the file.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from flax import nnx

from segdiff_jax import codec, files, ownership
from segdiff_jax.config import SamplerConfig
from segdiff_jax.data.geometry import GRAY
from segdiff_jax.diffusion import sampler as samplers
from segdiff_jax.errors import UserError
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.models.attention import plain
from segdiff_jax.models.vae import decode_latents, encode_latents
from segdiff_jax.parallel.attention_kernels import with_attention
from segdiff_jax.text import tokenizer
from segdiff_jax.text.prompts import expanded

SEGMENT, TEXT, DESCRIPTION = "segment.onnx", "text_encoder.onnx", "onnx.json"
_LIMIT = 2**31 - 2**24  # bytes of weights: the container of ONNX ends at 2 GiB


def check(model: Segmenter, sampler: SamplerConfig) -> Any:
    """The library. Raises `UserError` where it is missing, and for what cannot be exported."""
    if (sampler.steps, sampler.ensemble) != (1, 1):
        raise UserError(
            f"--format onnx: is of one step and one member, not of {sampler.steps} and "
            f"{sampler.ensemble}: add --steps 1 --ensemble 1"
        )
    if model.config.codec.classes_per_pass != 1:
        raise UserError("--format onnx: is for models of one class per pass: use stablehlo")
    if model.config.model.dtype != "float32":
        raise UserError(
            f"--format onnx: is for networks in float32, this one computes in "
            f'{model.config.model.dtype}: set "dtype" of "model" in the checkpoint\'s config'
        )
    networks = model.networks
    leaves = jax.tree.leaves((networks.unet_params, networks.vae_params))
    if sum(leaf.nbytes for leaf in leaves) > _LIMIT:
        raise UserError("--format onnx: more than 2 GiB of weights, the end of the format")
    try:
        import jax2onnx
    except ImportError as error:
        raise UserError("--format onnx needs jax2onnx: see docs/onnx.md") from error
    return jax2onnx


def write(model: Segmenter, directory: os.PathLike[str] | str, sampler: SamplerConfig) -> None:
    """Writes the files. `directory` is local or `gs://`, and appears whole or not at all.

    Raises `UserError` as `check` does, or if the place holds other files or cannot be written.
    """
    library = check(model, sampler)
    length, width = model.tokenizer.model_max_length, model.text_encoder.config.hidden_size
    image = jax.ShapeDtypeStruct((*model.config.data.image_size, 3), jnp.uint8)
    context = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
    token_ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    programs = {
        SEGMENT: (segment_with(model, sampler), {"image": image, "context": context}, "score"),
        TEXT: (model.text_encoder, {"token_ids": token_ids}, "context"),
    }
    names = [*programs, DESCRIPTION, *(f"tokenizer/{name}" for name in tokenizer.FILES)]
    with ownership.whole_folder(directory, "onnx", names, last=DESCRIPTION) as folder:
        for name, (function, inputs, output) in programs.items():
            found = library.to_onnx(
                _traced(function, inputs.values()),
                list(inputs.values()),
                model_name=Path(name).stem,
                input_names=list(inputs),
                output_names=[output],
            )
            files.write_bytes(folder / name, found.SerializeToString())
        model.tokenizer.save(folder / "tokenizer")
        files.write_text(folder / DESCRIPTION, json.dumps(describe(model), indent=2) + "\n")


def _traced(function: Callable[..., jax.Array], inputs: Iterable[jax.ShapeDtypeStruct]) -> Any:
    """The function as JAX's own operations: the library has Flax's by name, some of them wrong."""
    program = jax.make_jaxpr(function)(*inputs)
    return lambda *values: jax.extend.core.jaxpr_as_fun(program)(*values)[0]


def segment_with(model: Segmenter, sampler: SamplerConfig) -> Any:
    """The function (image, context) → score of the model with its weights; member 0 of seed 0."""
    networks = model.networks
    unet = with_attention(nnx.merge(networks.unet, networks.unet_params), plain)
    vae = nnx.merge(networks.vae, networks.vae_params)
    schedule = jax.tree.map(jnp.asarray, jax.device_get(networks.schedule))
    latent = jax.eval_shape(
        lambda pixels: encode_latents(vae, pixels),
        jax.ShapeDtypeStruct((1, *model.config.data.image_size, 3), jnp.float32),
    )
    key = jax.random.fold_in(jax.random.key(0), 0)
    noise = samplers.initial_noise(key, latent.shape[1:], sampler.initial_noise)[None]

    def segment(image: jax.Array, context: jax.Array) -> jax.Array:
        seen = encode_latents(vae, codec.to_pixels(image)[None])

        def predict(noisy: jax.Array, t: jax.Array) -> jax.Array:
            both = jnp.concatenate([seen, noisy], axis=-1)
            return unet(both, jnp.reshape(t, (1,)), context, None)

        mask = samplers.sample(predict, schedule, noise, 1)
        return ((codec.to_gray(decode_latents(vae, mask))[0] + 1.0) / 2.0).clip(0.0, 1.0)

    return segment


def describe(model: Segmenter) -> dict[str, Any]:
    config = model.config
    return {
        "segment": SEGMENT,
        "text_encoder": TEXT,
        "image_size": list(config.data.image_size),
        # How a photo of another size becomes `image`, and the score becomes its size again.
        "geometry": {"fit": config.data.fit, "padding": GRAY, "photo_at": "top left"},
        "templates": list(expanded(config.prompts.templates)),
        "context_length": model.tokenizer.model_max_length,
        "threshold": config.codec.threshold,
        "closed": config.codec.closed,
        "noise": "of seed 0, member 0",
        "trained_classes": None if model.trained is None else list(model.trained.names),
    }
