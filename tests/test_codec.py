"""The mask codec: round trips, invariants, contexts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segdiff_jax import codec
from segdiff_jax.config import CodecConfig
from segdiff_jax.errors import UserError
from segdiff_jax.inference import result
from segdiff_jax.text import vocabulary

SIZES = (1, 2, 7, 64, 255)  # few, since every size compiles anew


def read(gray, num_classes, size, **options):
    """What gray images [P, H, W] say of a photo of their own size."""
    classes = vocabulary.from_names([f"class {k}" for k in range(num_classes)])
    photo = np.zeros((*gray.shape[1:], 3), np.uint8)
    settings = CodecConfig(classes_per_pass=size, **options)
    return result.from_maps(np.asarray(gray), None, photo, classes, settings, "stretch")


def round_trip(labels, num_classes, size, **options):
    """Labels -> the gray images of every pass -> scores -> labels."""
    ids = jnp.asarray(codec.groups(num_classes, size))
    gray = jax.vmap(lambda group: codec.encode(labels, group))(ids)  # [P, H, W]
    found = read(gray, num_classes, size, **options)
    assert found.scores.shape == (*labels.shape, num_classes)
    return found.labels


@pytest.mark.parametrize("num_classes", [1, 11, 255])
@pytest.mark.parametrize("share", ["one", "some", "all"])
def test_round_trip_is_exact_for_every_id(num_classes, share):
    size = {"one": 1, "some": max(1, num_classes // 3), "all": num_classes}[share]
    labels = np.append(np.arange(num_classes), [codec.IGNORE] * 2).astype(np.uint8)[None]
    found = round_trip(jnp.asarray(labels), num_classes, size, threshold=0.99)
    np.testing.assert_array_equal(found, labels)  # ignore comes back as *other*, the same 255


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_round_trip_of_random_labels(data):
    num_classes = data.draw(st.sampled_from([1, 5, 13]))
    size = data.draw(
        st.sampled_from([1, 3, num_classes, num_classes + 2])
    )  # G may exceed K: slots are padded
    alphabet = st.sampled_from([*range(num_classes), codec.IGNORE])
    pixels = data.draw(st.lists(alphabet, min_size=12, max_size=12))
    labels = np.array(pixels, np.int32).reshape(3, 4)
    found = round_trip(jnp.asarray(labels), num_classes, size)
    np.testing.assert_array_equal(found, labels)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(SIZES), st.integers(0, 2**31))
def test_noise_below_half_a_level_does_not_change_the_label(size, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, size, (4, 4))
    gray = codec.encode(jnp.asarray(labels), jnp.arange(size))
    noisy = gray + rng.uniform(-0.49, 0.49, gray.shape) * 2 / size
    found = read(noisy[None], size, size, threshold=0.5)
    np.testing.assert_array_equal(found.labels, labels)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(SIZES), st.integers(0, 2**31))
def test_scores_follow_the_definition(size, seed):
    gray = np.random.default_rng(seed).uniform(-1, 1, (5, 3)).astype(np.float32)
    scores = read(gray[None], size, size).scores
    for j in range(1, size + 1):
        level = -1 + 2 * j / size
        expected = np.maximum(0, 1 - np.abs(gray.astype(np.float64) - level) / (2 / size))
        np.testing.assert_allclose(scores[..., j - 1], expected, atol=5e-5)
    # a gray value lies between two levels, which share it; below the first, "none" has the rest
    total = scores.sum(-1)
    inside = gray >= -1 + 2 / size
    np.testing.assert_allclose(total[inside], 1.0, atol=1e-4)
    assert (total <= 1 + 1e-4).all()


def test_encode_follows_the_order_of_the_group():
    labels = jnp.array([[0, 1, 2, 3, 255]], jnp.uint8)
    gray = codec.encode(labels, jnp.array([3, codec.PAD, 1, codec.PAD]))
    np.testing.assert_allclose(gray, [[-1, 0.5, -1, -0.5, -1]])
    everything_padded = codec.encode(labels, jnp.full(4, codec.PAD))
    np.testing.assert_array_equal(everything_padded, -np.ones((1, 5)))


def test_ignored_pixels_are_never_painted():
    # 255 stays *ignore* even where a group asks for it, and int labels of -1 never meet padding
    labels = jnp.array([[255, -1, 7]])
    gray = codec.encode(labels, jnp.array([255, codec.PAD, 7]))
    np.testing.assert_allclose(gray, [[-1, -1, 1]])
    np.testing.assert_array_equal(codec.valid_mask(labels), [[False, True, True]])


def test_in_labels_of_16_bits_255_is_a_class():
    labels = jnp.array([[255, 65535, 846]], jnp.uint16)
    gray = codec.encode(labels, jnp.array([846, codec.PAD, 255, codec.PAD]))
    np.testing.assert_allclose(gray, [[0.5, -1, -0.5]])
    np.testing.assert_array_equal(codec.valid_mask(labels), [[True, False, True]])
    assert [codec.ignore_label(count) for count in (1, 255, 256, 65535)] == [255, 255, 65535, 65535]
    assert codec.label_type(255) == np.uint8 and codec.label_type(256) == np.uint16


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([1, 2, 4]), st.integers(0, 2**31))
def test_latent_pixels_are_valid_and_shown_by_their_blocks_of_pixels(factor, seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 3, 255], (8, 12), p=[0.7, 0.1, 0.1, 0.05, 0.05])
    valid = codec.latent_valid(jnp.asarray(labels), factor)
    shown = codec.latent_shown(jnp.asarray(labels), jnp.array([2, 1, -1]), factor)
    assert valid.shape == shown.shape == (8 // factor, 12 // factor) and valid.dtype == bool
    for y, x in np.ndindex(valid.shape):
        block = labels[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        assert valid[y, x] == (block != 255).all()
        assert shown[y, x] == np.isin(block, (1, 2)).any()


def test_latent_valid_rejects_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="6x8 labels do not divide by 4"):
        codec.latent_valid(jnp.zeros((6, 8), int), 4)


def test_threshold_other_and_closed():
    scores = np.float32([[[0.2, 0.6], [0.4, 0.3], [0.5, 0.5], [0.0, 0.0]]])
    photo, classes = np.zeros((1, 4, 3), np.uint8), vocabulary.from_names(["sky", "road"])

    def labels(**options):
        ranks, chosen = np.moveaxis(scores, -1, 0), CodecConfig(**options)
        return result.from_ranks(ranks, None, photo, classes, chosen).labels

    np.testing.assert_array_equal(labels(threshold=0.5), [[1, 255, 0, 255]])
    np.testing.assert_array_equal(labels(threshold=0.5, closed=True), [[1, 0, 0, 0]])
    assert labels().dtype == np.int32


@settings(deadline=None)
@given(st.integers(1, 900), st.integers(1, 255))
def test_groups_hold_every_class_once_in_order(num_classes, size):
    ids = codec.groups(num_classes, size)
    assert ids.shape == (codec.num_groups(num_classes, size), size)
    flat = ids.ravel()
    np.testing.assert_array_equal(flat[flat != codec.PAD], np.arange(num_classes))
    assert (flat[num_classes:] == codec.PAD).all() and len(flat) - num_classes < size


def test_group_size_zero_means_all_and_too_many_is_one_line():
    assert codec.group_size(11, 0) == 11
    assert codec.group_size(847, 1) == 1
    assert codec.group_size(3, 8) == 8
    with pytest.raises(UserError, match="classes_per_pass=0: 256 classes do not fit") as error:
        codec.group_size(256, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dim", [8, 65])
def test_level_codes_tell_the_levels_apart_and_do_not_depend_on_the_group_size(dim):
    code = codec.level_code(255, dim)
    assert code.shape == (255, dim) and np.abs(code).max() <= 1
    distance = np.linalg.norm(code[:, None] - code[None], axis=-1) + 10 * np.eye(255)
    assert distance.min() > 0.1
    # level 0 is slot 1 of 2 and slot 2 of 4
    np.testing.assert_allclose(codec.level_code(2, dim)[0], codec.level_code(4, dim)[1], atol=1e-6)


@settings(deadline=None)
@given(st.floats(1e-3, 0.999), st.floats(0.0, 2.0), st.lists(st.floats(0.01, 0.99), min_size=1))
def test_an_adjustment_multiplies_the_odds_of_a_score(share, tau, scores):
    given = np.array(scores, np.float32)
    found = codec.adjusted(given, share, tau)
    odds, factor = given / (1 - given), ((1 - share) / share) ** tau
    np.testing.assert_allclose(found, odds * factor / (1 + odds * factor), rtol=1e-3, atol=1e-6)
    assert (np.diff(codec.adjusted(np.sort(given), share, tau)) >= 0).all(), "order stays"
    sure = np.array([-0.5, 0.0, 1.0, 1.5], np.float32)
    np.testing.assert_allclose(codec.adjusted(sure, share, tau), sure, rtol=1e-6)
