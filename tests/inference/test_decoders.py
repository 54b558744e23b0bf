"""Another decoder of mask latents in the place of the VAE's, and what a shortlist ranks by."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segdiff_jax.errors import UserError
from segdiff_jax.models.joint_decoder import JointDecoder
from segdiff_jax.models.linear_decoder import LinearDecoder
from segdiff_jax.models.tiny_vae import TinyVAE, TinyVAEConfig
from segdiff_jax.text.vocabulary import from_names
from segdiff_jax.weights.mask_decoders import Decoders

CLASSES = ("sky", "building", "road", "red tree")


@pytest.fixture
def model(make_segmenter):
    return make_segmenter()


def _constant(value):
    return LinearDecoder(jnp.zeros((3, 3, 4, 4)), jnp.full(4, value))  # 4 channels at f = 2


def _maps(model, image, decoder):
    sampler = dataclasses.replace(model.config.sampler, decoder=decoder)
    return model.maps([image], from_names(CLASSES, "x").classes, sampler, 0)[0]


def test_maps_come_from_the_decoder_that_was_chosen(model, image):
    by_vae = _maps(model, image, "vae")
    tiny = TinyVAE(
        TinyVAEConfig(width=4, encoder_blocks=(0, 0), decoder_blocks=(0, 0)), rngs=nnx.Rngs(0)
    )
    model.networks.add_decoders(Decoders(_constant(0.25), tiny))
    np.testing.assert_allclose(_maps(model, image, "linear"), 0.25, atol=1e-6)
    assert _maps(model, image, "tiny").shape == by_vae.shape
    assert np.abs(_maps(model, image, "tiny") - by_vae).max() > 0.01
    np.testing.assert_array_equal(_maps(model, image, "vae"), by_vae)


def test_a_shortlist_ranks_without_the_vae_and_decodes_with_it(model, image):
    full = model(image, CLASSES, seed=5)
    model.networks.add_decoders(
        Decoders(_constant(0.25))
    )  # to which all classes are equally present
    short = model(image, CLASSES, seed=5, shortlist=2)
    np.testing.assert_allclose(short.scores[..., :2], full.scores[..., :2], atol=1e-5)
    assert (short.network_scores[..., 2:] == 0).all()


@pytest.mark.parametrize(
    ("decoder", "says"),
    [
        ("linear", "run its training again"),
        ("tiny", "AutoencoderTiny"),
        ("joint", "config.joint.steps"),
    ],
)
def test_a_decoder_that_is_not_there_says_how_to_get_it(model, image, decoder, says):
    with pytest.raises(UserError, match=f"sampler.decoder='{decoder}'.*{says}.*or use vae"):
        _maps(model, image, decoder)


def _joint(model):
    """A joint decoder that has something to say about a photo."""
    decoder = JointDecoder(model.text_encoder.config.hidden_size, rngs=nnx.Rngs(0))
    kernel = decoder.query.kernel
    kernel[...] = 0.1 * np.random.default_rng(0).normal(size=kernel.shape).astype(np.float32)
    return decoder


def test_a_joint_decoder_sees_the_photo(model, image):
    without = model.networks.checksum()
    model.networks.add_decoders(Decoders(_constant(0.25), joint=_joint(model)))
    model.config.sampler.decoder = "joint"
    scores = model(image, CLASSES).network_scores
    # The maps are the same everywhere, so what differs from pixel to pixel is of the photo.
    assert scores.std((0, 1)).min() > 1e-3
    np.testing.assert_array_equal(model(model.encode(image), CLASSES).network_scores, scores)
    assert model.networks.checksum() != without  # `predict` does photos again with another one
    other = model(255 - image, CLASSES).network_scores
    assert np.abs(other - scores).max() > 1e-3


def test_weights_of_it_that_are_not_finite_are_named(model, image):
    joint = _joint(model)
    joint.scale[...] = np.nan
    model.networks.add_decoders(Decoders(_constant(0.25), joint=joint))
    with pytest.raises(UserError, match="not finite: the weights of the joint decoder are not"):
        _maps(model, image, "joint")


def test_classes_off_the_shortlist_stay_off_it(model, image):
    model.networks.add_decoders(Decoders(_constant(0.25), joint=_joint(model)))
    model.config.sampler.decoder = "joint"
    full, short = (model(image, CLASSES, shortlist=m).network_scores for m in (0, 2))
    np.testing.assert_allclose(short[..., :2], full[..., :2], atol=1e-6)
    assert (short[..., 2:] == 0).all()


def test_tiles_see_their_own_part_of_the_photo(model):
    photo = np.random.default_rng(1).integers(0, 256, (48, 32, 3), np.uint8)
    model.networks.add_decoders(Decoders(_constant(0.25), joint=_joint(model)))
    model.config.sampler.decoder = "joint"
    whole, tiled = (model(photo, CLASSES, tiles=tiles).scores for tiles in (0, 2))
    assert whole.shape == tiled.shape and np.abs(tiled - whole).max() > 1e-3


def test_another_list_compiles_nothing_for_it(model, image, compiled):
    model.networks.add_decoders(Decoders(_constant(0.25), joint=_joint(model)))
    model.config.sampler.decoder = "joint"
    names = [f"class {i}" for i in range(8)]
    for count in (1, 2, 4):  # the sizes of a call
        model(image, names[:count])
    for classes in (names[4:8], names[:7]):
        assert compiled(model, image, classes) == []
