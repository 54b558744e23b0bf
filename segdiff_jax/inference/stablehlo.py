"""The sampler as a portable file: StableHLO that runs without this package or its networks.

`jax.export` writes it for several platforms at once, with the number of passes left open. Weights
are constants of the function, up to the 2 GiB at which the format ends; larger ones lie beside it
in a safetensors file, and are the function's first argument. JAX promises to read such a file for
six months of its own releases
(https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).
"""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from segdiff_jax import codec, files, ownership
from segdiff_jax.config import SamplerConfig
from segdiff_jax.data.geometry import GRAY
from segdiff_jax.inference import sampling
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.models.attention import plain
from segdiff_jax.parallel.attention_kernels import with_attention
from segdiff_jax.text import vocabulary
from segdiff_jax.text.prompts import expanded
from segdiff_jax.weights import safetensors_files

PLATFORMS = ("cpu", "cuda", "tpu")
FUNCTION, DESCRIPTION = "sampler.stablehlo", "sampler.json"
WEIGHTS = "sampler.safetensors"
_RNG = "threefry2x32"  # JAX's default: its bits are the same on every platform
_LIMIT = 2**31 - 2**24  # bytes of weights; flatbuffers, the container, ends at 2 GiB

Weights = Mapping[str, Any]  # "unet/..." and "vae/..." → array, as they are stored


def write(
    model: Segmenter,
    directory: os.PathLike[str] | str,
    sampler: SamplerConfig,
    dtype: str = "float32",
) -> None:
    """Write `sampler.stablehlo`, and `sampler.json` that describes its inputs.

    The function is (image uint8 [H, W, 3], context float32 [P, L, D], key uint32 [2]) → gray maps
    float32 [P, H, W] in [-1, 1], merged over the ensemble. H and W are `config.data.image_size`.
    P is open, and so is L where `codec.context` is "bound". All P · `sampler.ensemble` UNet calls
    of a step are one batch. The file is as large as the weights and one part in a hundred.

    Where the weights exceed 2 GiB they are in `sampler.safetensors`, and the function takes them,
    {name: array}, before the image.

    Args:
      model: what to export.
      directory: local or `gs://` folder, which appears whole or not at all.
      sampler: steps, ensemble, eta and how members are merged; fixed in the file.
      dtype: of the stored weights: "float32", "bfloat16" or "float16". The computation is in
        `config.model.dtype`.

    Raises:
      UserError: a weight overflows float16, or the place holds other files or cannot be written.
    """
    about = describe(model, sampler, dtype)
    function: Callable[..., jax.Array] = sample_with(model, sampler)
    inputs: tuple[Any, ...] = _inputs(model)
    beside = _size(model, dtype) > _LIMIT
    if beside:
        shapes = _named_weights(model)
        inputs = ({n: jax.ShapeDtypeStruct(w.shape, dtype) for n, w in shapes.items()}, *inputs)
    else:
        function = functools.partial(function, _stored(model, dtype))
    data = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*inputs).serialize()
    names = [FUNCTION, DESCRIPTION, *([WEIGHTS] if beside else [])]
    with ownership.whole_folder(directory, "stablehlo", names, last=FUNCTION) as folder:
        files.write_json(folder / DESCRIPTION, about)
        if beside:
            _write_weights(model, folder / WEIGHTS, dtype)
        files.write_bytes(folder / FUNCTION, bytes(data))


