"""The benchmarks in configs/eval: the model is the checkpoint's, the data the benchmark's."""

import dataclasses
from pathlib import Path

import pytest

from segdiff_jax import cli
from segdiff_jax.config import CodecConfig, Config, DataConfig, PromptsConfig, SamplerConfig
from segdiff_jax.evaluation.open_vocabulary import BENCHMARKS, PUBLISHED
from segdiff_jax.text import vocabulary

CONFIGS = Path(__file__).parents[1] / "configs" / "eval"
TRAINED = Config(
    data=DataConfig(source="scenes", image_size=(64, 80), fit="stretch"),
    codec=CodecConfig(classes_per_pass=4, context="bound"),
    prompts=PromptsConfig(("{class}",)),
    sampler=SamplerConfig(steps=3),
)


def test_every_benchmark_of_the_table_has_a_config():
    assert {path.stem for path in CONFIGS.glob("*.py")} == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_only_the_data_are_the_benchmarks(name):
    path = str(CONFIGS / f"{name}.py")
    config = cli.load_config(path, ["--config.sampler.ensemble=2"], "evaluate", TRAINED)
    assert config.sampler == dataclasses.replace(TRAINED.sampler, ensemble=2)
    assert (config.codec, config.prompts) == (TRAINED.codec, TRAINED.prompts)
    assert (config.data.image_size, config.data.fit) == ((64, 80), "stretch")
    assert config.data.root and (config.data.vocabulary or name == "pascal_voc_20b")
    if config.data.vocabulary:
        classes = int(name.removesuffix("b").rsplit("_", 1)[1])
        assert len(vocabulary.load(config.data.vocabulary)) == classes
    assert config.data.shortest == (512 if name == "ade20k_847" else 0)
    assert cli.load_config(path, use="evaluate").data.root == config.data.root, "also by itself"


def test_published_rows_fit_the_columns():
    columns = [benchmark.column for benchmark in BENCHMARKS.values()]
    rows = {row.method: dict(zip(columns, row.miou, strict=False)) for row in PUBLISHED}
    assert all(len(row.miou) <= len(columns) and "/" in row.source for row in PUBLISHED)
    assert (rows["FC-CLIP L"]["PAS-21"], rows["FC-CLIP L"]["Cityscapes"]) == (81.8, 56.2)
    assert rows["ODISE (label)"]["PAS-21"] == 84.6
