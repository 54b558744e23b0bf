"""What visitors may not do: each is refused in words, and the server lives on."""

import io
import json
import shutil
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from segdiff_jax.config import DataConfig
from segdiff_jax.data import images
from segdiff_jax.errors import UserError
from segdiff_jax.web import requests
from segdiff_jax.web.requests import Limits

LABELS = ["labels"]


@pytest.fixture(scope="module")
def client(served, tmp_path_factory):
    return Client(served.url, verbose=False, download_files=str(tmp_path_factory.mktemp("d")))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    return path


def _call(
    client, path, classes="sky\nroad", steps=1, ensemble=1, seed=0, closed=False, kinds=LABELS
):
    return client.predict(
        handle_file(str(path)), classes, steps, ensemble, seed, closed, kinds, api_name="/segment"
    )


@pytest.fixture(autouse=True, scope="module")
def lives_on(client, photo):
    """In the end the server still answers."""
    yield
    shares, _ = _call(client, photo)
    assert 0 < sum(shares["classes"].values()) <= 1


def test_programs_get_what_python_gets(client, served, photo):
    shares, path = _call(client, photo, "sky; building, house", 2, 2, 3, True, ["yolo", *LABELS])
    found = served.segmenter(
        str(photo), ["sky", "building, house"], steps=2, ensemble=2, seed=3, closed=True
    )
    assert shares["classes"] == pytest.approx(found.shares())
    packed = zipfile.ZipFile(path)
    labels = np.asarray(Image.open(io.BytesIO(packed.read("a_labels.png"))))
    np.testing.assert_array_equal(labels, found.labels)
    assert json.loads(packed.read("a.json"))["settings"]["seed"] == 3
    assert packed.read("yolo/data.yaml").startswith(b"train: images")


def test_the_description_of_a_photo_called_coco(client, tmp_path, photo):
    shutil.copy(photo, tmp_path / "coco.png")
    _, path = _call(client, tmp_path / "coco.png", kinds=["coco"])
    assert {"coco_.json", "coco__coco.json", "coco.json"} <= set(zipfile.ZipFile(path).namelist())


def _encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_what_is_no_photo_is_refused_in_words(client, tmp_path, bomb):
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    small, second = Image.new("L", (8, 8)), Image.new("L", (8, 8), 9)
    unknown = "is no photo that can be read. Use JPEG, PNG"
    for name, data, message in (
        ("bomb.png", bomb, "is larger than 2 megapixels. Make it smaller"),
        ("large.png", _encoded(Image.new("1", (2000, 2000))), "is larger than 2 megapixels"),
        ("a.svg", svg, unknown),
        ("svg.png", svg, unknown),
        ("html.jpg", b"<html><script>alert(1)</script></html>", unknown),
        ("a.txt", b"root:x:0:0", unknown),
        ("empty.png", b"", unknown),
        ("cut.png", _encoded(small)[:40], unknown),
        ("eps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", unknown),
        ("a.webp", _encoded(small, "WEBP", save_all=True, append_images=[second]), "animated"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AppError, match=f"{name}:? {message}") as caught:
            _call(client, tmp_path / name)
        assert "/" not in str(caught.value).replace("1/", ""), "no path of the server"


def test_a_photo_with_a_page_behind_it_is_a_photo_only(client, served, tmp_path, photo):
    both = tmp_path / "both.jpg"
    both.write_bytes(photo.read_bytes() + b"<script>alert(1)</script>PK\x05\x06" + bytes(18))
    shares, path = _call(client, both)
    assert shares["classes"] == _call(client, photo)[0]["classes"]
    assert b"<script>" not in b"".join(
        map(zipfile.ZipFile(path).read, zipfile.ZipFile(path).namelist())
    )


def _post(url, name, data):
    boundary = "xxxxxxxx"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    )
    body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{url}/gradio_api/upload", body, kind)
    return urllib.request.urlopen(request, timeout=30)


def _status(url):
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_file_that_is_too_large_is_not_taken(served):
    """By the server's own limit, and before a byte of it is read."""
    for megabytes in (3.5, 50):
        try:
            status = _post(served.url, "a.png", bytes(int(megabytes * 2**20))).status
        except urllib.error.HTTPError as error:
            status = error.code
        except (urllib.error.URLError, ConnectionError):
            status = 413  # it hangs up while we still write
        assert status == 413


