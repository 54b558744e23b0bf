"""The launch scripts, against a stub of gcloud that records every call.

`ssh` calls either get a scripted answer (the supervise tests) or are really executed by bash, once
per worker, in a home directory of its own (so that quoting is tested where it matters: at the end).
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
COMMANDS = [name for name in SCRIPTS if name != "common.sh"]

# Called hundreds of times: it imports little.
GCLOUD = '''
import json, os, sys

here = os.path.dirname(os.path.abspath(__file__))
args = sys.argv[1:]
with open(f"{here}/calls.jsonl", "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0])] + args) + "\\n")


def answer(key, default=""):
    """The next scripted answer; the last one is repeated. "!text" fails with text on stderr."""
    with open(f"{here}/script.json") as file:
        script = json.load(file)
    queue = script.get(key, [default])
    text = queue.pop(0) if len(queue) > 1 else queue[0]
    with open(f"{here}/script.json", "w") as file:
        json.dump(script, file)
    if text.startswith("!"):
        sys.exit(text[1:])
    print(text)


def on_worker(number, command):
    import subprocess

    home = f"{here}/worker{number}"
    os.makedirs(home, exist_ok=True)
    env = dict(os.environ, HOME=home, TPU_WORKER_ID=str(number))
    return subprocess.run(["bash", "-c", command], cwd=home, env=env).returncode


def flag(name):
    return next(a for a in args if a.startswith(f"--{name}=")).removeprefix(f"--{name}=")


verb = " ".join(args[2:4])
if verb == "tpu-vm ssh":
    command = flag("command")
    if os.path.exists(f"{here}/execute"):
        numbers = range(2) if flag("worker") == "all" else [int(flag("worker"))]
        sys.exit(max(on_worker(number, command) for number in numbers))
    answer("status" if "on_worker.sh status" in command else "ssh")
else:
    answer(verb)
'''


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


class Cloud:
    """A machine with a stub of gcloud (and xpk, docker) first on PATH, and a filled-in env file."""

    def __init__(self, folder: Path):
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("gcloud", "xpk", "docker"):
            path = self.bin / name
            path.write_text(f"#!{sys.executable} -IS\n{GCLOUD}")
            path.chmod(0o755)
        self.script({})
        self.settings = {
            "PROJECT": "my-project",
            "ZONE": "us-west4-a",
            "BUCKET": "gs://my-bucket/",
            "TPU_NAME": "pod",
            "TPU_TYPE": "v5litepod-16",
            "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
            "CAPACITY": "spot",
            "REPO": "https://example.com/segdiff_jax.git",
            "REF": "main",
            "POLL_SECONDS": "0",
            "CLUSTER": "cluster",
            "NUM_SLICES": "2",
            "IMAGE": "registry/image:tag",
        }
        self.env_file = folder / "my env"

    def script(self, answers: dict[str, list[str]]) -> None:
        """Scripted answers by verb, such as "tpu-vm describe"; the last one is repeated."""
        (self.bin / "script.json").write_text(json.dumps(answers))

    def run(self, script: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
        lines = [
            f"{k}={v}" if v.startswith("(") else f"{k}={shlex.quote(v)}"
            for k, v in self.settings.items()
        ]
        self.env_file.write_text("\n".join(lines) + "\n")
        return subprocess.run(
            ["bash", str(LAUNCH / script), *args, "--env", str(self.env_file)],
            env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        path = self.bin / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self) -> list[str]:
        """What was done, one word per call: describe, create, delete, status, stop, setup, …"""
        words = []
        for call in self.calls():
            command = next((a for a in call if a.startswith("--command=")), "")
            for name in ("setup", "start", "status", "stop", "log"):
                if f"on_worker.sh {name}" in command:
                    words.append(name)
                    break
            else:
                words.append(call[4])
        return words


REPORT = "\n".join(f"segdiff-worker {n} {{}}" for n in range(4))
RUNNING, FINISHED, ABSENT, CRASHED, REJECTED, STOPPED = (
    REPORT.format(*[state] * 4)
    for state in ("running", "exited 0", "absent", "exited 1", "exited 2", "stopped")
)
READY = "READY\t4"
GONE = "!ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: Resource was not found"


def test_scripts_parse_are_strict_and_explain_themselves(cloud):
    for name in SCRIPTS:
        subprocess.run(["bash", "-n", LAUNCH / name], check=True)
        if name in COMMANDS:
            assert "\nset -euo pipefail\n" in (LAUNCH / name).read_text()
            result = cloud.run(name, "--help")
            assert result.returncode == 0
            assert f"{name} " in result.stdout and "set -euo" not in result.stdout
    assert cloud.calls() == []


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    scripts = [str(LAUNCH / name) for name in SCRIPTS]
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_env_example_names_every_variable_and_is_refused_until_filled_in(cloud):
    result = subprocess.run(
        ["bash", LAUNCH / "create.sh", "--env", LAUNCH / "env.example"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.endswith("env.example: PROJECT is empty; give it a value\n")
    example = (LAUNCH / "env.example").read_text()
    assert [k for k in cloud.settings if f"\n{k}=" not in example] == []


WHERE = ["--project=my-project", "--zone=us-west4-a"]


@pytest.mark.parametrize("capacity", ["on-demand", "queued-spot"])
def test_create_and_delete(capacity, cloud):
    cloud.settings["CREATE_ARGS"] = "('--labels=note=two words')"
    cloud.settings["CAPACITY"] = capacity
    assert cloud.run("create.sh").returncode == 0
    assert cloud.run("delete.sh").returncode == 0
    kind, version = "--accelerator-type=v5litepod-16", "v2-alpha-tpuv5-lite"
    extra = ["--quiet", "--labels=note=two words"]
    if capacity == "queued-spot":
        create = ["queued-resources", "create", "pod", "--node-id=pod", *WHERE, kind]
        create += [f"--runtime-version={version}", "--spot"]
        delete = ["queued-resources", "delete", "pod", *WHERE, "--quiet", "--force"]
    else:
        create = ["tpu-vm", "create", "pod", *WHERE, kind, f"--version={version}"]
        delete = ["tpu-vm", "delete", "pod", *WHERE, "--quiet"]
    tpus = ["gcloud", "compute", "tpus"]
    assert cloud.calls() == [[*tpus, *create, *extra], [*tpus, *delete]]


def test_bad_input_is_one_line_and_calls_nothing(cloud):
    for script, args, message in [
        ("create.sh", ["--capacity=spot"], "unknown argument '--capacity=spot'"),
        ("create.sh", ["extra"], "unknown argument 'extra'"),
        ("run.sh", [], "no run name given"),
        ("run.sh", ["a", "b"], "two run names"),
        ("run.sh", ["My Run"], "run name 'My Run': use lower-case"),
        ("run.sh", ["a", "--config.seed"], "write overrides as --config.seed=value"),
        ("run.sh", ["a", "--speed"], "unknown flag '--speed'"),
        ("tail.sh", ["a", "--worker", "first"], "--worker 'first'"),
        ("tail.sh", ["a", "--lines", "-1"], "--lines '-1'"),
        ("supervise.sh", ["../a"], "run name '../a'"),
        ("xpk.sh", ["fly"], "unknown action 'fly'"),
    ]:
        result = cloud.run(script, *args)
        assert result.returncode == 2 and message in result.stderr
        assert result.stderr.count("\n") == 1 and cloud.calls() == []
    cloud.settings["CAPACITY"] = "cheap"
    result = cloud.run("create.sh")
    assert result.returncode == 2 and "capacity 'cheap': choose" in result.stderr


def test_dry_run_prints_what_a_real_run_calls_and_calls_nothing(cloud):
    override = "--config.prompts.templates=a 'photo' of \"{class}\" $HOME"
    for script, args in [
        ("create.sh", []),
        ("setup.sh", []),
        ("run.sh", ["ade", override]),
        ("tail.sh", ["ade"]),
        ("delete.sh", []),
        ("supervise.sh", ["ade", override, "--delete"]),
        ("xpk.sh", ["cluster"]),
        ("xpk.sh", ["image"]),
        ("xpk.sh", ["run", "ade", override]),
    ]:
        result = cloud.run(script, *args, "--dry-run")
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stdout.splitlines() if not line.startswith("#")]
        for line in lines:
            assert shlex.split(line)[0] in ("gcloud", "xpk", "docker"), line
        assert lines and cloud.calls() == []
        if script == "run.sh":
            printed = [shlex.split(line) for line in lines]
    cloud.run("run.sh", "ade", override)
    assert printed == cloud.calls()


def test_supervise_dry_run_shows_the_whole_cycle(cloud):
    cloud.settings["CAPACITY"] = "queued-spot"
    result = cloud.run("supervise.sh", "ade", "--dry-run", "--delete")
    lines = [shlex.split(x) for x in result.stdout.splitlines() if not x.startswith("#")]
    for line in lines:  # replay what was printed, to name the steps
        subprocess.run(line, env={"PATH": f"{cloud.bin}:{os.environ['PATH']}"}, check=True)
    assert cloud.steps() == [
        *("describe", "describe", "delete", "create"),
        *("status", "stop", "setup", "start", "delete"),
    ]


# --- supervise -----------------------------------------------------------------------------------


def test_supervise_recreates_and_resumes_after_a_preemption(cloud):
    cloud.script(
        {
            "tpu-vm describe": [GONE, "CREATING", READY, READY, "PREEMPTED\t4", READY, READY],
            "status": [ABSENT, RUNNING, ABSENT, FINISHED],
        },
    )
    override = "--config.data.root=gs://a b/it's"
    result = cloud.run("supervise.sh", "ade", "--config", "configs/coco_stuff.py", override)
    assert result.returncode == 0, result.stderr
    first = ["stop", "setup", "start"]
    assert cloud.steps() == [
        *("describe", "create"),
        "describe",
        *("describe", "status", *first),
        *("describe", "status"),
        *("describe", "delete", "create"),
        *("describe", "status", *first),
        *("describe", "status"),
    ]
    starts = [c for c in cloud.calls() if any("on_worker.sh start" in a for a in c)]
    assert starts[0] == starts[1]
    command = next(a for a in starts[0] if a.startswith("--command=")).removeprefix("--command=")
    words = shlex.split(command.partition("on_worker.sh ")[2])
    assert words == [
        *("start", "ade", "gs://my-bucket/logs/ade", "env", ".venv/bin/python"),
        *("-m", "segdiff_jax.train", "--config", "configs/coco_stuff.py"),
        *("--workdir", "gs://my-bucket/runs/ade", override),
    ]
    assert "gs://my-bucket/runs/ade" in result.stderr  # where the result is
    assert "costs money" in result.stderr  # the machine is still there


END = ["describe", "status"]
AGAIN = [*END, "stop", "setup", "start"]
OFFLINE = "!ERROR: gcloud crashed (ConnectionError): Network is unreachable"
ONE_STOPPED = REPORT.format("exited 0", "exited 0", "stopped", "exited 0")
ONE_KILLED = REPORT.format("running", "running", "exited 137", "running")
GAVE_UP = REPORT.format("running", "exited 75", "exited 75", "exited 1")
THREE = RUNNING.rpartition("\n")[0]
PREEMPTED = [READY, READY, "PREEMPTED\t4", READY, READY, READY]
# name: (states of the TPU, reports of the run, flags, exit code, steps)
SUPERVISED = {
    "it is deleted at the end when asked": ([READY], [FINISHED], ["--delete"], 0, [*END, "delete"]),
    "an unknown state recreates nothing": (
        *([OFFLINE, OFFLINE, READY], [RUNNING, FINISHED], [], 0),
        ["describe"] * 2 + END * 2,
    ),
    "a silent worker is waited for": ([READY], [THREE, RUNNING, THREE], [], 1, END * 5 + ["log"]),
    "stopped by SIGTERM is resumed": ([READY], [STOPPED, FINISHED], [], 0, AGAIN + END),
    "one of four stopped, too": ([READY], [ONE_STOPPED, FINISHED], [], 0, AGAIN + END),
    "one crashed worker restarts all until the limit": (
        *([READY], [ONE_KILLED], ["--delete"], 1),
        AGAIN * 2 + [*END, "log", "delete"],
    ),
    "a preemption forgives earlier crashes": (PREEMPTED, [CRASHED] * 4 + [FINISHED], [], 0, None),
    "waiting in vain is started again": ([READY, READY], [GAVE_UP, FINISHED], [], 0, AGAIN + END),
    "bad input is not tried again": ([READY], [REJECTED], [], 2, [*END, "log"]),
}


@pytest.mark.parametrize("name", SUPERVISED)
def test_supervise(name, cloud):
    states, reports, flags, code, steps = SUPERVISED[name]
    cloud.script({"tpu-vm describe": states, "status": reports})
    result = cloud.run("supervise.sh", "ade", *flags, MAX_SILENT="3")
    assert result.returncode == code, result.stderr
    assert steps is None or cloud.steps() == steps
    assert ("in vain (1 of 3)" in result.stderr) == (GAVE_UP in reports)


def test_supervise_waits_in_the_queue_and_recreates_a_suspended_request(cloud):
    cloud.settings["CAPACITY"] = "queued-spot"
    waiting = ["WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDED"]
    states = {"tpu-vm describe": [GONE, GONE, GONE, READY], "queued-resources describe": waiting}
    cloud.script(states | {"status": [FINISHED]})
    assert cloud.run("supervise.sh", "ade").returncode == 0
    assert cloud.steps() == ["describe"] * 6 + ["delete", "create", *END]
    assert "--force" in cloud.calls()[6]


def test_refused_create_requests_are_repeated_up_to_the_limit(cloud):
    refusal = "!ERROR: There is no more capacity in the zone"
    cloud.script({"tpu-vm describe": [GONE], "tpu-vm create": [refusal]})
    cloud.settings["MAX_CREATE_FAILURES"] = "4"
    assert cloud.run("supervise.sh", "ade").returncode == 1
    assert cloud.steps() == ["describe", "create"] * 4


# --- on the workers, for real --------------------------------------------------------------------


@pytest.fixture
def pod(cloud, tmp_path):
    """`cloud` whose ssh runs the command on two "workers", and a repository for them to fetch."""
    (cloud.bin / "execute").touch()
    python = cloud.bin / "python3.11"
    # `python3.11 -m venv .venv`, and inside it pip and a python that stands in for the training.
    python.write_text(
        "#!/bin/bash\nset -eu\nmkdir -p .venv/bin\n"
        'printf \'#!/bin/bash\\nprintf "%%s\\\\n" "$*" >>../pip_calls\\n\' >.venv/bin/pip\n'
        f"printf '#!/bin/bash\\n. \"{cloud.bin}/training\"\\n' >.venv/bin/python\n"
        "chmod +x .venv/bin/*\n"
    )
    python.chmod(0o755)
    repo = tmp_path / "its repo"
    shutil.copytree(LAUNCH, repo / "launch", ignore=shutil.ignore_patterns("env"))
    (repo / "requirements.txt").write_text("jax==0.10.2\n")
    (repo / "pyproject.toml").write_text("[project]\n")
    cloud.repo = repo
    cloud.settings["REPO"] = str(repo)
    training(cloud, "exit 0")
    git(repo, "init", "-q", "-b", "main")
    commit(repo)
    yield cloud
    for path in cloud.bin.glob("worker*/segdiff_runs/*/pid"):  # left behind by a failed test
        pid = int(path.read_text())
        if Path(f"/proc/{pid}/cwd").exists() and str(cloud.bin) in os.readlink(f"/proc/{pid}/cwd"):
            os.killpg(pid, 9)


def training(pod, body: str) -> None:
    """What `python -m segdiff_jax.train` does: records its arguments, then `body`."""
    script = f'#!/bin/bash\nprintf "%s\\0" "$@" >../arguments\necho "loss of $NOTE"\n{body}\n'
    (pod.bin / "training").write_text(script)


def git(repo: Path, *args: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", repo, *who, *args], check=True)


def commit(repo: Path) -> None:
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "--allow-empty", "-m", "change")


def statuses(pod, *command: str) -> list[str]:
    """What each worker says of the run "ade"."""
    words = shlex.join(["bash", "launch/on_worker.sh", "status", "ade", *command])
    answers = []
    for number in range(2):
        home = pod.bin / f"worker{number}"
        answers.append(
            subprocess.run(
                ["bash", "-c", words],
                cwd=home / "segdiff_jax",
                env={**os.environ, "HOME": str(home), "TPU_WORKER_ID": str(number)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        )
    return [answer.removeprefix(f"segdiff-worker {n} ") for n, answer in enumerate(answers)]


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)


OVERRIDE = "--config.prompts.templates=a 'photo' of \"{class}\"; $(touch oops) `x` * \\ é"
COMMAND = ["env", "NOTE=two words", ".venv/bin/python", "-m", "segdiff_jax.train"]
COMMAND += ["--config", "configs/ade.py", "--workdir", "gs://my-bucket/runs/ade"]


def test_setup_is_idempotent_and_follows_the_code(pod):
    def installs() -> list[str]:
        path = pod.bin / "worker1" / "pip_calls"
        return path.read_text().splitlines()

    for _ in range(2):
        result = pod.run("setup.sh")
        assert result.returncode == 0, result.stderr
    once = ["install --quiet -r requirements.txt", "install --quiet .[tpu]"]
    assert installs() == once
    assert "worker 1: environment is current" in result.stdout

    (pod.repo / "requirements.txt").write_text("jax==0.10.3\n")
    commit(pod.repo)
    assert pod.run("setup.sh").returncode == 0
    assert installs() == once * 2
    checkout = pod.bin / "worker0" / "segdiff_jax"
    assert (checkout / "requirements.txt").read_text() == "jax==0.10.3\n"

    # After an interrupted setup, even the old code is set up again.
    pip = checkout / ".venv" / "bin" / "pip"
    good = pip.read_text()
    commit(pod.repo)
    pip.write_text("#!/bin/bash\nexit 1\n")
    assert pod.run("setup.sh").returncode != 0
    pip.write_text(good)
    git(pod.repo, "reset", "-q", "--hard", "HEAD~1")
    assert "worker 0: environment is ready" in pod.run("setup.sh").stdout


def test_runs_on_the_workers(pod):
    """One set-up, and a run of each kind: it ends, crashes, is stopped, loses its process."""
    pod.settings["WORKER_ENV"] = "('NOTE=two words')"
    assert pod.run("setup.sh").returncode == 0
    assert pod.run("run.sh", "ade", OVERRIDE).returncode == 0
    command = [*COMMAND, OVERRIDE]
    wait_until(lambda: statuses(pod, *command) == ["exited 0", "exited 0"])
    for number in range(2):
        home = pod.bin / f"worker{number}"
        arguments = (home / "arguments").read_text().split("\0")[:-1]
        assert arguments == command[3:]
        shown = pod.run("tail.sh", "ade", "--worker", str(number), "--no-follow").stdout
        assert f"[{number}] loss of two words\n" in shown
        assert not list(home.rglob("oops"))

    def uploads() -> list[str]:
        copies = [c for c in pod.calls() if c[1:3] == ["storage", "cp"]]
        return sorted(c[-1].rpartition("-")[0] for c in copies)

    logs = [f"gs://my-bucket/logs/ade/worker-{n}" for n in range(2)]
    wait_until(lambda: uploads() == logs)
    assert statuses(pod, *COMMAND) == ["absent", "absent"], "another command of this name"

    training(pod, "kill -KILL $$")
    pod.run("run.sh", "ade")
    wait_until(lambda: statuses(pod, *COMMAND) == ["exited 137", "exited 137"])

    def begun() -> None:
        wait_until(lambda: len(list(pod.bin.glob("worker*/ready"))) == 2)
        assert statuses(pod, *COMMAND) == ["running", "running"]
        for path in pod.bin.glob("worker*/ready"):
            path.unlink()

    # A training that checkpoints at SIGTERM and then exits with 0.
    training(
        pod, "sleep 60 &\ntrap 'echo checkpoint >>../saved; kill $!; exit 0' TERM\n>../ready\nwait"
    )
    assert pod.run("run.sh", "ade").returncode == 0
    begun()
    again = pod.run("run.sh", "ade", START_SECONDS="0")
    assert again.returncode != 0 and "worker 0: ade is already running here" in again.stderr
    assert pod.run("run.sh", "ade", "--stop").returncode == 0
    assert (pod.bin / "worker0" / "saved").read_text() == "checkpoint\n"
    assert statuses(pod, *COMMAND) == ["stopped", "stopped"]

    training(pod, ">../ready\nexec sleep 60")
    pod.run("run.sh", "ade")
    begun()
    for number in range(2):  # a power cut: nobody gets to write an exit code
        pid = int((pod.bin / f"worker{number}" / "segdiff_runs" / "ade" / "pid").read_text())
        os.killpg(pid, 9)
    wait_until(lambda: statuses(pod, *COMMAND) == ["stopped", "stopped"])


# --- xpk -----------------------------------------------------------------------------------------


def test_xpk(cloud):
    for args in (["cluster"], ["image"], ["run", "ade", OVERRIDE], ["stop", "ade"], ["delete"]):
        assert cloud.run("xpk.sh", *args).returncode == 0
    cluster, build, push, run, stop, delete = cloud.calls()
    where = ["--cluster=cluster", *WHERE]
    slices = ["--tpu-type=v5litepod-16", "--num-slices=2"]
    assert cluster == ["xpk", "cluster", "create", *where, *slices, "--spot"]
    assert build[:4] == ["docker", "build", "--file", str(LAUNCH / "Dockerfile")]
    assert build[4:] == ["--tag", "registry/image:tag", str(LAUNCH.parent)]
    assert push == ["docker", "push", "registry/image:tag"]
    assert run[:-1] == [
        *("xpk", "workload", "create", *where, *slices),
        *("--workload=ade", "--docker-image=registry/image:tag", "--max-restarts=100"),
    ]
    words = shlex.split(run[-1].removeprefix("--command="))
    assert words == ["env", "python", *COMMAND[3:], OVERRIDE]
    assert stop == ["xpk", "workload", "delete", *where, "--workload=ade", "--force"]
    assert delete == ["xpk", "cluster", "delete", *where]
