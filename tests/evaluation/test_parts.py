"""A stopped evaluation goes on: what is done is not done again, and the figures are the same."""

import json
import shutil

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
    for path, size in zip((tmp_path / "parts").glob("*.npz"), (0, 100, 1000), strict=False):
        path.write_bytes(path.read_bytes()[:size])
    assert evaluate(Plan(model, source, **options), keep=keep).summary == again.summary
    assert len(sampled) == 3, "what is damaged is done again"
    parts.remove(keep[0])
    assert not (tmp_path / "parts").exists()


@pytest.fixture(scope="module")
def stopped(make_segmenter, tmp_path_factory):
    """Model, source and the parts that are left of an evaluation stopped at the third photo."""
    model, source, folder = make_segmenter(), Breaking(), tmp_path_factory.mktemp("stopped") / "p"
    source.broken = 2
    with pytest.raises(UserError, match="stopped here"):
        evaluate(Plan(model, source), keep=(str(folder), {"step": 6}))
    source.broken = 0
    return model, source, folder


@pytest.mark.parametrize("other", ["step", "root", "masks", "scenes", "weights", "synonyms"])
def test_parts_of_another_evaluation_are_not_used(stopped, other, tmp_path, monkeypatch):
    """All figures would be a mixture, if the same place is meant to hold something else now."""
    model, source, folder = stopped
    shutil.copytree(folder, tmp_path / "parts")
    (tmp_path / "parts" / "mine.txt").write_text("not ours")
    read = {"step": {"step": 7}, "root": {"step": 6, "root": "elsewhere"}}.get(other, {"step": 6})
    names = vocabulary.from_names(["sky", "building, house", "road"])
    weights = jax.tree.map(lambda leaf: 2 * leaf, model.networks.unet_params)
    for change, *where in (
        ("masks", model.config.data, "mask_values", (7, 8, 9)),
        ("scenes", model.config, "seed", 1),
        ("weights", model.networks, "unet_params", weights),
        ("synonyms", source, "vocabulary", names),
    ):
        if change == other:
            monkeypatch.setattr(*where)
    with pytest.raises(UserError, match="stopped here"):
        evaluate(Plan(model, source), keep=(str(tmp_path / "parts"), read))
    left = {path.name for path in (tmp_path / "parts").iterdir()}
    assert left == {ownership.MARKER, "mine.txt"}


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
