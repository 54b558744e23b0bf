"""Commands of the package in processes of their own, on forced CPU devices."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

# Networks of a few thousand parameters on 16 × 16 pixels; both stages, from nothing.
CONFIG = """
    from segdiff_jax import config as c
    from segdiff_jax.models import presets

    presets.PRESETS["micro"] = presets.small((32,), (4, 8), 32)

    def get_config():
        return c.Config(
            data=c.DataConfig(
                source="scenes",
                image_size=(16, 16),
                scenes=c.ScenesConfig(train_examples=32, val_examples=4),
            ),
            model=c.ModelConfig(preset="micro"),
            optimizer=c.OptimizerConfig(
                learning_rate=1e-3, warmup_steps=2, decay_steps=50, ema_decay=0.9
            ),
            train=c.TrainConfig(
                steps=12, batch_size=8, checkpoint_every=2, keep_checkpoints=9, log_every=1
            ),
            vae=c.VAEConfig(steps=2, batch_size=8),
            sampler=c.SamplerConfig(steps=1, batch_size=25),
        )
"""

# What a test does to a run from inside: `when(done)` is called after each step is dispatched.
PATCHED = """
    import os, signal, sys
    from segdiff_jax import cli, train
    from segdiff_jax.errors import UserError
    from segdiff_jax.training.telemetry import Telemetry

    me, step = int(os.environ.get("JAX_PROCESS_ID", 0)), Telemetry.step

    def patched(self, done, metrics):
        if self.stage == "diffusion":
            when(done)
        return step(self, done, metrics)

    Telemetry.step = patched
    {when}
    cli.run(train.main)
"""


class Started:
    """`arguments` of Python in `processes` processes that find each other, `devices` between them.

    log: what the names of their log files begin with.
    """

    def __init__(self, arguments, log, processes=1, devices=8):
        command = [sys.executable, *arguments]
        shared = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
            "PYTHONUNBUFFERED": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.logs, self.processes, port = [], [], free_port()
        for number in range(processes):
            together = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
            self.logs.append(Path(f"{log}-{port}-{number}.log"))
            with self.logs[-1].open("wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=shared | (together if processes > 1 else {}),
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, timeout=1800):
        """The exit codes, in order."""
        return [process.wait(timeout) for process in self.processes]

    def output(self, number=0):
        """What a process wrote, but for the collectives' greetings and words about waiting."""
        lines = self.logs[number].read_text(errors="replace").splitlines(keepends=True)
        mine = [line for line in lines if "peer ranks" not in line]
        return "".join(line for line in mine if not line.startswith("waiting for "))

    def finished(self):
        """Waits for success."""
        codes = self.wait()
        assert codes == [0] * len(codes), "\n".join(map(self.output, range(len(codes))))
        return self


class Run(Started):
    """One start of a training.

    when: body of `when(done)`, in which `me` is the number of the process.
    """

    def __init__(self, workdir, *overrides, processes=1, devices=8, when=None):
        config = Path(workdir).parent / "config.py"
        config.write_text(textwrap.dedent(CONFIG))
        arguments = ["-m", "segdiff_jax.train"]
        if when:
            function = f"def when(done):\n{textwrap.indent(textwrap.dedent(when), '    ')}"
            arguments = ["-c", textwrap.dedent(PATCHED).format(when=function)]
        arguments += ["--config", str(config), "--workdir", str(workdir), *overrides]
        super().__init__(arguments, workdir, processes, devices)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
