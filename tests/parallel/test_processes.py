"""Two processes with four devices each, against one with eight.

Each start costs a dozen seconds, so runs are shared: `alone` trains 12 steps in one process,
`pair` in two until a signal to one of them, and the others begin from copies of what they left.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from commands import Run, Started, free_port
from written import read_scalars

from segdiff_jax.errors import UserError
from segdiff_jax.parallel import processes
from segdiff_jax.waiting import PROCESS
from segdiff_jax.weights.checkpoint import Checkpoints


def losses(workdir, stage="diffusion"):
    return read_scalars(Path(workdir))[f"{stage}/loss"]


def checkpoints_of(workdir):
    """{step: metadata}"""
    with Checkpoints(Path(workdir) / "checkpoints", read_only=True) as checkpoints:
        return {step: checkpoints.metadata(step) for step in checkpoints.steps()}


def same(found, expected, steps):
    assert {k: found[k] for k in steps} == pytest.approx({k: expected[k] for k in steps}, rel=1e-5)


VALIDATED = ("--config.train.eval_every=4", "--config.train.eval_examples=2")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    with Run(workdir, *VALIDATED) as run:
        run.finished()
    return workdir


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes, of which the second gets SIGTERM while step 5 runs."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    when = "if (me, done) == (1, 5): os.kill(os.getpid(), signal.SIGTERM)"
    often = "--config.train.checkpoint_every=4"
    with Run(workdir, *VALIDATED, often, processes=2, when=when) as run:
        run.finished()
    return workdir, run


@pytest.mark.slow
def test_two_processes_train_and_validate_as_one(alone, pair):
    workdir, _ = pair
    same(losses(workdir / "vae", "vae"), losses(alone / "vae", "vae"), [1, 2])
    same(losses(workdir), losses(alone), range(1, 7))
    assert len(set(losses(alone).values())) == 12
    expected, found = (read_scalars(folder) for folder in (alone, workdir))
    for name in ("validation/miou_present", "validation/pixel_accuracy"):
        assert list(found[name]) == [4]
        # A pixel between two classes may fall to either; two images have 512.
        assert found[name][4] == pytest.approx(expected[name][4], abs=0.01) and found[name][4] > 0


@pytest.mark.slow
def test_a_signal_to_one_stops_both_within_one_step_and_is_no_failure(pair):
    workdir, run = pair
    assert "stopped at step 6, checkpoint written" in run.output(0)
    assert "step 6/12" in run.output(0), "only the first process writes logs"
    assert run.output(1) == "SIGTERM: stopping after this step\n"
    assert len(list(workdir.glob("tensorboard/diffusion/events*"))) == 1
    assert sorted(checkpoints_of(workdir)) == [4, 6]
    for step, metadata in checkpoints_of(workdir).items():
        assert metadata["next_example"] == 8 * step
        assert metadata["code"].startswith("0.") and metadata["config"]["seed"] == 0


@pytest.mark.slow
def test_one_process_on_another_mesh_goes_on_where_two_stopped(alone, pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "run")
    with Run(tmp_path / "run", "--config.mesh.data=2", "--config.mesh.fsdp=4") as run:
        run.finished()
    assert "resuming at step 6, example 48" in run.output()
    same(losses(tmp_path / "run"), losses(alone), range(1, 13))


@pytest.mark.slow
def test_two_processes_fall_back_from_a_damaged_checkpoint_of_one(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tensorboard")
    newest = tmp_path / "run" / "checkpoints" / "12" / "state"
    for data in newest.glob("**/d/*"):  # all: what is read need not be in the largest
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with Run(tmp_path / "run", "--config.mesh.tensor=2", processes=2) as run:
        run.finished()
    assert re.search(r"12: damaged checkpoint, trying the one before", run.output(0))
    assert "resuming at step 10, example 80" in run.output(0) and run.output(1) == ""
    same(losses(tmp_path / "run"), losses(alone), [11, 12])


def started_from(pair, folder, when):
    """Two processes that go on from step 6 towards a step that no test reaches."""
    shutil.copytree(pair[0], folder / "run")
    return Run(folder / "run", "--config.train.steps=10000", processes=2, when=when)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_brings_the_other_down_with_a_clear_message(pair, tmp_path, victim):
    when = f"if (me, done) == ({victim}, 9): os.kill(os.getpid(), signal.SIGKILL)"
    with started_from(pair, tmp_path, when) as run:
        assert run.processes[victim].wait(1800) == -9
        died = time.monotonic()
        code = run.processes[1 - victim].wait(150)
        print(f"the other was down after {time.monotonic() - died:.1f} s with {code}")
        assert code not in (0, 2)
    last = run.output(1 - victim)
    assert "lost another process of this run" in last or "another task died" in last


@pytest.mark.slow
def test_an_error_in_one_process_is_told_and_returned_by_both(pair, tmp_path):
    when = "if (me, done) == (1, 9): raise UserError('x.png: unreadable')"
    with started_from(pair, tmp_path, when) as run:
        assert run.processes[1].wait(1800) == 2
        assert run.processes[0].wait(150) == 2
    assert run.output(1) == "error: x.png: unreadable\n"
    assert run.output(0).endswith("error: process 1 stopped: x.png: unreadable\n")


ASSEMBLED = """
    import json, sys
    import jax
    from segdiff_jax.parallel import processes
    processes.join()
    import numpy as np
    from jax.sharding import Mesh
    from segdiff_jax.config import Config, MeshConfig, TrainConfig
    from segdiff_jax.data import pipeline
    from segdiff_jax.text import vocabulary
    from segdiff_jax.parallel import mesh as meshes
    from segdiff_jax.parallel import placement

    class Numbered:
        vocabulary, novel = vocabulary.from_names(["a", "b"]), ()
        def __len__(self):
            return 24
        def __getitem__(self, index):
            return {"image": np.full((8, 8, 3), index, np.uint8),
                    "labels": np.zeros((8, 8), np.uint8), "name": ""}

    config = Config(train=TrainConfig(batch_size=8))
    config.data.image_size = (8, 8)
    cut = {str(sizes): meshes.make_mesh(MeshConfig(*sizes))
           for sizes in [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)]}
    mixed = np.array(jax.devices())[[0, 4, 1, 5, 2, 6, 3, 7]].reshape(8, 1, 1)
    cut["mixed"] = Mesh(mixed, meshes.AXES)
    whole = pipeline.train_batches(Numbered(), config, 0)
    expected = [next(whole)["image"][:, 0, 0, 0].tolist() for _ in range(6)]
    found = {"expected": expected}
    for name, mesh in cut.items():
        rows = meshes.local_rows(mesh, 8)
        batches = pipeline.train_batches(Numbered(), config, 0, 0, rows)
        found[name] = []
        for _ in range(6):
            local = next(batches)["image"]
            array = jax.make_array_from_process_local_data(
                meshes.batch_sharding(mesh), local, (8, *local.shape[1:]))
            found[name].append(processes.gathered(array)[:, 0, 0, 0].tolist())
    # What only both together hold, what both hold, and a shape.
    cut = meshes.put(np.arange(16.0).reshape(8, 2), meshes.batch_sharding(mesh))
    tree = {"cut": cut, "host": np.float32(3), "shape": jax.eval_shape(lambda: cut)}
    placed = placement.whole(tree, mesh)
    found["whole"] = [np.asarray(placed["cut"]).tolist(), float(placed["host"]),
                      placed["shape"] is tree["shape"]]
    second = processes.index() == 1
    found["flags"] = [processes.any_raised(second)(), processes.any_raised(False)(),
                      processes.all_agree(True), processes.all_agree(second)]
    print(json.dumps(found))
    with processes.together():
        pass
