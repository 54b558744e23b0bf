"""ADE20K as TensorFlow Datasets packs it (`scene_parse150`), read without TensorFlow.

The builder in tensorflow_datasets packs the *instance* annotations of the Places Challenge: red is
one of 100 object categories with numbers of their own, green the instance, blue 0. The other 50
classes ("wall", "sky", …) are not annotated there and are ignored here. Records whose three
channels agree hold scene-parsing ids instead, as in ADEChallengeData2016. Both become the ids of
the vocabulary ade20k_150. Categories: CSAILVision/placeschallenge, instanceInfo100_train.txt.
"""

from typing import Any

import numpy as np
from etils import epath

from segdiff_jax.data.images import UnreadableError
from segdiff_jax.data.sources.layouts import IGNORE, IGNORED, OUTSIDE, shifted_lookup, to_labels
from segdiff_jax.data.sources.source import check_ids, count_ids
from segdiff_jax.errors import UserError
from segdiff_jax.text import vocabulary as vocabularies

DATASET = "scene_parse150"
# Instance category c (1…100) is the c-th class, in ade20k_150's order, that is none of these.
_STUFF = (
    *(0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59),
    *(60, 61, 63, 68, 77, 79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122),
    *(128, 131, 140, 141, 145),
)


def instance_lookup() -> np.ndarray:
    """Return the table int32 [256] from instance categories 1…100 to ade20k_150; 0 is ignore."""
    lookup = np.full(256, OUTSIDE, np.int32)
    lookup[1:101] = np.setdiff1d(np.arange(150), _STUFF)
    lookup[[0, IGNORE]] = IGNORED
    return lookup


class TfdsSource:
    """A split of `scene_parse150` in array_record files under `root`."""

    novel: tuple[int, ...] = ()

    def __init__(self, root: str, split: str):
        self.vocabulary = vocabularies.load("ade20k_150")
        self.split = {"val": "test", "validation": "test"}.get(split, split)
        self._semantic, self._instance = shifted_lookup(), instance_lookup()
        self._records = _open(root, self.split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = f"{self.split}_{index:06d}"
        try:
            record = self._records[index]
        except Exception as error:  # whatever the decoders raise on damaged bytes
            raise UnreadableError(f"{DATASET} {name}: damaged record, prepare it again") from error
        image, annotation = record["image"], record["annotation"]  # [H, W, 3] each
        lookup = self._semantic
        if (annotation[..., 0] != annotation[..., -1]).any():
            lookup = self._instance
        ids = annotation[..., 0]
        check_ids(count_ids(ids), lookup, f"{DATASET} {name}", self.vocabulary)
        labels = to_labels(ids, lookup, len(self.vocabulary))
        return {"image": image, "labels": labels, "name": name}


def _open(root: str, split: str) -> Any:
    import tensorflow_datasets as tfds  # slow, and only this source needs it

    if not epath.Path(root).is_dir():
        raise UserError(f"config.data.root={root}: no such folder, correct the path")
    try:
        return tfds.data_source(DATASET, split=split, data_dir=root, download=False)
    except (ValueError, OSError, NotImplementedError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"config.data.root={root}: no split {split!r} of {DATASET} in array_record files "
            f"({reason}): prepare it with download_and_prepare(file_format='array_record')"
        ) from error
