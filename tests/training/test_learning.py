"""The whole recipe, on the command line, learns what it is shown."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

CONFIG = """
    from segdiff_jax import config as c

    def get_config():
        return c.Config(
            data=c.DataConfig(
                source="scenes",
                image_size=(32, 32),
                val_split="train",
                scenes=c.ScenesConfig(train_examples=4, max_shapes=1),
                augment=c.AugmentConfig(flip=False),
                cache_latents=True,
            ),
            model=c.ModelConfig(preset="tiny"),
            prompts=c.PromptsConfig(templates=("{class}",)),
            codec=c.CodecConfig(classes_per_pass=1, negatives=0.3),
            optimizer=c.OptimizerConfig(
                learning_rate=2e-3, warmup_steps=10, decay_steps=300, final_fraction=0.1
            ),
            train=c.TrainConfig(
                steps=300, batch_size=8, terminal_share=1.0, checkpoint_every=1000, log_every=50
            ),
            vae=c.VAEConfig(
                steps=400,
                batch_size=4,
                learning_rate=4e-3,
                optimizer="muon",
                mask_share=0.75,
                mask_mixing=0.0,
            ),
            sampler=c.SamplerConfig(steps=1, ensemble=1, batch_size=100),
        )
"""


@pytest.mark.slow
def test_four_scenes_are_learnt_by_heart(tmp_path):
    (tmp_path / "config.py").write_text(textwrap.dedent(CONFIG))

    def command(name, *flags):
        arguments = ["-m", f"segdiff_jax.{name}", "--config", str(tmp_path / "config.py"), *flags]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        run = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True)
        assert run.returncode == 0, run.stderr[-4000:]

    workdir, output = str(tmp_path / "run"), tmp_path / "scores"
    command("train", "--workdir", workdir)
    command("evaluate", "--checkpoint", workdir, "--output", str(output))
    scores = json.loads((output / "metrics.json").read_text())
    assert scores["images"] == 4 and scores["miou_present"] > 0.9
