"""What is said of a result beside its table."""

import json

from segdiff_jax.evaluation import tables


def test_the_command_names_no_folder_of_this_machine():
    flags = ["--config.data.root=/b/sets=1", "--config.train.steps=3", "--config.init_from="]
    argv = ["steps", "--output", "/a/out", *flags]
    about = tables.origin("segdiff study", argv, {"/a/out": "O", "/b/sets=1": "DATA"})
    expected = "segdiff study steps --output O --config.data.root=DATA --config.train.steps=3"
    assert about["command"] == f"{expected} --config.init_from="
    again = tables.origin("segdiff study", ["--output=/a/out"], {"/a/out": "O"})
    assert again["command"] == "segdiff study --output=O"


def test_a_result_has_a_line_for_each_measurement():
    measurements = [{"setting": {"a [": "{ x ]"}, "figures": {"b": 0.1, "c": []}}] * 3
    about = {"cells": [["1 ", " ± 2"]], "measurements": measurements, "config": {"d": [1, 2]}}
    text = tables.to_json(about)
    assert json.loads(text) == about
    assert text.count("\n") == 2 + (2 + 1) + (2 + 3) + (2 + 1)
