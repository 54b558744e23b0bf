"""`segdiff bench`: its suites in small, what it refuses to time, what it calls worse."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from segdiff_jax import bench
from segdiff_jax.benchmarks import paper, twins
from segdiff_jax.benchmarks.timing import Figure, NotRun, Ratio, Spread
from segdiff_jax.errors import UserError

ONE = Spread(1.0, 1.0, 1.0)


def measured(tmp_path, suite):
    path = tmp_path / "new" / f"{suite}.json"
    bench.main([suite, "--small", "--json", str(path)])
    return json.loads(path.read_text())


def test_cpu(tmp_path):
    made = measured(tmp_path, "cpu")
    parts = ("UNet", "UNet", "VAE encode", "VAE decode", "training step")
    assert [name.startswith(part) for name, part in zip(made["ratios"], parts, strict=True)]
    for ratio in made["ratios"].values():
        median, low, high = ratio["ratio"]
        assert 0 < low <= median <= high and ratio["aim"] == 1.0
    assert made["versions"]["torch"] == torch.__version__
    assert made["machine"]["cores"] and made["date"] and "commit" in made


def test_input(tmp_path):
    made = measured(tmp_path, "input")
    assert sum("latent cache" in name for name in made["ratios"]) == 1
    assert all(figure["unit"] == "images/s per core" for figure in made["figures"].values())
    assert min(figure["value"][0] for figure in made["figures"].values()) > 0


PREDICT = ("the paper's pipeline", "3 photos", "0.12 megapixels", "12 classes", "configs/camvid")
GPU = ("training step", "cuDNN's attention", "XLA's attention", "sampler", "VAE")


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "parts"), [("predict", PREDICT), ("gpu", GPU)])
def test_outputs_are_equal_in(suite, parts, tmp_path):
    made = measured(tmp_path, suite)
    for name, part in zip(made["ratios"], parts, strict=True):
        assert name.startswith(part)


@pytest.mark.parametrize("suite", ["cpu", "predict"])
def test_the_limits_of_the_document_are_the_aims(suite):
    docs = Path(__file__).parents[1] / "docs"
    text = (docs / "performance.md").read_text().split(f"`bench {suite}`:")[1].split("`bench ")[0]
    limits = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| ")]
    ratios = json.loads((docs / "bench" / f"{suite}.json").read_text())["ratios"].values()
    assert [float(x) if x else None for x in limits[1:]] == [ratio["aim"] for ratio in ratios]


def test_other_weights_are_not_timed(monkeypatch):
    made = twins.of_unet

    def spoilt(network):
        twin = made(network)
        with torch.no_grad():
            twin.mid_block.resnets[0].conv1.weight.mul_(1.5)
        return twin

    monkeypatch.setattr(twins, "of_unet", spoilt)
    with pytest.raises(UserError, match="UNet, 8 × 8, batch 1: the outputs differ by"):
        bench.main(["cpu", "--small"])


def test_the_alignment_of_the_paper_undoes_scale_and_shift():
    one = np.random.default_rng(0).uniform(-1, 1, (8, 8))
    one = (one - one.min()) / np.ptp(one)  # [0, 1]
    members = np.stack([2 * (scale * one + shift) - 1 for scale, shift in ((0.5, 0.1), (0.8, 0.2))])
    np.testing.assert_allclose(paper.merged(members), one, atol=1e-3)


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """A function of ratios by name that makes `bench cpu` measure those; returns its JSON file."""

    def run(ratios, *flags):
        found = [Ratio(name, Spread(r, r, r), ONE, ONE, ONE, ONE) for name, r in ratios.items()]
        found += [Figure("photos", ONE, "photos/s"), NotRun("sampler", "no time")]
        monkeypatch.setattr(bench, "_suite", lambda name: lambda small: iter(found))
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        bench.main(["cpu", "--json", str(path), *flags])
        return str(path)

    return run


def test_what_got_worse_is_named(timed, capsys):
    old = timed({"UNet": 1.0, "VAE": 1.0, "gone": 1.0})
    timed({"UNet": 1.14, "VAE": 0.5}, "--compare", old)
    out = capsys.readouterr().out
    assert "worse" not in out and "sampler: not run: no time" in out
    with pytest.raises(SystemExit) as ended:
        timed({"UNet": 1.2, "VAE": 1.1, "new": 9.0}, "--compare", old)
    assert ended.value.code == 1
    worse = [text for text in capsys.readouterr().out.splitlines() if text.startswith("worse")]
    assert worse == ["worse: UNet: 1.2, it was 1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("[]", "holds no JSON object: name a file that bench --json wrote"),
        ('{"ratios": {"UNet": {}}}', "is no file that bench --json wrote"),
        ('{"ratios": {}, "suite": "gpu", "small": false}', "is of `bench gpu`"),
        ('{"ratios": {}, "suite": "cpu", "small": true}', "is of `bench cpu --small`"),
    ],
)
def test_what_cannot_be_compared_with_is_said_in_a_line(content, message, tmp_path):
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        bench.main(["cpu", "--compare", str(path)])
    assert "\n" not in str(error.value)


def test_a_missing_library_or_card_or_file_is_said_in_a_line(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        bench.main(["cpu", "--json", str(tmp_path)])
    with pytest.raises(UserError, match=r"no NVIDIA card.*--small"):
        bench.main(["gpu"])
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="bench cpu: torch and diffusers not installed: pip"):
        bench.main(["cpu"])
