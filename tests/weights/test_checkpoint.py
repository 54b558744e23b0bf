import logging
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from segdiff_jax.errors import UserError
from segdiff_jax.weights.checkpoint import Checkpoints
from segdiff_jax.weights.orbax_faults import silence

rng = np.random.default_rng(0)
KERNEL = rng.normal(size=(300, 40)).astype(np.float32)  # large enough for a data file of its own


def make_state(value, width=40):
    params = {
        "blocks": {0: {"kernel": KERNEL[:, :width] + value}, 10: {"bias": jnp.ones(3) * value}},
        "half": jnp.full((4,), value, jnp.bfloat16),
    }
    params = jax.tree.map(jnp.asarray, params)
    return {
        "params": params,
        "optimizer": optax.adamw(1e-3).init(params),
        "ema": params,
        "step": jnp.asarray(value, jnp.int32),
    }


def abstract(state):
    return jax.eval_shape(lambda: state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Steps 10 and 20, written by a manager that is closed again."""
    folder = tmp_path_factory.mktemp("written") / "c"
    with Checkpoints(folder, best_metric="miou") as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, make_state(step), {"example": step * 32}, {"miou": 0.5})
    return folder


@pytest.fixture
def two(written, tmp_path):
    return shutil.copytree(written, tmp_path / "c")


def test_round_trip_keeps_values_containers_integer_keys_and_metadata(two):
    checkpoints = Checkpoints(two, read_only=True)
    assert checkpoints.latest_step() == 20
    state, metadata = checkpoints.restore(abstract(make_state(0)))
    assert_same(state, make_state(20))
    assert metadata == {"example": 640} == checkpoints.metadata()
    older, metadata = checkpoints.restore(abstract(make_state(0)), step=10)
    assert_same(older, make_state(10))
    assert metadata == {"example": 320} == checkpoints.metadata(10)
    part, _ = checkpoints.restore({"ema": abstract(make_state(0))["ema"]})
    assert_same(part, {"ema": make_state(20)["ema"]})


def test_a_checkpoint_with_nan_is_passed_over_or_named(two, caplog):
    checkpoints = Checkpoints(two)
    state = make_state(30)
    state["ema"]["blocks"][10]["bias"] = jnp.array([1.0, jnp.nan, 1.0])
    checkpoints.save(30, state, {"example": 960})
    checkpoints.close()
    reader = Checkpoints(two, read_only=True)
    with pytest.raises(UserError, match="ema/blocks/10/bias holds NaN or infinity"):
        reader.restore(abstract(make_state(0)), step=30)
    restored, _ = reader.restore(abstract(make_state(0)))
    assert_same(restored, make_state(20))
    assert "ema/blocks/10/bias holds NaN or infinity" in caplog.text


def test_saving_does_not_see_what_the_next_step_does_to_donated_buffers(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = {"x": jax.device_put(jnp.arange(1 << 20, dtype=jnp.float32))}
    checkpoints.save(1, state, {})
    jax.block_until_ready(step(state))
    restored, _ = checkpoints.restore({"x": jax.ShapeDtypeStruct((1 << 20,), jnp.float32)})
    np.testing.assert_array_equal(restored["x"], np.arange(1 << 20))


@pytest.mark.parametrize(
    ("scores", "kept", "best"),
    [
        ({1: 0.1, 2: 0.9, 3: float("nan"), 4: 0.3, 5: None, 6: 0.2}, [2, 5, 6], 2),
        ({4: None, 5: None, 6: None}, [5, 6], None),
    ],
)
def test_last_n_and_the_best_are_kept(tmp_path, scores, kept, best):
    with Checkpoints(tmp_path, keep=2, best_metric="miou") as checkpoints:
        for step, score in scores.items():
            metrics = None if score is None else {"miou": score, "loss": 1.0}
            checkpoints.save(step, {"x": jnp.zeros(2)}, {}, metrics)
        checkpoints.wait()
        assert checkpoints.steps() == kept
        assert checkpoints.best_step() == best
    checkpoints = Checkpoints(tmp_path, keep=2, best_metric="miou")  # also after a restart
    checkpoints.save(7, {"x": jnp.zeros(2)}, {})
    checkpoints.wait()
    assert checkpoints.steps() == ([] if best is None else [best]) + [6, 7]


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for value in (1.0, 2.0):
        checkpoints.save(5, {"x": jnp.asarray(value)}, {"value": value})
    restored, metadata = checkpoints.restore({"x": jax.ShapeDtypeStruct((), jnp.float32)})
    assert (float(restored["x"]), metadata) == (1.0, {"value": 1.0})


def damage(path, how):
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "removed":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "half":
        path.write_bytes(content[:middle])
    else:
        flipped = bytes([content[middle] ^ 0xFF])
        path.write_bytes(content[:middle] + flipped + content[middle + 1 :])


def largest(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize(
    ("file", "how"),
    [
        *(("data", "removed"), ("data", "one byte flipped")),
        *(("state/manifest.ocdbt", "half"), ("state/manifest.ocdbt", "one byte flipped")),
        *(("state/_METADATA", "empty"), ("state/_METADATA", "one byte flipped")),
    ],
)
def test_damaged_newest_gives_a_warning_and_the_one_before(two, file, how, caplog):
    damage(largest(two / "20") if file == "data" else two / "20" / file, how)
    checkpoints = Checkpoints(two, best_metric="miou")
    with caplog.at_level(logging.WARNING, "segdiff_jax"):
        state, metadata = checkpoints.restore(abstract(make_state(0)))
    assert_same(state, make_state(10))
    assert metadata == {"example": 320}
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("segdiff_jax")]
    assert len(warnings) == 1 and str(two / "20") in warnings[0]

    # The run goes on from 10 and passes 20 again: the damaged one must not stand in its way.
    for step in (15, 20):
        checkpoints.save(step, make_state(step), {"example": step})
    checkpoints.close()
    state, metadata = Checkpoints(two).restore(abstract(make_state(0)))
    assert_same(state, make_state(20))
    assert metadata == {"example": 20}


ABANDONED = """
    import types

    @types.coroutine
    def pause():
        yield

    async def read():
        try:
            await pause()
        finally:
            raise Exception("while reading")

    reading = read()
    reading.send(None)
    del reading
"""


def test_reads_that_orbax_abandons_after_a_failure_leave_no_traceback(two, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: told.append(str(found.exc_value)))
    silence.cache_clear()
    Checkpoints(two, read_only=True)
    silence.cache_clear()
    for file, expected in (("orbax/checkpoint/a.py", []), ("mine.py", ["while reading"])):
        exec(compile(textwrap.dedent(ABANDONED), file, "exec"), {})
        assert told == expected


def test_damaged_metadata_counts_as_damage_and_damaged_metrics_do_not(two):
    (two / "20" / "metrics" / "metrics").write_text('{"mi')
    checkpoints = Checkpoints(two, best_metric="miou")
    assert checkpoints.metadata() == {"example": 640}
    checkpoints.close()
    (two / "20" / "metadata" / "metadata").write_text('{"us')
    assert Checkpoints(two, best_metric="miou").metadata() == {"example": 320}


def test_no_readable_checkpoint_is_one_clear_line(two, tmp_path):
    (tmp_path / "empty").mkdir()
    for step in ("10", "20"):
        damage(largest(two / step), "half")
    for directory in (two, tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(UserError, match=str(directory)) as error:
            Checkpoints(directory, read_only=True).restore(abstract(make_state(0)))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "missing").exists()
    with pytest.raises(UserError, match="damaged"):
        Checkpoints(two, read_only=True).restore(abstract(make_state(0)), step=20)
    with pytest.raises(UserError, match=r"no checkpoint of step 15 \(there are: 10, 20\)"):
        Checkpoints(two, read_only=True).restore(abstract(make_state(0)), step=15)


def test_a_half_written_checkpoint_is_not_taken_for_a_whole_one(two):
    unfinished = two / "30.orbax-checkpoint-tmp"
    (two / "20").rename(unfinished)
    checkpoints = Checkpoints(two)
    assert checkpoints.steps() == [10]
    checkpoints.save(30, make_state(30), {})
    checkpoints.close()
    assert not unfinished.exists()


def test_another_architecture_names_the_parameter_and_both_shapes(two):
    checkpoints = Checkpoints(two, read_only=True)
    wide, more, fewer = abstract(make_state(0, width=20)), make_state(0), make_state(0)
    with pytest.raises(UserError, match=r"/blocks/0/kernel is shape \(300, 40\).*\(300, 20\)"):
        checkpoints.restore(wide)
    more["params"]["extra"] = jnp.zeros((2, 5))
    with pytest.raises(UserError, match=r"/extra is absent there and shape \(2, 5\)"):
        checkpoints.restore(abstract(more))
    del fewer["params"]["half"]
    with pytest.raises(UserError, match=r"/half is shape \(4,\) there and absent"):
        checkpoints.restore(abstract(fewer))
    assert checkpoints.steps() == [10, 20]  # none of them is held to be damaged


def test_a_numbered_folder_that_is_no_checkpoint_is_left_alone(two):
    (two / "7").mkdir()
    (two / "7" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="folder 7 is no checkpoint of ours") as error:
        Checkpoints(two)
    assert str(two) in str(error.value) and "\n" not in str(error.value)
    assert (two / "7" / "notes.txt").read_text() == "mine"


NAMES = ("a [x] 10%20", "[0-9]* h#1 q?", "b] ~ e{1,2}", "ünïcode 路\u3000x", "trail/")


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_folder_works(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for folder in (f"{tmp_path}/{name}", f"relative {name}"):
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, make_state(1), {"at": 1})
        state, metadata = Checkpoints(folder, read_only=True).restore(abstract(make_state(0)))
        assert metadata == {"at": 1}
        assert_same(state, make_state(1))


@pytest.mark.parametrize("name", ["back\\slash", "new\nline", "caf\udce9"])
def test_names_under_which_nothing_could_be_read_back_are_refused_at_once(tmp_path, name):
    with pytest.raises(UserError, match="cannot be kept on a disk under a path with"):
        Checkpoints(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints"):
        Checkpoints(tmp_path / "file" / "c")


def in_a_process(code, folder):
    argv = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    return subprocess.run(argv, capture_output=True, text=True)


FULL_DISK = """
    import resource, signal, sys
    import jax.numpy as jnp
    from segdiff_jax.errors import UserError
    from segdiff_jax.weights.checkpoint import Checkpoints

    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(1, {"x": jnp.ones(3)}, {"good": True})
    checkpoints.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, 1 << 14))
    try:
        import numpy as np
        noise = [np.random.default_rng(i).normal(size=1 << 12) for i in range(100)]
        checkpoints.save(2, {str(i): jnp.asarray(x) for i, x in enumerate(noise)}, {})
        checkpoints.wait()
    except UserError as error:
        print(error)
