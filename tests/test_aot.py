"""The command's own part; what it measures is tested in tests/roofline."""

import json

import pytest

from segdiff_jax import aot
from segdiff_jax.errors import UserError
from segdiff_jax.roofline import compile, measure, report

ARGS = ["--config", "configs/ade.py", "--topology", "v5e:2x2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/ade.py", "--topology", "v9:2x2"], "choose one of v4"),
        (["--config", "configs/ade.py", "--topology", "v5e:3x7"], "refuses it"),
        ([*ARGS, "--config.train.batch_size=6"], "config.train.batch_size=6 does not divide"),
        ([*ARGS, "--config.optimizer.accumulation=2"], "config.optimizer.accumulation"),
        ([*ARGS, "--config.data.image_size=500,512"], "image_size=500,512: must be multiples of 8"),
        ([*ARGS, "--config.model.preset=zzz"], "config.model.preset='zzz'"),
        ([*ARGS, "--config.stage=vae", "--config.train.batch_size=4"], "config.vae.batch_size"),
        ([*ARGS, "--compare", "missing.json"], "--compare missing.json"),
        ([*ARGS, "--slices", "0"], "--slices"),
        ([*ARGS, "--plan", "--step", "sample"], "--plan: not with --step sample"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        aot.main(arguments)
    assert "\n" not in str(error.value)


def test_out_of_memory_is_a_result_with_the_largest_buffers(monkeypatch, tmp_path, capsys):
    text = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.1G of 15.75G hbm.

  1. Size: 1.31G
     Operator: op_name="jit(step)/dot_general"
     Shape: f32[16,10,2304,2304]{3,2,1,0:T(8,128)}
     Allocation type: HLO temp
     ==========================

  2. Size: 512.00M
     Shape: f32[8]{0}
     Allocation type: HLO temp
"""
    monkeypatch.setattr(compile, "compile_step", lambda step: compile._out_of_memory(text, 1.5))
    aot.main([*ARGS, "--json", str(tmp_path / "a.json")])
    shown = capsys.readouterr().out
    assert "Used 20.1G of 15.75G" in shown
    assert "1.31G f32[16,10,2304,2304]" in shown
    made = json.loads((tmp_path / "a.json").read_text())
    assert made["fits"] is False
    assert len(made["largest_buffers"]) == 2
    aot.main([*ARGS, "--compare", str(tmp_path / "a.json")])
    assert capsys.readouterr().out.count("Used 20.1G") == 2


def test_a_kernel_that_does_not_fit_is_named():
    text = """RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:

Ran out of memory in memory space vmem while allocating on stack for %splash_mha_fwd.1
"""
    assert compile._out_of_memory(text, 1.5).message == (
        "E1001: CompileTimeScopedVmemOom: "
        "Ran out of memory in memory space vmem while allocating on stack for %splash_mha_fwd.1"
    )


def test_search_gives_the_batch_of_the_whole_mesh(monkeypatch):
    compiled = []

    def fake(config, target, *, planned):
        batch = config.train.batch_size
        if not planned:
            compiled.append(batch // 4)
        fits = batch <= (6 if planned else 5) * 4  # the code is not in the plan
        chip = {"per_chip": {"hbm": {"total": 3e9 * batch / 4}}} if fits else {"why": "full"}
        return {"fits": fits, "batch_per_chip": batch / 4, **chip}

    monkeypatch.setattr(measure, "measure", fake)
    from segdiff_jax import cli

    config = cli.load_config("configs/ade.py", ["--config.data.root=x"])
    config, made = measure.search(config, measure.Target("v5e:2x2"), lambda line: None)
    assert (config.train.batch_size, made["batch_per_chip"]) == (20, 5)
    assert compiled == [6, 5]


def test_two_reports_side_by_side():
    one = {
        **{"topology": "v5e:2x2", "slices": 1, "step": "train", "mesh": "data=4"},
        **{"batch_per_chip": 4.0, "fits": True, "hbm_of_chip": 16 * 2**30, "compile_seconds": 10.0},
        "per_chip": {
            "hbm": {"arguments": 2**30},
            "flops": {"total": 1e12},
            "bytes_accessed": 2e9,
            "collectives": [
                {"kind": "all-gather", "network": "ici", "count": 3, "payload": 1e9, "moved": 1e9}
            ],
        },
        "roofline": {f"{n}_seconds": 0.1 for n in ("compute", "memory", "network", "step")}
        | {"bound": "memory", "mfu": 0.1, "images_per_second": 9.0},
    }
    two = json.loads(json.dumps(one)) | {"slices": 2}
    two["per_chip"]["bytes_accessed"] = 1e9
    lines = {line[:34].strip(): line[34:].split() for line in report.table([one, two]).splitlines()}
    assert lines["bytes accessed, GB"] == ["2.00", "1.00", "0.50×"]
    assert lines["topology"] == ["v5e:2x2", "v5e:2x2", "×", "2"]
