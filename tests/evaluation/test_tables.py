"""What is said of a result beside its table."""

from segdiff_jax.evaluation import tables


def test_the_command_names_no_folder_of_this_machine():
    flags = ["--config.data.root=/b/sets=1", "--config.train.steps=3", "--config.init_from="]
    argv = ["steps", "--output", "/a/out", *flags]
    about = tables.origin("segdiff study", argv, {"/a/out": "O", "/b/sets=1": "DATA"})
    expected = "segdiff study steps --output O --config.data.root=DATA --config.train.steps=3"
    assert about["command"] == f"{expected} --config.init_from="
    again = tables.origin("segdiff study", ["--output=/a/out"], {"/a/out": "O"})
    assert again["command"] == "segdiff study --output=O"