"""


def test_a_write_that_fails_is_reported_and_leaves_the_last_good_one(tmp_path):
    run = in_a_process(FULL_DISK, tmp_path)
    assert str(tmp_path) in run.stdout and "File too large" in run.stdout, run.stderr
    assert "(checkpoint 1 is kept)" in run.stdout and run.stdout.count("\n") == 1
    assert run.stderr == ""  # nothing of what the libraries' threads have to say
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 1
    assert checkpoints.metadata() == {"good": True}


OTHER_MESH = """
    import sys
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    import jax.numpy as jnp, numpy as np
    from segdiff_jax.config import MeshConfig
    from segdiff_jax.parallel import mesh as meshes
    from segdiff_jax.parallel import rules
    from segdiff_jax.weights.checkpoint import Checkpoints

    def placed(mesh, state):
        shapes = jax.eval_shape(lambda: state)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            shapes, rules.state_sharding(shapes, mesh))
    state = {"a": {0: {"kernel": jnp.arange(64.0).reshape(8, 8)}}, "step": jnp.asarray(3)}
    written = meshes.make_mesh(MeshConfig(1, 4, 2))
    first = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), state, placed(written, state))
    checkpoints = Checkpoints(sys.argv[1])
    checkpoints.save(3, first, {})
    for sizes in [(8, 1, 1), (2, 2, 2), (1, 8, 1)]:
        mesh = meshes.make_mesh(MeshConfig(*sizes))
        target = placed(mesh, state)
        restored, _ = checkpoints.restore(target)
        kernel, wanted = restored["a"][0]["kernel"], target["a"][0]["kernel"].sharding
        assert kernel.sharding.is_equivalent_to(wanted, 2), (kernel.sharding, wanted)
        np.testing.assert_array_equal(kernel, state["a"][0]["kernel"])
    checkpoints.close()
"""


def test_restores_on_other_meshes_and_on_one_device(tmp_path):
    run = in_a_process(OTHER_MESH, tmp_path)
    assert run.returncode == 0, run.stderr
    shapes = {"a": {0: {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}}
    restored, _ = Checkpoints(tmp_path, read_only=True).restore(shapes)  # in this process
    np.testing.assert_array_equal(restored["a"][0]["kernel"], np.arange(64.0).reshape(8, 8))
