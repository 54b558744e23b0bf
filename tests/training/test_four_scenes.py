"""A network that has seen four scenes segments them: training and prediction, all of it, learn."""

import numpy as np
import pytest
from PIL import Image

from segdiff_jax import config as c
from segdiff_jax.data.sources import scenes
from segdiff_jax.data.sources.source import open_source
from segdiff_jax.evaluation.evaluator import evaluate
from segdiff_jax.evaluation.plan import Plan
from segdiff_jax.inference.segmenter import Segmenter
from segdiff_jax.models import presets
from segdiff_jax.train import train

SIZE = (32, 32)
NAMES = ("background", "plain red triangle", "plain green bar", "plain blue triangle")
SHOWN = ((1, 2), (2, 3), (3, 1), (1, 2))  # of NAMES, in each scene


def write_scenes(root):
    ids = [scenes.vocabulary().names.index(name) for name in NAMES]
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(NAMES))
    for number, shown in enumerate(SHOWN):
        rng = np.random.default_rng(number)
        image, labels = scenes.render(rng, [ids[i] for i in shown], SIZE)
        for kind, array in (("images", image), ("masks", np.searchsorted(ids, labels))):
            Image.fromarray(array.astype(np.uint8)).save(root / kind / f"{number}.png")


def four_scenes_config(root):
    """Mask latents at f = 4 from the photo's in one step: what is asked of the UNet is to read."""
    presets.PRESETS["four"] = presets.small((32, 64), (8, 16, 32), 32)
    return c.Config(
        data=c.DataConfig(
            root=str(root),
            image_size=SIZE,
            augment=c.AugmentConfig(flip=False),
            cache_latents=True,
        ),
        model=c.ModelConfig(preset="four"),
        prompts=c.PromptsConfig(templates=("{class}",)),
        optimizer=c.OptimizerConfig(
            learning_rate=4e-3, warmup_steps=10, decay_steps=400, final_fraction=0.1
        ),
        train=c.TrainConfig(
            steps=400, batch_size=16, terminal_share=1.0, checkpoint_every=400, balance=0.5
        ),
        vae=c.VAEConfig(steps=60, batch_size=8, learning_rate=4e-3, optimizer="muon"),
        sampler=c.SamplerConfig(steps=1, decoder="linear", batch_size=4),
    )


@pytest.mark.slow
def test_a_network_trained_on_four_scenes_segments_them(optimized, tmp_path):
    write_scenes(tmp_path / "data")
    config = c.validate(four_scenes_config(tmp_path / "data"))
    train(config, str(tmp_path / "run"))
    source = open_source(config.data, "train", config.seed)
    summary = evaluate(Plan(Segmenter.load(str(tmp_path / "run")), source)).summary
    print({name: round(iou, 3) for name, iou in summary["per_class"].items()})
    assert summary["miou_present"] > 0.9
