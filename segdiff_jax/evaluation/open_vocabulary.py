"""The open-vocabulary benchmarks: which data each has, and what others report on it."""

import dataclasses
from typing import NamedTuple

from segdiff_jax.config import Config, DataConfig


class Benchmark(NamedTuple):
    column: str  # of the papers' tables
    source: str
    root: str  # below the folder of all data sets
    vocabulary: str  # "" = the source has its own
    shortest: int = 0  # pairs with a longer short side are shrunk to it first, as in the papers


class Published(NamedTuple):
    method: str
    miou: tuple[float | None, ...]  # percent, in the order of BENCHMARKS
    source: str  # the repository and file that says so


_VOC2010, _VOC2012 = "VOCdevkit/VOC2010", "VOCdevkit/VOC2012"
BENCHMARKS = {  # the papers' columns in their order, then what else there is
    "ade20k_847": Benchmark("A-847", "ade20k_847", "ADE20K_2021_17_01", "ade20k_847", 512),
    "pascal_context_459": Benchmark("PC-459", "pascal_context_459", _VOC2010, "pascal_context_459"),
    "ade20k_150": Benchmark("A-150", "ade20k", "ADEChallengeData2016", "ade20k_150"),
    "pascal_context_59": Benchmark("PC-59", "pascal_context_59", _VOC2010, "pascal_context_59"),
    "pascal_voc_20": Benchmark("PAS-20", "pascal_voc", _VOC2012, "pascal_voc_20"),
    "pascal_voc_20b": Benchmark("PAS-20b", "pascal_voc_20b", _VOC2012, ""),
    "pascal_voc_21": Benchmark("PAS-21", "pascal_voc", _VOC2012, "pascal_voc_21"),
    "coco_stuff_171": Benchmark("COCO-171", "coco_stuff", "coco_stuff164k", "coco_stuff_171"),
    "cityscapes_19": Benchmark("Cityscapes", "cityscapes", "cityscapes", "cityscapes_19"),
    "camvid_11": Benchmark("CamVid", "folder", "camvid", "camvid_11"),
}
PUBLISHED = (
    Published(
        "OVSeg Swin-B",
        (9.0, 12.4, 29.6, 55.7, 94.5),
        "facebookresearch/ov-seg GETTING_STARTED.md",
    ),
    Published(
        "ODISE (label)",
        (11.1, 14.5, 29.9, 57.3, None, None, 84.6),
        "NVlabs/ODISE README.md",
    ),
    Published("SAN L", (12.96, 20.83, 31.93, 57.53, 95.18), "MendelXu/SAN resources/*.log"),
    Published(
        "FC-CLIP L",
        (14.8, 18.2, 34.1, 58.4, 95.4, None, 81.8, None, 56.2),
        "bytedance/fc-clip README.md",
    ),
    Published("SED L", (13.7, 22.1, 35.3, 60.9, 96.1), "xb534/SED README.md"),
    Published("CAT-Seg L", (16.0, 23.8, 37.9, 63.3, 97.0, 82.5), "cvlab-kaist/CAT-Seg README.md"),
    Published("ERR-Seg L", (16.9, 23.9, 38.3, 60.7, 96.6), "lchen1019/ERR-Seg README.md"),
)


def config_of(name: str, trained: Config = Config()) -> Config:
    """Return `trained`, the config of a model, with the data of a benchmark."""
    benchmark, seen = BENCHMARKS[name], trained.data
    data = DataConfig(
        source=benchmark.source,
        root=benchmark.root,
        vocabulary=benchmark.vocabulary,
        shortest=benchmark.shortest,
        image_size=seen.image_size,
        fit=seen.fit,
    )
    return dataclasses.replace(trained, data=data)
