"""The command on a small network, compiled by the real TPU compiler for chips that are not here."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from segdiff_jax import aot
from segdiff_jax.errors import UserError
from segdiff_jax.parallel import chips

ADE = ["--config", "configs/ade.py", "--topology", "v5e:2x2"]
TINY = [*ADE, "--config.model.preset=tiny"]
SMALL = """
from segdiff_jax.config import Config, DataConfig, ModelConfig, NoiseConfig, TrainConfig, VAEConfig
from segdiff_jax.models import presets

def get_config():
    presets.PRESETS["micro"] = presets.small((32,), (4, 8), 32)
    return Config(
        data=DataConfig(source="scenes", image_size=(16, 16), cache_latents=True),
        model=ModelConfig(preset="micro", dtype="bfloat16"),
        noise=NoiseConfig(kind="gaussian"),
        train=TrainConfig(batch_size=8, steps=1000),
        vae=VAEConfig(steps=1),
    )
"""


@pytest.fixture(autouse=True)
def cache_as_before():
    """The command turns the cache of compilations off, for its process."""
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A function of flags that runs the command on the small config; returns its JSON report."""
    folder = tmp_path_factory.mktemp("aot")
    (folder / "small.py").write_text(SMALL)

    def run(*flags):
        given = ["--config", str(folder / "small.py"), "--topology", "v5e:2x2", *flags]
        aot.main([*given, "--json", str(folder / "new" / "a.json")])
        return json.loads((folder / "new" / "a.json").read_text())

    return run


def test_a_training_step(small, capsys):
    made = small("--price", "2")
    assert (made["fits"], made["chips"], made["batch_per_chip"]) == (True, 4, 2)
    figures, line, run = made["per_chip"], made["roofline"], made["run"]
    hbm = dict(figures["hbm"])
    assert hbm.pop("total") == sum(hbm.values()) < made["hbm_of_chip"] == 16 * 2**30
    assert min(hbm.values()) > 0
    # XLA counts elementwise work too, which in a network of 32 channels is not little.
    assert 1 < figures["flops"]["total"] / figures["flops"]["analytic"] < 1.4
    assert figures["collectives"]["all-reduce"] > 0  # of gradients, between replicas
    assert line["step_seconds"] == max(line["compute_seconds"], line["memory_seconds"])
    assert line["images_per_second"] == pytest.approx(8 / line["step_seconds"])
    assert 0 < line["mfu"] < 1
    assert run["hours"][1] == pytest.approx(1000 * line["step_seconds"] / 3600)
    assert run["dollars"][1] == pytest.approx(4 * 2 * run["hours"][1])
    shown = capsys.readouterr().out
    for part in ("fits                    yes", "temporaries", "all-reduce", "MFU", "1,000 steps"):
        assert part in shown


def test_the_sampler_has_its_steps_counted_and_nothing_to_exchange(small):
    made = small("--step", "sample", "--classes", "4", "--config.sampler.steps=3")
    figures = made["per_chip"]
    assert made["batch_per_chip"] == 8  # config.sampler.batch_size is 32
    assert figures["collectives"] == {}
    # XLA counts one of three steps, and one of eight decoded images.
    assert figures["flops"]["xla"] < figures["flops"]["analytic"] / 2
    assert 1 < figures["flops"]["total"] / figures["flops"]["analytic"] < 1.4
    images = 32 / 4  # a job for each of four classes
    seconds = made["roofline"]["step_seconds"]
    assert made["roofline"]["images_per_second"] == pytest.approx(images / seconds)
    assert "run" not in made


def too_large(config, mesh, kind, classes):
    """A step that returns 32 GB, which no v5e has."""
    one = NamedSharding(Mesh(np.array(mesh.devices.flat[:1]), "x"), P())
    array = jax.ShapeDtypeStruct((), jnp.float32, sharding=one)
    function = jax.jit(lambda x: jnp.full((2**20, 2**13), x))
    return aot.Step(function, (array,), batch=4, images=4.0, flops=1.0)


def test_a_step_that_does_not_fit_is_a_result(small, capsys, monkeypatch):
    monkeypatch.setattr(aot, "make_step", too_large)
    made = small()
    assert made["fits"] is False and "32.00G" in made["why"] and "15.75G" in made["why"]
    assert "NO" in capsys.readouterr().out


REFUSED = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.75G.

  1. Size: 1.31G
     Shape: f32[16,10,2304,2304]{3,2,1,0:T(8,128)}
     Allocation type: HLO temp
     ==========================
