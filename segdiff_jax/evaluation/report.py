"""What an evaluation leaves behind: metrics.json, a page, a sheet of examples, a table to print."""

import csv
import io
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from segdiff_jax import files
from segdiff_jax.data.sources.source import Source
from segdiff_jax.evaluation.evaluator import Result
from segdiff_jax.evaluation.metrics import OfImage
from segdiff_jax.inference import page, pictures
from segdiff_jax.text.vocabulary import shorten

_SHEET_ROWS = 4  # of examples.png
_FIGURES = {
    "miou_trained": "mIoU, trained classes",
    "miou_novel": "mIoU, never-trained classes",
    "miou_harmonic": "mIoU, harmonic mean of both",
    "miou_present": "mIoU, classes in the ground truth",
    "miou_union": "mIoU, classes in truth or prediction",
    "frequency_weighted_iou": "IoU, weighted by pixels",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "photo_absolute_error": "photos through the VAE: error of 255",
    "photo_brightness_r2": "photos through the VAE: brightness kept",
    "photo_colour_r2": "photos through the VAE: colour kept",
}
_FURTHER = {
    "boundary_miou_present": "boundary mIoU, classes in the ground truth",
    "boundary_miou_union": "boundary mIoU, classes in truth or prediction",
    "false_alarms": "pixels given to classes that the image does not have",
    "presence_auroc": "class presence: AUROC",
    "presence_mcc": "class presence: best MCC",
    "calibration_error": "calibration error of the winning score",
    "calibration_error_before": "calibration error, odd images",
    "calibration_error_after": "calibration error, odd images, after temperature",
    "temperature": "temperature, fitted on even images",
    "error_auroc": "uncertainty predicts errors: AUROC",
    "error_aurc": "uncertainty predicts errors: risk over coverage",
}


def write(
    output: str, summary: dict[str, Any], result: Result, source: Source, per_image: bool = False
) -> None:
    """Write metrics.json, index.html, examples.png where there are examples, and per_image.csv.

    `summary` is the result's with what else is to be said of the run.
    """
    files.write_json(os.path.join(output, "metrics.json"), summary)
    settings, novel, names = summary["settings"], set(source.novel), source.vocabulary.names
    colors = dict(zip(names, source.vocabulary.palette().tolist(), strict=True))
    what = "Ceiling: ground truth through codec and VAE" if settings["ceiling"] else "Evaluation"
    further = [(label, summary[key]) for key, label in _FURTHER.items()]
    groups = {n: "novel" if i in novel else "trained" for i, n in enumerate(names)}
    rows = [
        page.comparison(e.name, e.image, e.prediction, colors, e.labels, e.uncertainty)
        for e in result.examples
    ]
    stale = [] if per_image else ["per_image.csv"]
    stale += [] if rows else ["examples.png"]
    with files.writing(output):  # earlier ones would show other results
        for name in stale:
            epath.Path(output, name).unlink(missing_ok=True)
    if per_image:
        files.write_text(os.path.join(output, "per_image.csv"), _table_of_images(result.per_image))
    if rows:
        sheet = pictures.encode(page.contact_sheet(rows[:_SHEET_ROWS]))
        files.write_bytes(os.path.join(output, "examples.png"), sheet)
    page.page(
        os.path.join(output, "index.html"),
        what,
        {label: summary[key] for key, label in _FIGURES.items() if key in summary},
        [
            page.class_table(summary["per_class"], colors, groups if novel else None),
            page.Table("Further figures", ["figure", "value"], further),
            page.Table(
                "Settings", ["setting", "value"], [(k, str(v)) for k, v in settings.items()]
            ),
        ],
        rows,
        f"{summary['images']} images of {summary['data']['split']!r}, {len(names)} classes, "
        f"{summary['checkpoint']}",
    )


def _table_of_images(rows: Sequence[OfImage]) -> str:
    """Return CSV: a line for each image and each class in its labels or its prediction."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow("class" if field == "name" else field for field in OfImage._fields)
    writer.writerows(rows)
    return buffer.getvalue()


def text_table(summary: dict[str, Any]) -> str:
    """Return the classes, then the figures, aligned for a terminal."""

    def show(value: float | None) -> str:
        return "    –" if value is None else f"{value:5.3f}"

    labels = _FIGURES | _FURTHER
    figures = [(label, summary[key]) for key, label in labels.items() if key in summary]
    classes = [(shorten(name), iou) for name, iou in summary["per_class"].items()]
    width = max(len(name) for name, _ in figures + classes)
    lines = [f"  {name:<{width}}  {show(iou)}" for name, iou in classes]
    lines.append("-" * (width + 9))
    lines += [f"  {label:<{width}}  {show(value)}" for label, value in figures]
    return "\n".join(lines)
