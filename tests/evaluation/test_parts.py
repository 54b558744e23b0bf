"""A stopped evaluation goes on: what is done is not done again, and the figures are the same."""

import json

import jax
import numpy as np
import pytest
from test_evaluator import MemorySource

from segdiff_jax import ownership
from segdiff_jax.errors import UserError
from segdiff_jax.evaluation import parts
from segdiff_jax.evaluation.evaluator import evaluate
from segdiff_jax.evaluation.plan import Plan
from segdiff_jax.text import vocabulary


class Breaking(MemorySource):
    """Cannot be read from photo `broken` on; counts what is read."""

    broken = None

    def __getitem__(self, index):
        if self.broken is not None and index >= self.broken:
            raise UserError("stopped here")
        return super().__getitem__(index)


def test_a_stopped_evaluation_goes_on(make_segmenter, tmp_path, monkeypatch):
    model, source, keep = make_segmenter(), Breaking(), (str(tmp_path / "parts"), {"step": 6})
    options = {"examples": 2, "sampler": None}
    whole = evaluate(Plan(model, source, **options))
    source.broken = 3
    with pytest.raises(UserError, match="stopped here"):
        evaluate(Plan(model, source, **options), keep=keep)
    kept = sorted(p.name for p in (tmp_path / "parts").iterdir())
    assert len(kept) == 1 + 3 and kept[0] == ownership.MARKER, "an image a call, three are done"

    source.broken, sampled = None, []
    plain = model.unclipped_maps
    monkeypatch.setattr(
        model, "unclipped_maps", lambda photos, *a: (sampled.append(a[-1]), plain(photos, *a))[1]
    )
    again = evaluate(Plan(model, source, **options), keep=keep)
    assert [names[0] for names in sampled] == ["photo_3", "photo_4"]
    assert json.dumps(again.summary) == json.dumps(whole.summary)
    assert again.per_image == whole.per_image and (again.confusion == whole.confusion).all()
    for one, other in zip(again.examples, whole.examples, strict=True):
        assert one.name == other.name and (one.prediction == other.prediction).all()
        assert (one.labels == other.labels).all() and (one.image == other.image).all()
    sampled.clear()
    assert evaluate(Plan(model, source, **options), keep=keep).summary == again.summary
    assert not sampled, "all is there"
    parts.remove(keep[0])
    assert not (tmp_path / "parts").exists()


def test_parts_of_another_evaluation_are_not_used(make_segmenter, tmp_path):
    model, source, folder = make_segmenter(), Breaking(), str(tmp_path / "parts")
    source.broken = 2
    with pytest.raises(UserError):
        evaluate(Plan(model, source), keep=(folder, {"step": 6}))
    (tmp_path / "parts" / "mine.txt").write_text("not ours")
    source.broken = 0
    for other in ({"step": 7}, {"step": 6, "root": "elsewhere"}):
        with pytest.raises(UserError, match="stopped here"):
            evaluate(Plan(model, source), keep=(folder, other))
    left = sorted(p.name for p in (tmp_path / "parts").iterdir())
    assert [name for name in left if name != ownership.MARKER] == ["mine.txt"]


def _other_masks(model, source):
    model.config.data.mask_values = (7, 8, 9)


def _other_scenes(model, source):
    model.config.seed += 1


def _other_weights(model, source):
    model.networks.unet_params = jax.tree.map(lambda leaf: 2 * leaf, model.networks.unet_params)


def _other_synonyms(model, source):
    source.vocabulary = vocabulary.from_names(["sky", "building, house", "road"])


@pytest.mark.parametrize("change", [_other_masks, _other_scenes, _other_weights, _other_synonyms])
def test_parts_of_other_data_or_another_model_are_not_used(make_segmenter, tmp_path, change):
    """All figures would be a mixture, if the same place is meant to hold something else now."""
    model, source, keep = make_segmenter(), Breaking(), (str(tmp_path / "parts"), {"step": 6})
    source.broken = 2
    with pytest.raises(UserError, match="stopped here"):
        evaluate(Plan(model, source), keep=keep)
    source.broken = 0
    change(model, source)
    with pytest.raises(UserError, match="stopped here"):
        evaluate(Plan(model, source), keep=keep)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [ownership.MARKER]


def test_larger_pairs_are_shrunk_before_they_are_scored(make_segmenter, tiny_config):
    config = tiny_config()
    config.data.shortest = 10
    source = MemorySource(count=2, sizes=((20, 28), (8, 12)))
    result = evaluate(Plan(make_segmenter(config), source, examples=2))
    assert [e.labels.shape for e in result.examples] == [(10, 14), (8, 12)]
    assert [e.image.shape for e in result.examples] == [(10, 14, 3), (8, 12, 3)]
    assert result.summary["labels"]["pairs"] == 2
    assert result.confusion.sum() == sum((e.labels != 255).sum() for e in result.examples)
    assert np.isin(result.examples[0].labels, [0, 1, 2, 255]).all()