def sample_with(model: Segmenter, sampler: SamplerConfig) -> Callable[..., jax.Array]:
    """Return the function that `write` exports, of weights and inputs: maps as `Segmenter.maps`."""
    height, width = model.config.data.image_size
    networks = model.networks
    structure = jax.tree.structure(_weights(model))
    names = list(_named_weights(model))
    schedule = jax.tree.map(jnp.asarray, jax.device_get(networks.schedule))
    # The file is for every platform: no kernel of the one that it is written on.
    unet = nnx.split(with_attention(nnx.merge(networks.unet, networks.unet_params), plain))[0]
    settings = sampler.steps, sampler.eta, sampler.initial_noise
    how = sampling.How(unet, networks.vae, *settings)

    def sample(weights: Weights, image: jax.Array, context: jax.Array, key: jax.Array) -> jax.Array:
        leaves = [jnp.asarray(weights[name]).astype(jnp.float32) for name in names]
        params = jax.tree.unflatten(structure, leaves)
        passes, members = context.shape[0], sampler.ensemble
        job = jnp.arange(passes * members)
        latent = sampling.encode(networks.vae, params["vae"], image[None])[0]
        latents = jnp.broadcast_to(latent, (job.shape[0], *latent.shape))
        jobs = sampling.Jobs(context[job // members], None, latents, job % members)
        random = jax.random.wrap_key_data(key, impl=_RNG)
        gray = sampling.sample_jobs(how, params["unet"], params["vae"], schedule, jobs, random)
        if members > 1:
            gray = gray.reshape(passes, members, height, width)
            merging = sampler.align, sampler.reduce, sampler.uncertainty
            gray = sampling.merge_members(gray, *merging)[0]
        return gray.clip(-1.0, 1.0)

    return sample


def _weights(model: Segmenter) -> dict[str, Any]:
    return {"unet": model.networks.unet_params, "vae": model.networks.vae_params}


def _named_weights(model: Segmenter) -> dict[str, jax.Array]:
    """Return the arrays by their path, "unet/conv_in/kernel", in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(_weights(model))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf
        for path, leaf in leaves
    }


def _size(model: Segmenter, dtype: str) -> int:
    """Return the bytes that the weights take."""
    sizes = (leaf.size for leaf in jax.tree.leaves(_weights(model)))
    return sum(sizes) * jnp.dtype(dtype).itemsize


def _stored(model: Segmenter, dtype: str) -> dict[str, np.ndarray]:
    """Return the weights as numpy arrays of `dtype`: constants of the exported function."""
    where, arrays = f"--dtype {dtype}: a weight", _named_weights(model)
    return {n: safetensors_files.as_stored(np.asarray(a), dtype, where) for n, a in arrays.items()}


def _write_weights(model: Segmenter, path: epath.Path, dtype: str) -> None:
    arrays = _named_weights(model)
    tensors = {
        name: (array.shape, functools.partial(np.asarray, array)) for name, array in arrays.items()
    }
    safetensors_files.write(path, tensors, dtype)


def _inputs(model: Segmenter) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return shapes and dtypes of image, context and key, with symbolic dimensions."""
    tokens = "L" if model.config.codec.context == "bound" else model.tokenizer.model_max_length
    context = jax.export.symbolic_shape(f"P, {tokens}, {model.text_encoder.config.hidden_size}")
    return (
        jax.ShapeDtypeStruct((*model.config.data.image_size, 3), jnp.uint8),
        jax.ShapeDtypeStruct(context, jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.uint32),
    )


def describe(model: Segmenter, sampler: SamplerConfig, dtype: str) -> dict[str, Any]:
    """Return what a program must know to call the function and to read its maps, as JSON values."""
    config = model.config
    inputs = {
        name: {
            "dtype": str(value.dtype),
            "shape": [n if isinstance(n, int) else str(n) for n in value.shape],
        }
        for name, value in zip(("image", "context", "key"), _inputs(model), strict=True)
    }
    height, width = config.data.image_size
    output = {"dtype": "float32", "shape": ["P", height, width], "range": [-1, 1]}
    # How a photo of another size becomes `image`, and the maps become its size again.
    geometry = {"fit": config.data.fit, "padding": GRAY, "photo_at": "top left"}
    return {
        "function": FUNCTION,
        "weights": WEIGHTS if _size(model, dtype) > _LIMIT else None,  # None: in the function
        "platforms": list(PLATFORMS),
        "jax": jax.__version__,
        "inputs": inputs,
        "output": output,
        "geometry": geometry,
        "weights_dtype": dtype,
        "sampler": {
            name: getattr(sampler, name)
            for name in ("steps", "ensemble", "eta", "initial_noise", "align", "reduce")
        },
        "codec": {
            name: getattr(config.codec, name)
            for name in ("classes_per_pass", "context", "threshold", "closed", "logit_adjustment")
        },
        "adjustment": _adjustment(model),
        "templates": list(expanded(config.prompts.templates)),
        "trained_classes": None if model.trained is None else list(model.trained.names),
        "key": f"seed s is [0, s], as jax.random.key(s, impl={_RNG!r})",
        # What stands for *other* depends on how many classes a program asks for.
        "other_label": {"up to 255 classes": codec.IGNORE, "more": codec.IGNORE_16},
    }


def _adjustment(model: Segmenter) -> dict[str, Any] | None:
    """Return how scores change before the best is chosen (`codec.adjusted`); None if they stay.

    Raise `UserError` for a model that does not say how often its classes occurred in training.
    """
    tau = model.config.codec.logit_adjustment
    if not tau:
        return None
    shares, median = vocabulary.known_shares(model.trained)
    return {
        "score": "s * f / (s * f + 1 - s)",
        "factors": {name: codec.odds_factor(share, tau) for name, share in shares.items()},
        "factor_of_other_names": codec.odds_factor(median, tau),
    }