def test_names_that_climb_stay_inside(served):
    outside = ("../../../../tmp/out.png", "..\\..\\out.png", "/etc/out.png", "a/../../b.png")
    for name in (*outside, "..", "%2e%2e%2fx"):
        try:
            with _post(served.url, name, b"x") as answer:
                stored = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            assert 400 <= error.code < 500
            continue
        for path in stored:
            assert Path(path).resolve().is_relative_to(Path(served.files).resolve()), name


def test_no_file_of_the_host_is_served(served):
    routes = ("/gradio_api/file=", "/file=", "/gradio_api/proxy=", "/static/", "/assets/")
    for path in (
        "/etc/passwd",
        "//etc/passwd",
        "../../../../../../etc/passwd",
        f"{served.files}/../../../../../../../etc/passwd",
        f"{served.files}/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
        __file__,
        "pyproject.toml",
        "file:///etc/passwd",
        "http://127.0.0.1:1/",
        "HTTP://localhost/",
    ):
        for route in routes:
            status = _status(served.url + route + urllib.parse.quote(path, safe="/%:"))
            assert status in (400, 403, 404), (route, path)


def test_no_file_of_the_host_is_a_photo(client):
    for path in ("/etc/passwd", __file__, "http://127.0.0.1:9/a.png", "data:,x"):
        payload = {"path": path, "meta": {"_type": "gradio.FileData"}}
        with pytest.raises((AppError, ValueError, OSError)) as caught:
            client.predict(payload, "sky", 1, 1, 0, False, LABELS, api_name="/segment")
        assert "root:" not in str(caught.value)


def test_an_upload_comes_back_as_a_file_not_as_a_page(served):
    with _post(served.url, "evil.html", b"<script>alert(1)</script>") as answer:
        (path,) = json.loads(answer.read())
    url = f"{served.url}/gradio_api/file={urllib.parse.quote(path)}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert "attachment" in answer.headers["Content-Disposition"]
        assert answer.headers["Content-Type"] == "application/octet-stream"


def test_what_is_too_much_or_nothing_is_said(client, photo):
    many = "\n".join(f"class {i}" for i in range(2000))
    for asked, message in (
        ({"classes": many}, "2000 classes are too many"),
        ({"classes": "ade20k_847"}, "847 classes are too many: name 200 at most"),
        ({"classes": "ade20k"}, "no packaged list of this name: write ade20k_150 or"),
        ({"classes": " \n;"}, "Name what to look for|empty class list"),
        ({"classes": "sky\nSKY"}, "duplicate class name"),
        ({"classes": "x" * 200_000}, "too long"),
        ({"classes": "a\x00b"}, "invisible character"),
        ({"steps": 10**9}, "Steps: give a whole number from 1 to 1000|[Mm]aximum"),
        ({"ensemble": 0.5}, "Ensemble: give a whole number|[Mm]inimum"),
        ({"seed": -1}, "Seed: give a whole number from 0|[Mm]inimum"),
        ({"steps": 50, "ensemble": 16, "classes": "a;b;c"}, "2,400 passes .* more than 2,000"),
        ({"kinds": []}, "Choose a format first"),
        ({"classes": "a: b", "kinds": ["cvat"]}, "CVAT's label map"),
    ):
        with pytest.raises(AppError, match=message):
            _call(client, photo, **asked)


def test_a_list_of_classes_never_names_a_file():
    limits = Limits()
    for text in ("@/etc/passwd", "@classes.txt", "/etc/passwd"):
        assert requests.classes(text, limits).names == (text,)
    assert len(requests.classes("cityscapes_19", limits)) == 19
    found = requests.classes("sky\r\nbuilding, house;road;\n", limits)
    assert found.names == ("sky", "building", "road") and found.classes[1].synonyms == ("house",)


def test_sixteen_bits_are_read_by_the_range_of_the_model(tmp_path):
    values = np.array([[0, 1000], [500, 200]], np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = requests.photo(str(tmp_path / "deep.png"), DataConfig(max_value=4000), Limits())
    np.testing.assert_array_equal(found, images.read_image(tmp_path / "deep.png", max_value=4000))
    assert found.max() == 64


def test_numbers_are_whole_ones(tiny_config):
    for value in ("3", None, True, float("nan"), float("inf"), 1.5, [1]):
        asked = {"steps": value, "ensemble": 1, "seed": 0, "closed": False}
        with pytest.raises(UserError, match="Steps: give a whole number from 1 to 1000"):
            requests.settings(asked, tiny_config(), 2, Limits())
