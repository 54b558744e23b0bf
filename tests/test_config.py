"""What `validate` refuses, and that the stored form of a config comes back as it was."""

import copy
import dataclasses
import json
import math

import pytest

from segdiff_jax import __version__
from segdiff_jax.config import Config, from_dict, stored, to_dict, validate
from segdiff_jax.errors import UserError
from segdiff_jax.fields import leaves
from segdiff_jax.stages import of_stage, put


def valid() -> Config:
    config = Config()
    config.data.source = "scenes"
    config.vae.steps = 1
    return config


def _with(config: Config, key: str, value) -> Config:
    changed = copy.deepcopy(config)
    put(changed, key, value)
    return changed


@pytest.mark.parametrize(
    ("joint", "key", "value", "says"),
    [
        (False, "codec.context", "sum", "mean, bound"),
        (False, "diffusion.prediction_type", "epsilon", "rescale_betas_zero_snr"),
        (False, "mesh.fsdp", 0, "-1"),
        (False, "optimizer.accumulation", 5, "train.batch_size"),
        (False, "data.source", "folder", "data.root"),
        (False, "vae.steps", 0, "init_from"),
        (False, "diffusion.steps_offset", 1000, "num_train_timesteps=1000"),
        (True, "stage", "joint", "config.stage='joint': is not trained by itself"),
        (True, "codec.classes_per_pass", 0, "needs config.codec.classes_per_pass=1"),
        (True, "joint.steps", 0, "config.sampler.decoder='joint': needs config.joint.steps"),
    ],
)
def test_bad_values_name_the_key_and_the_mend_in_one_line(joint, key, value, says):
    config = valid()
    if joint:
        config.joint.steps, config.sampler.decoder = 9, "joint"
    with pytest.raises(UserError) as error:
        validate(_with(validate(config), key, value))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_every_number_and_every_pair_of_numbers_declares_its_bounds():
    numeric = (int, float, tuple[int, int])
    without = [
        k for k, f, _ in leaves(Config()) if f.type in numeric and "bounds" not in f.metadata
    ]
    assert without == []


def test_what_may_be_mended_in_more_than_one_way():
    config = valid()
    config.train.steps, config.train.profile_start, config.train.profile_steps = 9, 10, 5
    with pytest.raises(UserError, match=r"profile_start=10 .*config\.train\.steps=9"):
        validate(config)
    assert validate(_with(config, "train.profile_start", 9))
    assert validate(_with(config, "train.profile_steps", 0))
    config = valid()
    config.data.cache_latents, config.data.augment.color_jitter = True, 0.2
    with pytest.raises(UserError, match="cache_latents.*views"):
        validate(config)
    assert validate(_with(config, "data.augment.color_jitter", 0.0))
    assert validate(_with(config, "data.augment.views", 4))


