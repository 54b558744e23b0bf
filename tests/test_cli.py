"""Exit codes, and configs from the command line as a user meets them."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segdiff_jax import cli, evaluate, export, predict, train
from segdiff_jax.config import Config
from segdiff_jax.errors import UserError
from segdiff_jax.stages import get

GOOD = """
from segdiff_jax.config import Config

def get_config(size="small"):
    config = Config()
    config.data.source = "scenes"
    config.vae.steps = 5
    config.train.steps = 7 if size == "small" else 70
    return config
"""


@pytest.fixture
def path(tmp_path) -> str:
    (tmp_path / "good.py").write_text(GOOD)
    return str(tmp_path / "good.py")


def _error(*args) -> str:
    with pytest.raises(UserError) as caught:
        cli.load_config(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_file_alone(path):
    config = cli.load_config(path)
    assert (config.train.steps, config.data.source) == (7, "scenes")
    assert cli.load_config(path + ":large").train.steps == 70


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("seed=3", 3),
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("optimizer.clip_norm=2", 2.0),
        ("data.augment.flip=false", False),
        ("codec.closed=True", True),
        ("data.image_size=64,32", (64, 32)),
        ("data.image_size=(64, 32)", (64, 32)),
        ("data.root=/a b/c,d=e", "/a b/c,d=e"),
        ("data.root=123", "123"),
        ("init_from=", ""),
        ("mesh.data=-1", -1),
        ("prompts.templates=a photo of a {class}, outdoors", ("a photo of a {class}, outdoors",)),
        ("prompts.templates={class},b", ("{class},b",)),
        ("prompts.templates=('a {class}', '{class}')", ("a {class}", "{class}")),
        *(("data.ignore_ids=()", ()), ("data.ignore_ids=0", (0,))),
        *(("data.ignore_ids=0,255", (0, 255)), ("data.ignore_ids=(65535,)", (65535,))),
    ],
)
def test_override(path, flag, value):
    folder = ["--config.data.source=folder", "--config.data.root=x"]
    got = get(cli.load_config(path, [*folder, f"--config.{flag}"]), flag.split("=")[0])
    assert got == value and type(got) is type(value)


def test_only_the_named_key_changes(path):
    before, after = cli.load_config(path), cli.load_config(path, ["--config.train.steps=9"])
    after.train.steps = before.train.steps
    assert dataclasses.asdict(before) == dataclasses.asdict(after)
    assert Config().train.steps == 25_000


def test_repeated_flags(path):
    flags = ["seed=1", "data.image_size=8,8", "prompts.templates={class}"]
    flags += ["seed=2", "data.image_size=16,24", "prompts.templates=b {class}"]
    config = cli.load_config(path, [f"--config.{flag}" for flag in flags])
    assert (config.seed, config.data.image_size) == (2, (16, 24))  # the last one counts
    assert config.prompts.templates == ("{class}", "b {class}")  # but templates add up


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--config.train.step=5", ["--config.train.step:", "did you mean config.train.steps?"]),
        ("--config.batch_size=5", ["no such key", "config.train.batch_size"]),
        ("--config.trian.keep_checkpoints=5", ["did you mean config.train.keep_checkpoints"]),
        ("--config.qqqqqq=5", ["no such key", "--help"]),
        ("--config.seed.x=5", ["--config.seed.x: no such key"]),
        ("--config.=5", ["no such key"]),
        ("--config.data.image_size[0]=5", ["did you mean config.data.image_size?"]),
        ("--config.data=5", ["is a group of keys", "--config.data.source"]),
        ("--config.train.steps=many", ["--config.train.steps=many", "int", "steps=25000"]),
        ("--config.train.steps=1.5", ["must be int"]),
        ("--config.train.steps=", ["must be int"]),
        ("--config.optimizer.beta1=x", ["must be float", "beta1=0.9"]),
        ("--config.optimizer.beta1=nan", ["must be float"]),
        ("--config.codec.closed=maybe", ["must be bool", "closed=false"]),
        ("--config.data.ignore_ids=-1", ["config.data.ignore_ids", "at least 0"]),
        ("--config.data.ignore_ids=a", ["tuple[int, ...]", "ignore_ids=255"]),
        ("--config.data.mask_suffix=_mask", ["config.data.mask_suffix", "source=folder"]),
        ("--config.data.exif=turn", ["config.data.exif='turn'", "apply, ignore"]),
        ("--config.data.image_size=96", ["tuple[int, int]", "image_size=96,128"]),
        ("--config.data.image_size=96,12.5", ["tuple[int, int]"]),
        ("--config.data.image_size=a,b", ["tuple[int, int]"]),
        ("--config.data.image_size=1,2,3", ["tuple[int, int]"]),
        ("--config.data.image_size=(1,", ["tuple[int, int]"]),
        ("--config.prompts.templates=()", ["tuple[str, ...]"]),
        ("--config.stage=x", ["config.stage='x'", "vae"]),
        ("--config.seed", ["write it as --config.KEY=VALUE"]),
    ],
)
def test_bad_override_is_one_helpful_line(path, flag, parts):
    message = _error(path, [flag])
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "flag",
    [
        *("data.image_size=0,0", "data.image_size=-8,8", f"data.image_size={10**30},8"),
        *("data.image_size=True,True", "data.image_size=[16]", "data.image_size=" + "[" * 3000),
        *("seed=-1", f"seed={10**30}", "train.eval_examples=0", "data.scenes.train_examples=0"),
        *("data.scenes.val_examples=0", "data.scenes.max_shapes=0", "vae.batch_size=0"),
        *("optimizer.beta1=1.5", "optimizer.beta2=1", "optimizer.warmup_steps=-5"),
        *("noise.strength=-1", "sampler.shortlist=-3", "data.workers=-1", "vae.kl_weight=-1"),
        *("optimizer.clip_norm=0", "optimizer.epsilon=0", "optimizer.accumulation=0"),
        *(f"train.batch_size={10**30}", "train.batch_size=0", "train.batch_size=true"),
        *("train.steps=1e3", "train.steps=1e30", "train.steps=nan", f"train.steps={'9' * 5000}"),
        *("optimizer.learning_rate=nan", "optimizer.learning_rate=inf"),
        *("optimizer.learning_rate=true", f"optimizer.learning_rate={'9' * 400}"),
        *("prompts.templates=", "prompts.templates=()", "prompts.templates=a photo of {klass}"),
        *("diffusion.beta_start=0", "diffusion.beta_end=2", "diffusion.num_train_timesteps=1"),
        *("diffusion.prediction_type=zzz", "data.root=a\0b", "data.root=caf\udce9"),
        *("codec.threshold=5", "codec.classes_per_pass=256", "codec.classes_per_pass=4"),
        *("data.augment.min_scale=0", "data.augment.views=-1", "data.max_unreadable=2"),
        *("train.checkpoint_every=0", "train.keep_checkpoints=0", "train.log_every=0"),
        *("sampler.steps=0", "sampler.steps=1001", "sampler.ensemble=0", "mesh.data=0"),
        *("init_variant=fp16", "optimizer.ema_decay=1", "vae.mask_share=1.1"),
    ],
)
def test_nonsense_is_one_short_line_that_names_the_key(path, flag):
    message = _error(path, [f"--config.{flag}"])
    assert f"config.{flag.split('=')[0]}" in message and len(message) < 400, message
    assert "must" in message or "choose one of" in message or "cannot be learnt" in message


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        ("train.steps=5", "config.vae.steps"),
        ("train.batch_size=4", "config.vae.batch_size"),
        ("optimizer.learning_rate=1e-4", "config.vae.learning_rate"),
        ("optimizer.method=muon", "config.vae.optimizer"),
        ("optimizer.ema_decay=0.9", "config.vae.ema_decay"),
        ("optimizer.accumulation=2", "no part in the VAE stage"),
    ],
)
def test_the_vae_stage_refuses_what_it_does_not_use(path, flag, instead):
    overrides = [f"--config.{flag}", "--config.stage=vae"]
    message = _error(path, overrides)
    assert f"config.{flag.split('=')[0]}" in message and instead in message
    assert cli.load_config(
        path, ["--config.vae.steps=3", "--config.optimizer.beta1=0.5", *overrides[1:]]
    )
    assert cli.load_config(path, overrides[:1])


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("x = 1", ["has no get_config()"]),
        ("get_config = 3", ["has no get_config()"]),
        ("def get_config(:", ["line 1"]),
        ("import nothing_called_this", ["line 1", "ModuleNotFoundError", "nothing_called_this"]),
        ("def get_config():\n    return {}['a']", ["line 2", "KeyError"]),
        ("def get_config():\n    open('/no/such')", ["line 2", "FileNotFoundError"]),
        ("def get_config():\n    return {'seed': 1}", ["returned dict", "Config"]),
        ("def get_config():\n    pass", ["returned NoneType"]),
        (GOOD.replace("train.steps", "train.step"), ["config.train.step:", "config.train.steps"]),
        (GOOD.replace("config.data.source", "config.source"), ["config.data.source?"]),
        (GOOD.replace("7 if", "'7' if"), ["config.train.steps='7'", "must be int"]),
        (GOOD.replace("7 if", "True if"), ["config.train.steps=True", "must be int"]),
        (GOOD.replace("config.data.source =", "config.data ="), ["must be DataConfig"]),
        (GOOD.replace("7 if", "0 if"), ["config.train.steps=0", "at least 1"]),
    ],
)
def test_bad_config_file(tmp_path, source, parts):
    (tmp_path / "bad.py").write_text(source)
    message = _error(str(tmp_path / "bad.py"))
    assert all(part in message for part in parts), message


def test_missing_config_file_and_unwanted_argument(path, tmp_path):
    for spec in (str(tmp_path / "none.py"), str(tmp_path), "", str(tmp_path / "none.py:x")):
        assert "no such file" in _error(spec)
    Path(path).write_text(GOOD.replace('size="small"', "").replace('size == "small"', "1"))
    assert "takes 0 positional arguments" in _error(path + ":large")


def test_split():
    argv = ["--config", "c.py", "--config.seed=1", "--workdir", "w", "--config.train.steps", "5"]
    argv += ["--config.codec.closed", "--noconfig.data.augment.flip", "--", "--config.seed=9"]
    overrides, rest = cli.split_config_flags(argv)
    assert rest == ["--config", "c.py", "--workdir", "w", "--", "--config.seed=9"]
    assert overrides == [
        "--config.seed=1",
        "--config.train.steps=5",
        "--config.codec.closed=true",
        "--config.data.augment.flip=false",
    ]
    for argv, message in (
        (["--config.train.steps"], "needs a value: for example --config.train.steps=25000"),
        (["--config.train.stepz", "5"], "did you mean config.train.steps"),
        (["--noconfig.seed"], "only a boolean"),
    ):
        with pytest.raises(UserError, match=message):
            cli.split_config_flags(argv)


def test_help_lists_every_key_with_its_comment():
    text = cli.config_help()
    keys = [line.split()[0] for line in text.splitlines()[1:] if line]

    def count(node) -> int:
        values = [getattr(node, f.name) for f in dataclasses.fields(node)]
        return sum(count(v) if dataclasses.is_dataclass(v) else 1 for v in values)

    assert len(keys) == len(set(keys)) == count(Config())
    (line,) = [line for line in text.splitlines() if line.startswith("  data.image_size ")]
    assert "tuple[int, int], (96, 128)" in line and "(height, width)" in line
    (line,) = [line for line in text.splitlines() if line.startswith("  noise.kind ")]
    assert line.endswith(" (annealed, multires, gaussian)")
    parser = cli.parser("segdiff_jax.x", "what it does", text)
    assert text in parser.format_help() and "python -m segdiff_jax.x" in parser.format_help()


def _exit(main, capsys, argv=()):
    with pytest.raises(SystemExit) as caught:
        cli.run(main, list(argv))
    return caught.value.code, capsys.readouterr()


def test_exit_codes(capsys):
    def fails(argv):
        raise UserError("a.jpg: broken:\nfetch it again")

    def full(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "out.png")

    def parses(argv):
        cli.parser("segdiff_jax.x", "").parse_args(argv)

    assert _exit(lambda argv: None, capsys) == (0, ("", ""))
    assert _exit(fails, capsys) == (2, ("", "error: a.jpg: broken: fetch it again\n"))
    code, output = _exit(full, capsys)
    assert code == 2 and "the disk is full (out.png)" in output.err
    code, output = _exit(parses, capsys, ["--flag"])
    assert code == 2 and output.err.count("\n") == 1
    assert "--flag" in output.err and "python -m segdiff_jax.x --help" in output.err
    assert _exit(parses, capsys, ["--help"])[0] == 0

    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        cli.run(lambda argv: 1 / 0, [])


@pytest.mark.parametrize("count", [1, 100_000])
def test_a_reader_that_has_had_enough(count):
    """As of `| head -c 5`: neither a traceback nor "Exception ignored" when Python ends."""
    code = f"from segdiff_jax import cli; cli.run(lambda argv: print('x' * {count}), [])"
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (run.returncode, run.stderr) == (141, b"")


def test_a_broken_pipe_that_is_not_stdout_is_no_quiet_end():
    code = "from segdiff_jax import cli\ndef main(argv): raise BrokenPipeError\ncli.run(main, [])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert run.returncode == 1 and b"BrokenPipeError" in run.stderr


def test_interrupt_of_a_real_process():
    # A process started in the background of a script inherits an ignored SIGINT.
    code = (
        "import signal, time\nfrom segdiff_jax.cli import run\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def main(argv):\n    print('ready', flush=True)\n    time.sleep(60)\nrun(main, [])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.strip() == "interrupted"


@pytest.mark.parametrize("key", ["data.root", "data.vocabulary", "init_from"])
def test_paths_of_the_config(path, tmp_path, monkeypatch, key):
    """On the command line and in the file alike."""
    for value, says in (
        (" ", "an empty path: is a shell variable not set?"),
        ("s3://b/x", "s3:// is not supported, only local paths and gs://"),
        ("gs:/b/x", "is written gs://BUCKET/PATH"),
    ):
        error = _error(path, [f"--config.{key}={value}"])
        assert f"config.{key}" in error and says in error
    with open(path, "a") as file:
        file.write(
            f"\nmake = get_config\ndef get_config():\n    c = make()\n    c.{key} = 'x://y'\n"
        )
        file.write("    return c\n")
    assert f"config.{key}: x://y: x:// is not supported" in _error(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = cli.load_config(path, [f"--config.{key}=~/sd"])
    assert f"{tmp_path}/sd" in str(dataclasses.asdict(config))


def test_a_path_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert cli.path("~/x") == "/home/me/x"
    (tmp_path / "~").mkdir()
    assert cli.path("~/x") == "~/x", "a folder of that name"
    assert cli.path(" a/") == " a/" and cli.path("gs://b/x") == "gs://b/x"


FLAGS = [
    *((predict, flag) for flag in ("--images", "--output", "--checkpoint")),
    *((evaluate, flag) for flag in ("--output", "--checkpoint", "--config")),
    *((export, flag) for flag in ("--output", "--checkpoint")),
    *((train, flag) for flag in ("--workdir", "--config")),
]


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_places_that_are_none(command, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value, says in (
        ("", "an empty path: is a shell variable"),
        (" \t", "an empty path: is a shell variable"),
        ("s3://bucket/x", "s3:// is not supported, only local paths and gs://"),
        ("http:///x.png", "http:// is not supported, only local paths and gs://"),
        ("file:///tmp/x", "leave file:// out"),
        ("gs://", "gs://BUCKET/PATH"),
        ("gs:/bucket/x", "gs://BUCKET/PATH"),
        ("GS://bucket/x", "gs://BUCKET/PATH"),
    ):
        with pytest.raises(UserError) as caught:
            command.main([flag, value])
        message = str(caught.value)
        assert f"argument {flag}: " in message and says in message and "\n" not in message
    assert not os.listdir(tmp_path)
