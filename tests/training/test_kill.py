"""SIGKILL at random moments, and starting again: the result is that of a run left in peace."""

import random
import signal
import time
from pathlib import Path

import jax
import pytest
from commands import Run
from test_stages import same_bits, state_of

STEPS = "--config.train.steps={}"
OFTEN = ("--config.train.checkpoint_every=1", "--config.train.keep_checkpoints=2")


def unfinished(workdir):
    """Checkpoints being written: Orbax renames the folder when it is complete."""
    return [p for p in Path(workdir).glob("**/checkpoints/*") if not p.name.isdecimal()]


def newest(workdir):
    """The number of checkpoints of both stages that are complete, by the newest of each."""
    folders = [Path(workdir) / "vae" / "checkpoints", Path(workdir) / "checkpoints"]
    steps = [[int(p.name) for p in f.glob("*") if p.name.isdecimal()] for f in folders]
    return sum(max(found, default=0) for found in steps)


def killed(workdir, arguments, moment, draw):
    """Starts the run and kills it; returns what was seen, or None if the run ended before.

    moment: "starting" (before the first new checkpoint), "writing" (a checkpoint is incomplete) or
    "training" (some time after a new checkpoint).
    """
    before, left = newest(workdir), set(unfinished(workdir))
    with Run(workdir, *arguments, devices=1) as run:
        process = run.processes[0]
        if moment == "starting":
            time.sleep(draw.uniform(0, 8))
        while process.poll() is None and moment != "starting":
            if moment == "writing" and set(unfinished(workdir)) - left and newest(workdir) > before:
                break
            if moment == "training" and newest(workdir) > before:
                break
            time.sleep(0.001)
        if moment != "starting":
            time.sleep(draw.uniform(0, 0.05 if moment == "writing" else 0.3))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            assert process.returncode == 0, run.output()
            return None
    return {"at": newest(workdir), "half written": len(set(unfinished(workdir)) - left)}


def check(folder, steps, moments, seed):
    draw, arguments = random.Random(seed), (STEPS.format(steps), *OFTEN)
    with Run(folder / "peace", *arguments, devices=1) as run:
        run.finished()
    seen = []
    for moment in moments:
        seen.append(killed(folder / "war", arguments, moment, draw))
        print(moment, seen[-1], flush=True)
    with Run(folder / "war", *arguments, devices=1) as run:
        run.finished()
    assert None not in seen, "a run ended before it was killed: give it more steps"
    assert seen[-1]["at"] > 1
    expected, found = (jax.device_get(state_of(folder / name)) for name in ("peace", "war"))
    assert int(found.step) == steps and same_bits(found, expected)
    return seen


@pytest.mark.slow
def test_killed_and_restarted_is_bit_for_bit_the_same(tmp_path):
    seen = check(tmp_path, 12, ["training", "writing", "writing"], seed=0)
    assert sum(kill["half written"] > 0 for kill in seen) >= 1


@pytest.mark.slow
def test_killed_at_twenty_moments_and_restarted_is_bit_for_bit_the_same(tmp_path):
    moments = ["starting"] * 5 + ["training"] * 6 + ["writing"] * 9
    random.Random(1).shuffle(moments)
    seen = check(tmp_path, 60, moments, seed=2)
    assert len(seen) == 20 and sum(kill["half written"] > 0 for kill in seen) >= 3
