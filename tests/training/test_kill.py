"""SIGKILL at random moments, and starting again: the result is that of a run left in peace."""

import os
import random
import signal
import time
from pathlib import Path

import jax
import pytest
from commands import Run
from written import same_bits, state_of

STEPS = "--config.train.steps={}"
OFTEN = ("--config.train.checkpoint_every=1", "--config.train.keep_checkpoints=2")
SELDOM = ("--config.train.checkpoint_every=1000",)


def unfinished(workdir, since):
    """Checkpoints being written since that time: Orbax renames the folder when it is complete.

    By time, because the next start removes what is left and may write under the same name.
    """
    return [p for p in saved(workdir) if not p.name.isdecimal() and modified(p) >= since]


def saved(workdir):
    """What lies in the checkpoint folders of both stages; not below, where old ones vanish."""
    folders = [Path(workdir) / stage / "checkpoints" for stage in ("vae", ".")]
    return [folder / name for folder in folders if folder.exists() for name in os.listdir(folder)]


def modified(path):
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # complete, in this very moment
        return 0.0


def newest(workdir):
    """The number of checkpoints of both stages that are complete, by the newest of each."""
    steps: dict[Path, int] = {}
    for path in saved(workdir):
        if path.name.isdecimal():
            steps[path.parent] = max(steps.get(path.parent, 0), int(path.name))
    return sum(steps.values())


def killed(workdir, arguments, moment, draw, startup):
    """Starts the run and kills it; returns what was seen, or None if the run ended before.

    moment: "starting" (somewhere in the `startup` seconds before the first new checkpoint),
    "writing" (a checkpoint is incomplete) or "training" (some time after some new checkpoints).
    """
    before, begun = newest(workdir), time.time()
    wanted = before + (draw.randint(1, 5) if moment == "training" else 1)
    with Run(workdir, *arguments, devices=1) as run:
        process = run.processes[0]
        if moment == "starting":
            time.sleep(draw.uniform(0, startup))
        took = None
        while process.poll() is None and moment != "starting":
            if took is None and newest(workdir) > before:
                took = time.time() - begun
            if newest(workdir) >= wanted and (moment == "training" or unfinished(workdir, begun)):
                break
            time.sleep(0.001)
        if moment != "starting":
            time.sleep(draw.uniform(0, 0.05 if moment == "writing" else 0.3))
        at = time.time() - begun
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            assert process.returncode == 0, run.output()
            return None
    return {
        "moment": moment,
        "seconds": round(at, 2),
        "startup": took,
        "at": newest(workdir),
        "half written": len(unfinished(workdir, begun)),
    }


def check(folder, steps, moments, seed):
    folder = folder / "g [x] 10%20*?#é"
    folder.mkdir()
    draw, arguments = random.Random(seed), (STEPS.format(steps), *OFTEN)
    begun = time.time()
    with Run(folder / "peace", STEPS.format(steps), *SELDOM, devices=1) as run:
        run.finished()
    startup, seen = min(map(modified, saved(folder / "peace"))) - begun, []
    for moment in moments:
        seen.append(killed(folder / "war", arguments, moment, draw, startup))
        print(seen[-1], flush=True)
        assert seen[-1] is not None, "the run ended before it was killed: give it more steps"
        startup = seen[-1]["startup"] or startup  # shorter now that programs are cached
    with Run(folder / "war", STEPS.format(steps), *SELDOM, devices=1) as run:
        run.finished()
    assert seen[-1]["at"] > 1
    expected, found = (jax.device_get(state_of(folder / name)) for name in ("peace", "war"))
    assert int(found.step) == steps and same_bits(found, expected)
    return seen


FULL = """
    import pathlib, resource, signal, time
    if done == 4:
        workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
        while not (workdir / "checkpoints" / "2").exists():
            time.sleep(0.05)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_sentence_at_the_end_and_costs_no_checkpoint(tmp_path):
    with Run(tmp_path / "run", "--config.train.log_every=100", when=FULL, devices=1) as run:
        assert run.wait() == [2]
    *before, last = run.output().splitlines()
    assert last.startswith(f"error: {tmp_path}/run/checkpoints: cannot write checkpoints: ")
    assert "File too large (checkpoint 2 is kept)" in last
    assert "Traceback" not in "".join(before) and len(before) < 30
    assert not (tmp_path / "run" / "lock.json").exists()
    assert int(jax.device_get(state_of(tmp_path / "run")).step) == 2


@pytest.mark.slow
def test_killed_at_twenty_moments_and_restarted_is_bit_for_bit_the_same(tmp_path):
    moments = ["starting"] * 5 + ["training"] * 6 + ["writing"] * 9
    random.Random(1).shuffle(moments)
    seen = check(tmp_path, 60, moments, seed=2)
    assert len(seen) == 20 and sum(kill["half written"] > 0 for kill in seen) >= 3
