"""Decoders of mask latents in workdirs and exports."""

import shutil

import numpy as np
import pytest

from segdiff_jax import export
from segdiff_jax.errors import UserError
from segdiff_jax.models.linear_decoder import LinearDecoder
from segdiff_jax.models.vae import VAEConfig
from segdiff_jax.train import train
from segdiff_jax.weights import loading, mask_decoders

VAE = VAEConfig(latent_channels=2, block_out_channels=(4, 4))


def _write(folder, channels=2):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    decoder = LinearDecoder(draw(3, 3, channels, 4), draw(4))
    (folder / mask_decoders.LINEAR).write_bytes(mask_decoders.linear_to_bytes(decoder))
    return decoder


def test_a_linear_decoder_survives_its_file(tmp_path):
    assert mask_decoders.read_linear(tmp_path, VAE) is None
    written = _write(tmp_path)
    for actual, expected in zip(mask_decoders.read_linear(tmp_path, VAE), written, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_the_file_of_another_vae_and_a_damaged_one_are_refused(tmp_path):
    _write(tmp_path, channels=3)
    with pytest.raises(UserError, match=r"linear_decoder\.safetensors: was not fitted to this VAE"):
        mask_decoders.read_linear(tmp_path, VAE)
    (tmp_path / mask_decoders.LINEAR).write_bytes(b"\x07" * 40)
    with pytest.raises(UserError, match=r"linear_decoder\.safetensors: damaged"):
        mask_decoders.read_linear(tmp_path, VAE)


def test_a_finished_training_has_one_and_so_has_its_export(trained, micro_config, tmp_path):
    networks, decoders, _ = loading.load_networks(trained)
    linear = decoders.linear
    assert decoders.tiny is decoders.joint is None and linear.kernel.shape[:3] == (
        3,
        3,
        networks[1].config.latent_channels,
    )
    export.write_folder(networks, tmp_path / "model", decoders=decoders)
    again = loading.load_networks(str(tmp_path / "model"))[1]
    np.testing.assert_array_equal(again.linear.kernel, linear.kernel)

    copy = tmp_path / "run"  # as of an earlier version, without one
    shutil.copytree(trained, copy)
    (copy / mask_decoders.LINEAR).unlink()
    train(micro_config(), str(copy))
    fitted = loading.load_networks(str(copy))[1]
    np.testing.assert_allclose(fitted.linear.kernel, linear.kernel, atol=1e-3)