def test_stored_configs_come_back():
    config = valid()
    config.data.image_size = (64, 80)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(json.loads(json.dumps(stored(config)))) == config
    assert stored(config)["segdiff_jax_version"] == __version__


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], "config=[]: must be an object"),
        ({"data": 5}, "config.data=5: must be an object"),
        ({"data": {"rot": "/x"}}, "config.data.rot: unknown key: did you mean root?"),
        ({"data": {"image_size": [16]}}, "config.data.image_size=(16,): must be tuple[int, int]"),
        ({"data": {"image_size": [16, "16"]}}, "config.data.image_size=(16, '16')"),
        ({"sampler": {"steps": "ten"}}, "config.sampler.steps='ten': must be int, such as 10"),
        ({"sampler": {"steps": True}}, "config.sampler.steps=True: must be int"),
        ({"sampler": {"steps": 2.0}}, "config.sampler.steps=2.0: must be int"),
        ({"sampler": {"steps": 10**30}}, "must be at least 1 and at most 2147483647"),
        ({"sampler": {"eta": 10**400}}, "config.sampler.eta=a number of more than 100 digits"),
        ({"sampler": {"eta": math.nan}}, "config.sampler.eta=nan: must be float"),
        ({"diffusion": {"prediction_type": "zzz"}}, "config.diffusion.prediction_type='zzz'"),
        ({"diffusion": {"prediction_type": ["epsilon"]}}, "must be str"),
        ({"diffusion": {"beta_start": -1}}, "config.diffusion.beta_start=-1.0: must be at least"),
        ({"diffusion": {"beta_start": 0.5}}, "config.diffusion.beta_end"),
        ({"codec": {"threshold": 5}}, "config.codec.threshold=5.0: must be at least 0.0 and at"),
        ({"prompts": {"templates": []}}, "config.prompts.templates=()"),
        ({"prompts": {"templates": "a {class}"}}, "must be tuple[str, ...]"),
        ({"prompts": {"templates": ["a photo"]}}, "must contain {class}"),
        ({"data": {"root": "a\0b"}}, "config.data.root="),
    ],
)
def test_a_stored_config_passes_the_same_checks(values, says):
    with pytest.raises(UserError) as error:
        from_dict(values, "W/config.json")
    message = str(error.value)
    assert message.startswith("W/config.json: config") and says in message, message
    assert "\n" not in message and len(message) < 300 and "written by" not in message


def test_a_file_of_a_newer_version_says_so_and_an_older_one_is_read():
    newer = {"segdiff_jax_version": "99.0.1", "data": {"colour": 1}}
    with pytest.raises(
        UserError, match=r"colour: unknown key: written by version 99\.0\.1, this is"
    ):
        from_dict(newer, "f")
    assert from_dict({"segdiff_jax_version": "99.0.1", "seed": 3}).seed == 3
    for version in ("0.0.1", None, 7, "new", []):
        with pytest.raises(UserError) as error:
            from_dict({"segdiff_jax_version": version, "seeds": 3}, "f")
        assert "did you mean seed?" in str(error.value) and "written by" not in str(error.value)


def test_reading_a_model_asks_nothing_of_its_training():
    config = Config()  # a folder without root, no start and no VAE stage
    assert validate(config, "model")
    for use in ("train", "evaluate"):
        with pytest.raises(UserError, match="data.root"):
            validate(config, use)
    config.data.root = "/data"
    assert validate(config, "evaluate")
    with pytest.raises(UserError, match="init_from"):
        validate(config)


def test_the_vae_stage_takes_its_own_settings():
    config = valid()
    config.stage, config.vae.steps, config.vae.optimizer = "vae", 7, "muon"
    own = of_stage(config)
    assert (own.train.steps, own.train.batch_size) == (7, 16)
    assert (own.optimizer.method, own.optimizer.learning_rate) == ("muon", 1e-3)
    assert (own.optimizer.decay_steps, own.optimizer.final_fraction) == (7, 0.1)
    assert (own.optimizer.weight_decay, own.optimizer.ema_decay) == (0.0, 0.0)
    assert of_stage(own) == own and config.train.steps == 25_000
    config.vae.steps = 0
    with pytest.raises(UserError, match=r"config\.vae\.steps=0"):
        validate(config)


def test_the_joint_decoder_takes_its_own_settings():
    config = valid()
    config.joint.steps, config.sampler.decoder = 9, "joint"
    # Three do not divide the decoder's batch of eight.
    config.train.batch_size, config.optimizer.accumulation, config.train.profile_steps = 9, 3, 1
    assert validate(config)
    own = of_stage(dataclasses.replace(config, stage="joint"))
    assert (own.train.steps, own.train.batch_size, own.train.eval_every) == (9, 8, 0)
    assert (own.optimizer.learning_rate, own.optimizer.decay_steps) == (6e-3, 9)
    assert own.data.augment.views == 0 and not own.data.cache_latents
    assert own.optimizer.accumulation == 1 and own.train.profile_steps == 0
    assert of_stage(own) == own