"""


def test_the_largest_buffers_are_shown(small, capsys, monkeypatch):
    class Refused:
        trace = lower = lambda self, *_: self

        def compile(self):
            raise jax.errors.JaxRuntimeError(REFUSED)

    step = aot.Step(Refused(), (), batch=4, images=4.0, flops=1.0)
    monkeypatch.setattr(aot, "make_step", lambda *_: step)
    lines = small()["why"].splitlines()
    assert lines[0].endswith("Used 20.1G of 15.75G.") and lines[2].startswith("Shape: f32[16,10,")
    assert len(lines) == 4
    assert "1. Size: 1.31G" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "limit"), [("train", 1), ("train", 2), ("train", 5), ("train", 31), ("sample", 13)]
)
def test_search_finds_the_largest_batch_per_chip(small, monkeypatch, capsys, kind, limit):
    tried = []

    def make_step(config, mesh, *_):
        batch = config.train.batch_size if kind == "train" else config.sampler.batch_size
        return aot.Step(None, (), batch=batch, images=batch, flops=1.0)

    def measure(step, chip, count, steps):
        tried.append(step.batch / count)
        return {"fits": False, "why": "full"} if tried[-1] > limit else report()

    monkeypatch.setattr(aot, "make_step", make_step)
    monkeypatch.setattr(aot, "measure", measure)
    assert small("--search", "--step", kind)["batch_per_chip"] == limit
    assert len(tried) == len(set(tried)) <= 9
    assert f"{limit} a chip: yes" in capsys.readouterr().err


def report():
    flops = dict.fromkeys(("xla", "loops", "kernels", "total", "analytic"), 1e12)
    per_chip = {"hbm": {"total": 2**30}, "flops": flops, "bytes_accessed": 1e9, "collectives": {}}
    names = ("compute_seconds", "memory_seconds", "step_seconds", "mfu", "images_per_second")
    made = {"fits": True, "hbm_of_chip": 2**34, "compile_seconds": 1.0, "per_chip": per_chip}
    return made | {"roofline": dict.fromkeys(names, 0.5)}


def test_search_says_when_nothing_fits(small, monkeypatch):
    monkeypatch.setattr(aot, "make_step", lambda *_: aot.Step(None, (), 8, 8.0, 1.0))
    monkeypatch.setattr(aot, "measure", lambda *_: {"fits": False, "why": "full"})
    with pytest.raises(UserError, match="not even 1 per chip"):
        small("--search")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "configs/ade.py", "--topology", "v9:2x2"], "choose one of v4, v5e, v5p, v6e"),
        (["--config", "configs/ade.py", "--topology", "v5e"], "such as v5e:4x4"),
        (["--config", "configs/ade.py", "--topology", "v5e:2x2x2"], "such as v5e:4x4"),
        (["--config", "configs/ade.py", "--topology", "v5e:0x4"], "such as v5e:4x4"),
        (["--config", "configs/ade.py", "--topology", "v5e:3x7"], "refuses it"),
        ([*ADE, "--config.train.batchsize=6"], "did you mean config.train.batch_size"),
        ([*ADE, "--config.mesh.fsdp=3"], "config.mesh.*4 devices|config.mesh.*there are 4"),
        ([*ADE, "--config.model.preset=sd9"], "config.model.preset"),
        ([*ADE, "--config.data.image_size=500,512"], "image_size=500,512: must be multiples of 8"),
        ([*ADE, "--config.stage=vae", "--config.train.batch_size=4"], "config.vae.batch_size"),
        ([*ADE, "--search", "--config.optimizer.accumulation=2"], "config.optimizer.accumulation"),
        ([*TINY, "--config.optimizer.accumulation=16"], "a batch of 2 .*config.optimizer.accumul"),
        ([*TINY, "--step", "sample", "--config.sampler.decoder=tiny"], "no preset has such"),
        ([*ADE, "--slices", "0"], "--slices"),
        ([*ADE, "--price", "nan"], "--price"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(flags, message):
    with pytest.raises(UserError, match=message) as error:
        aot.main(flags)
    assert "\n" not in str(error.value)


def test_a_batch_that_does_not_divide_is_said_in_a_line(small):
    with pytest.raises(UserError, match="a batch of 6 does not divide"):
        small("--config.train.batch_size=6")


def test_a_missing_compiler_is_said_in_a_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
        aot.main(ADE)


@pytest.mark.parametrize(
    ("topology", "count"), [("v5e:1x1", 1), ("v5p:2x2", 4), ("v4:2x2x2", 8), ("v6e:4x4", 16)]
)
def test_stand_ins_are_one_device_a_chip(topology, count):
    chip, found = chips.stand_ins(topology)
    assert chip.name == topology.split(":")[0] and len(found) == count
    assert len({tuple(device.coords) for device in found}) == count


def test_stand_ins_of_two_slices_come_in_slice_order():
    _, found = chips.stand_ins("v5e:2x2", slices=2)
    assert [device.slice_index for device in found] == [0] * 4 + [1] * 4