"""


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    log = tmp_path_factory.mktemp("assembled") / "log"
    with Started(["-c", textwrap.dedent(ASSEMBLED)], log, processes=2) as run:
        run.finished()
    return [
        next(json.loads(line) for line in run.output(number).splitlines() if line[:1] == "{")
        for number in range(2)
    ]


def test_batches_put_together_by_two_processes_are_those_of_one(assembled):
    for found in assembled:
        for mesh in ("(8, 1, 1)", "(2, 4, 1)", "(2, 2, 2)", "(1, 1, 8)", "mixed"):
            assert found[mesh] == found["expected"], mesh
        for epoch in (found["expected"][:3], found["expected"][3:]):
            assert sorted(sum(epoch, [])) == list(range(24))


def test_arrays_that_are_cut_over_processes_are_whole_on_each_afterwards(assembled):
    expected = np.arange(16.0).reshape(8, 2).tolist()
    assert [found["whole"] for found in assembled] == [[expected, 3.0, True]] * 2


def test_flags_of_single_processes_are_agreed_on(assembled):
    assert [found["flags"] for found in assembled] == [[True, False, True, False]] * 2


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES"),
        (dict(zip(processes.VARIABLES, ["a:1", "two", "0"], strict=True)), "two"),
        (dict(zip(processes.VARIABLES, ["a", "2", "0"], strict=True)), "host:port"),
        (dict(zip(processes.VARIABLES, ["a:1", "2", "2"], strict=True)), "the last is 1"),
    ],
)
def test_half_an_address_is_a_clear_error(given, named, monkeypatch):
    for name in processes.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("JAX_PLATFORMS")  # whether libtpu is installed or not
    with pytest.raises(UserError, match=named):
        processes.join()


LATE = """
    import os, sys, time
    from segdiff_jax import cli, waiting
    from segdiff_jax.parallel import processes
    waiting.FIRST_WORD, waiting.NEXT_WORD = 1.0, 1.0

    def main(argv):
        processes.join()
        me = processes.index()
        with processes.together():
            processes.barrier()
            if me == 1:
                with processes.at_work("sleeps well"):
                    time.sleep(6)
            processes.barrier()
            print("together", flush=True)
            time.sleep(600 * me)
            processes.barrier()

    cli.run(main)
