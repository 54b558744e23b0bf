"""docs/quickstart.ipynb runs as it stands and does what it says.

`python tests/test_quickstart.py` runs it too, and writes the outputs that readers see anew.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

import segdiff_jax

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"
WHERE = "import sys, segdiff_jax; print(sys.prefix, segdiff_jax.__file__, sep='\\n')"
FOUND = "plain blue triangle"  # in the second scene, which the notebook looks at first


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def run(notebook, folder):
    """Execute `notebook` in `folder` by this Python, on the package that is imported here."""
    # No folder of kernels but ipykernel's own: what others name python3 may be another Python.
    kernel = AsyncKernelManager(
        kernel_name="python3",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
        connection_file=str(folder / "kernel.json"),
    )
    paths = [str(Path(segdiff_jax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "IPYTHONDIR": str(folder / "ipython"),  # the home may not be there to write to
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # it compiles much and computes little
    }
    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=300,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment, cleanup_kc=True)  # raises for a cell that does


def outputs(notebook):
    """By id of each code cell: its outputs without stderr, where libraries warn of each other."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return {cell.id: [o for o in cell.outputs if o.get("name") != "stderr"] for cell in cells}


def without_numbers(output):
    text = output.text if output.output_type == "stream" else output.data["text/plain"]
    return re.sub(r"\d+(\.\d+)?", "#", text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The executed notebook, with a cell more that says where it ran, and its folder."""
    folder, notebook = tmp_path_factory.mktemp("quickstart"), read()
    notebook.cells.append(nbformat.v4.new_code_cell(WHERE, id="where"))
    run(notebook, folder)
    return notebook, folder / "runs" / "quickstart"


def truth(folder, name):
    """What was drawn: by class name its mask, of the classes that are there."""
    names = (folder / "classes.txt").read_text().splitlines()
    labels = np.asarray(Image.open(folder / "masks" / name))
    return {names[number]: labels == number for number in np.unique(labels)}


def overlap(one, other):
    return (one & other).sum() / (one | other).sum()


def test_every_cell_runs_in_this_python_on_this_package(finished):
    cells = [cell for cell in finished[0].cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    (where,) = outputs(finished[0])["where"]
    assert where.text.splitlines() == [sys.prefix, segdiff_jax.__file__]


def test_both_files_of_the_first_result_hold_what_was_drawn(finished):
    folder = finished[1]
    coco = json.loads((folder / "coco.json").read_text())
    numbers = {category["name"]: category["id"] for category in coco["categories"]}
    labels = np.asarray(Image.open(folder / "labels.png"))
    drawn = truth(folder, "val_000001.png")
    assert len(drawn) == 3 and FOUND in drawn
    for name, mask in drawn.items():
        assert overlap(labels == numbers[name], mask) > 0.7, name
    areas = {numbers[name]: (labels == numbers[name]).sum() for name in drawn}
    assert {a["category_id"]: a["area"] for a in coco["annotations"]} == areas
    (printed,) = [o.text for o in outputs(finished[0])["mask"] if o.output_type == "stream"]
    assert printed == f"(256, 256) bool {areas[numbers[FOUND]]} pixels\n"


def test_each_photo_of_the_stream_is_saved_and_green_rings_are_found_where_they_are(finished):
    folder = finished[1]
    names = sorted(path.name for path in (folder / "images").iterdir())
    assert len(names) == 6
    there = [name for name in names if "plain green ring" in truth(folder, name)]
    assert 0 < len(there) < 6
    (printed,) = outputs(finished[0])["stream"]
    shares = dict(line.rstrip("%").split(": ") for line in printed.text.splitlines())
    assert list(shares) == names and [n for n in names if float(shares[n]) > 5] == there
    for name in names:
        labels = np.asarray(Image.open(folder / name.replace(".png", "_labels.png")))
        assert overlap(labels == 0, truth(folder, name)["background"]) > 0.7, name


def test_a_reader_sees_the_outputs_of_this_code(finished):
    """But for numbers, which another JAX may round otherwise."""
    given = outputs(finished[0])
    for name, shown in outputs(read()).items():
        stale = f"cell {name}: `python tests/test_quickstart.py` writes its outputs anew"
        assert list(map(without_numbers, shown)) == list(map(without_numbers, given[name])), stale
        for old, new in zip(shown, given[name], strict=True):
            assert set(old.get("data", ())) <= set(new.get("data", ())), stale
    assert NOTEBOOK.stat().st_size < 150_000


def write_outputs():
    """Store fresh outputs in the notebook: of a picture in two formats the smaller one."""
    notebook = read()
    metadata = dict(notebook.metadata)
    with tempfile.TemporaryDirectory() as folder:
        run(notebook, Path(folder))
    notebook.metadata = metadata  # without the version of this Python
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = outputs(notebook)[cell.id]
        for output in cell.get("outputs", ()):
            pictures = [kind for kind in output.get("data", ()) if kind.startswith("image/")]
            for kind in sorted(pictures, key=lambda kind: len(output.data[kind]))[1:]:
                del output.data[kind]
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    write_outputs()
