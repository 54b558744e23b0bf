"""What `validate` refuses, and that the stored form of a config comes back as it was."""

import json
import math

import pytest

from segdiff_jax.config import Config, from_dict, to_dict, validate
from segdiff_jax.errors import UserError
from segdiff_jax.fields import leaves as keys


def valid() -> Config:
    config = Config()
    config.data.source = "scenes"
    config.vae.steps = 1
    return config


def test_the_base_of_these_tests_is_valid():
    assert validate(valid()) == valid()


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_a_learning_rate_that_is_no_number_to_step_with(value):
    config = valid()
    config.optimizer.learning_rate = value
    with pytest.raises(UserError, match=r"config\.optimizer\.learning_rate"):
        validate(config)


@pytest.mark.parametrize(
    ("group", "key", "value", "says"),
    [
        ("codec", "context", "sum", "mean, bound"),
        ("diffusion", "prediction_type", "epsilon", "rescale_betas_zero_snr"),
        ("sampler", "steps", 1001, "num_train_timesteps=1000"),
        ("sampler", "shortlist", -3, "at least 0"),
        ("optimizer", "clip_norm", 0.0, "more than 0"),
        ("optimizer", "beta1", 1.5, "at most"),
        ("optimizer", "warmup_steps", -5, "at least 0"),
        ("noise", "strength", -1.0, "at least 0"),
        ("vae", "kl_weight", -1.0, "at least 0"),
        ("vae", "batch_size", 0, "at least 1"),
        ("train", "eval_examples", 0, "at least 1"),
        ("mesh", "fsdp", 0, "-1"),
        ("optimizer", "accumulation", 5, "train.batch_size"),
        ("data", "source", "folder", "data.root"),
        ("vae", "steps", 0, "init_from"),
        ("train", "profile_start", 0, "at least 1"),
        ("train", "profile_steps", -1, "at least 0"),
    ],
)
def test_bad_values_name_the_key_and_the_mend_in_one_line(group, key, value, says):
    config = valid()
    setattr(getattr(config, group), key, value)
    with pytest.raises(UserError) as error:
        validate(config)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_every_number_and_every_pair_of_numbers_declares_its_bounds():
    numeric = (int, float, tuple[int, int])
    without = [k for k, f, _ in keys(Config()) if f.type in numeric and "bounds" not in f.metadata]
    assert without == []


def test_a_profile_has_to_begin_within_the_run():
    config = valid()
    config.train.steps, config.train.profile_start, config.train.profile_steps = 9, 9, 5
    assert validate(config)
    config.train.profile_start = 10
    with pytest.raises(UserError, match=r"profile_start=10 .*config\.train\.steps=9"):
        validate(config)
    config.train.profile_steps = 0
    assert validate(config)


def test_latent_cache_needs_a_finite_number_of_views():
    config = valid()
    config.data.cache_latents = True
    assert validate(config)
    config.data.augment.color_jitter = 0.2
    with pytest.raises(UserError, match="cache_latents.*views"):
        validate(config)
    config.data.augment.views = 4
    assert validate(config)


def test_stored_configs_come_back():
    config = valid()
    config.data.image_size = (64, 80)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(UserError, match=r"config\.data\.colour"):
        from_dict({"data": {"colour": 1}})