"""


def test_a_process_that_does_not_come_is_named_and_ends_all(tmp_path, monkeypatch):
    monkeypatch.setenv(PROCESS, "3")
    with Started(["-c", textwrap.dedent(LATE)], tmp_path / "log", 2, devices=2) as run:
        assert run.wait(60) == [os.EX_TEMPFAIL] * 2
    said = run.logs[0].read_text()
    assert "waiting for process 1, which sleeps well for" in said  # longer than 3 s: it is at work
    assert (
        said.index("sleeps well") < said.index("together") < said.rindex("waiting for process 1 f")
    )
    last = "process 1: no answer for 3 s: see what it does and its log, or allow more with"
    assert said.splitlines()[-1] == f"error: {last} {PROCESS}=SECONDS"
    assert run.output(1).splitlines()[-1] == f"error: process 0 stopped: {last} {PROCESS}=SECONDS"
    assert "Traceback" not in said + run.output(1)


PREDICT = """
    from segdiff_jax import cli, predict, waiting
    waiting.FIRST_WORD, waiting.NEXT_WORD = 0.5, 1.0
    cli.run(predict.main)
"""


def test_a_command_whose_peers_never_start_ends_in_one_line(tmp_path):
    """Process 0 of two; and 1 of three, of which none is there."""
    started = []
    for number, size in ((0, 2), (1, 3)):
        port = free_port()
        environment = {
            **{"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(size)},
            **{"JAX_PROCESS_ID": str(number), "JAX_PLATFORMS": "cpu", PROCESS: "2"},
        }
        places = [f"--{name}={tmp_path / name}" for name in ("checkpoint", "images", "output")]
        command = [sys.executable, "-c", textwrap.dedent(PREDICT), *places, "--classes=sky; road"]
        environment = os.environ | environment
        process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment)
        started.append((process, f"process 0, which cannot be reached at 127.0.0.1:{port}"))
    for (process, _), whom in zip(started, ("process 1", started[1][1]), strict=True):
        out, error = process.communicate(timeout=120)
        assert process.returncode == os.EX_TEMPFAIL and not out, error
        *said, last = error.splitlines()
        assert last.startswith(f"error: {whom}: no answer for 2 s: start the same command in every")
        assert said and all(line.startswith(f"waiting for {whom} for") for line in said)
