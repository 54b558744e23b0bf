"""Names and layouts of Stable Diffusion's tensors: Hugging Face files ⇄ our NNX modules.

Our paths are the names of diffusers and transformers with a few levels renamed, so each component
has a short list of rewrites from path to name, and one set of rules for axes:

    linear        kernel [in, out]      weight [out, in]
    convolution   kernel [h, w, in, out]  weight [out, in, h, w]
    norm          scale                 weight
    embedding     embedding             weight
"""

import re

import numpy as np

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

_COMMON = (
    (r"\bto_out\b", "to_out.0"),
    (r"\b(down|up)sample\.conv\b", r"\1samplers.0.conv"),
)
_RENAME: dict[str, tuple[tuple[str, str], ...]] = {
    "unet": (
        *_COMMON,
        (r"^time_linear_(\d)\b", r"time_embedding.linear_\1"),
        (r"\bff\.proj_in\b", "ff.net.0.proj"),
        (r"\bff\.proj_out\b", "ff.net.2"),
    ),
    "vae": (
        *_COMMON,
        (r"\bmid_block\.attention\.(?:attention\.)?", "mid_block.attentions.0."),
    ),
    # Activations stand between a block's convolutions there.
    "tiny_vae": ((r"\bconv\.2$", "conv.4"), (r"\bconv\.1$", "conv.2")),
    "text_encoder": (
        (r"^(token|position)_embedding\b", r"embeddings.\1_embedding"),
        (r"^layers\.(\d+)\.([qkv]|out)_proj\b", r"layers.\1.self_attn.\2_proj"),
        (r"^layers\.(\d+)\.(fc\d)\b", r"layers.\1.mlp.\2"),
        (r"^layers\b", "encoder.layers"),
        (r"^", "text_model."),
    ),
}

# diffusers < 0.15 wrote the VAE's attention with these names.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def tensor_name(component: str, path: str) -> str:
    """Return the name in a published file of our path "down_blocks/0/resnets/0/conv1/kernel"."""
    module, leaf = path.replace("/", ".").rsplit(".", 1)
    for pattern, replacement in _RENAME[component]:
        module = re.sub(pattern, replacement, module)
    return f"{module}.{_LEAVES[leaf]}"


def canonical_name(component: str, name: str) -> str | None:
    """Spell a name found in a file as `tensor_name` does; None for what the network does not use.

    Of a text encoder that is a buffer without weights, and a projection of the pooled output.
    """
    if component == "text_encoder":
        if name.endswith(("position_ids", "text_projection.weight")):
            return None
        return name if name.startswith("text_model.") else f"text_model.{name}"
    if component == "vae":
        old = r"(mid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\."
        return re.sub(old, lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name)
    return name


def file_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape a published file has for our array of `shape` at `path`."""
    return tuple(shape[axis] for axis in _file_axes(path, len(shape)))


def from_file(path: str, array: np.ndarray) -> np.ndarray:
    """Lay a tensor of a file out as ours (a view)."""
    return np.transpose(array, np.argsort(_file_axes(path, array.ndim)))


def to_file(path: str, array: np.ndarray) -> np.ndarray:
    """Invert `from_file`."""
    return np.transpose(array, _file_axes(path, array.ndim))


def _file_axes(path: str, dimensions: int) -> tuple[int, ...]:
    """Return our axes in the order of a file's."""
    if not path.endswith("/kernel"):
        return tuple(range(dimensions))
    return (1, 0) if dimensions == 2 else (3, 2, 0, 1)
