"""The sampler as one portable file: StableHLO that runs without this package or its networks.

`jax.export` writes it for several platforms at once, weights included as constants, with the
number of passes left open. JAX promises to read such a file for six months of its own releases
(https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).
"""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from segdiff_jax import codec, conditioning, files, segmenter
from segdiff_jax.config import SamplerConfig
from segdiff_jax.errors import UserError
from segdiff_jax.segmenter import Segmenter

PLATFORMS = ("cpu", "cuda", "tpu")
FUNCTION, DESCRIPTION = "sampler.stablehlo", "sampler.json"
_RNG = "threefry2x32"  # JAX's default: its bits are the same on every platform
_LIMIT = 2**31 - 2**24  # bytes of weights; flatbuffers, the container, ends at 2 GiB

Sampler = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def write(
    model: Segmenter,
    directory: os.PathLike[str] | str,
    sampler: SamplerConfig,
    dtype: str = "float32",
) -> None:
    """Writes `sampler.stablehlo`, and `sampler.json` that describes its inputs.

    The function is (image uint8 [H, W, 3], context float32 [P, L, D], key uint32 [2]) → gray maps
    float32 [P, H, W] in [-1, 1], merged over the ensemble. H and W are `config.data.image_size`.
    P is open, and so is L where `codec.context` is "bound". All P · `sampler.ensemble` UNet calls
    of a step are one batch. The file is as large as the weights and one part in a hundred.

    Args:
      model: what to export.
      directory: local or `gs://` folder, which appears whole or not at all.
      sampler: steps, ensemble, eta and how members are merged; fixed in the file.
      dtype: of the stored weights: "float32", "bfloat16" or "float16". The computation is in
        `config.model.dtype`.

    Raises:
      UserError: the weights exceed 2 GiB or overflow float16, or the place cannot be written.
    """
    exported = jax.export.export(
        jax.jit(sampler_function(model, sampler, dtype)), platforms=PLATFORMS
    )(*_inputs(model))
    data = exported.serialize()
    with files.whole_folder(directory, last=FUNCTION, others=(DESCRIPTION,)) as folder:
        text = json.dumps(describe(model, sampler, dtype), indent=2, ensure_ascii=False)
        files.write_text(folder / DESCRIPTION, text + "\n")
        files.write_bytes(folder / FUNCTION, bytes(data))


def sampler_function(model: Segmenter, sampler: SamplerConfig, dtype: str = "float32") -> Sampler:
    """The function that `write` exports. Its maps are those of `Segmenter.maps`."""
    weights = _stored((model._unet_params, model._vae_params), dtype)
    height, width = model.config.data.image_size

    def sample(image: jax.Array, context: jax.Array, key: jax.Array) -> jax.Array:
        unet, vae = jax.tree.map(lambda w: jnp.asarray(w).astype(jnp.float32), weights)
        passes, members = context.shape[0], sampler.ensemble
        job = jnp.arange(passes * members)
        gray = segmenter._sample(
            model._unet,
            model._vae,
            "mean",  # of one class per pass: the context as it is given
            sampler.steps,
            sampler.eta,
            unet,
            vae,
            model._schedule,
            conditioning.PromptTable(context, context[:, 0]),
            segmenter._encode(model._vae, vae, image[None]),
            jnp.arange(passes)[:, None],
            jnp.stack([jnp.zeros_like(job), job // members, job % members], axis=1),
            jax.random.wrap_key_data(key, impl=_RNG),
        )
        if members == 1:
            return gray
        gray = gray.reshape(1, passes, members, height, width)
        settings = sampler.align, sampler.reduce, sampler.uncertainty
        return segmenter._merge_members(gray, *settings)[0][0]

    return sample


def _stored(params: Any, dtype: str) -> Any:
    """`params` as numpy arrays of `dtype`: constants of the exported function."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params)) * jnp.dtype(dtype).itemsize
    if size > _LIMIT:
        raise UserError(
            f"--dtype {dtype}: {size / 2**30:.1f} GiB of weights do not fit into one StableHLO "
            "file, which ends at 2 GiB: use --dtype bfloat16 or --format diffusers"
        )

    def store(array: jax.Array) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = np.asarray(array).astype(jnp.dtype(dtype))
        if dtype == "float16" and not np.isfinite(stored).all():
            raise UserError("--dtype float16: a weight overflows it: use bfloat16 or float32")
        return stored

    return jax.tree.map(store, params)


def _inputs(model: Segmenter) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of image, context and key, with symbolic dimensions."""
    tokens = "L" if model.config.codec.context == "bound" else model.tokenizer.model_max_length
    context = jax.export.symbolic_shape(f"P, {tokens}, {model.text_encoder.config.hidden_size}")
    return (
        jax.ShapeDtypeStruct((*model.config.data.image_size, 3), jnp.uint8),
        jax.ShapeDtypeStruct(context, jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.uint32),
    )


def describe(model: Segmenter, sampler: SamplerConfig, dtype: str) -> dict[str, Any]:
    """What a program must know to call the function and to read its maps, as JSON values."""
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
    return {
        "function": FUNCTION,
        "platforms": list(PLATFORMS),
        "jax": jax.__version__,
        "inputs": inputs,
        "output": output,
        "weights_dtype": dtype,
        "sampler": {
            name: getattr(sampler, name) for name in ("steps", "ensemble", "eta", "align", "reduce")
        },
        "codec": {
            name: getattr(config.codec, name)
            for name in ("classes_per_pass", "context", "threshold", "closed")
        },
        "templates": list(config.prompts.templates),
        "key": f"seed s is [0, s], as jax.random.key(s, impl={_RNG!r})",
        "other_label": codec.IGNORE,
    }
