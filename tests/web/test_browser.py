"""The page in Chromium: what a person sees and can do."""

import io
import json
import re
import zipfile
from concurrent.futures import Future

import numpy as np
import pytest
from PIL import Image
from web.conftest import serve

WAIT = 120_000  # milliseconds: compiling is part of the first result
EVIL = ["<img src=x onerror=alert(1)>", "<script>alert(2)</script>", "${alert(3)} {{alert(4)}}"]


@pytest.fixture(scope="module")
def open_page(browser):
    """A function of an address (and a context's options) that opens it; errors fail the test."""
    contexts, errors = [], []

    def open_(url, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
        outside = re.compile(r"https?://(?!127\.0\.0\.1)")
        page.on("request", lambda r: outside.match(r.url) and errors.append(r.url))
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert errors == [], "scripts ran cleanly, and nothing was asked of the network"


def _upload(page, size=(60, 40), name="my photo.png"):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    file = {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}
    page.locator("#photo input[type=file]").set_input_files(file)
    page.wait_for_selector("#photo img")


def _segment(page, classes):
    page.locator("#classes textarea").fill(classes)
    page.locator("#segment").click()
    page.wait_for_selector(".viewer canvas")


def _colors(page):
    """The different colours in the canvas."""
    script = """canvas => {
        const d = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        const found = new Set();
        for (let i = 0; i < d.length; i += 4) found.add(`${d[i]},${d[i + 1]},${d[i + 2]}`);
        return [...found];
    }"""
    return set(page.locator(".viewer canvas").evaluate(script))


@pytest.fixture(scope="module")
def shown(served, open_page):
    page = open_page(served.url, viewport={"width": 1280, "height": 900}, accept_downloads=True)
    _upload(page)
    _segment(page, "sky\nbuilding, house; road")
    return page


def _of(shown, served):
    """What Python says of the same photo and words."""
    source = shown.locator("#photo img").get_attribute("src")
    photo = Image.open(io.BytesIO(shown.request.get(source).body()))
    return served.segmenter(photo, ["sky", "building, house", "road"])


def test_the_legend_names_every_class_with_colour_and_share(shown, served):
    found = _of(shown, served)
    items = shown.locator(".viewer .classes li")
    assert items.count() == 3
    shares = found.shares()
    for i in range(3):
        name = items.nth(i).locator("span").inner_text()
        said = items.nth(i).locator("b").inner_text()
        share = shares.get(name, 0.0)
        assert said == "not found" if not share else abs(float(said[:-1]) / 100 - share) < 0.011
        style = items.nth(i).locator("i").get_attribute("style")
        color = found.vocabulary.palette()[found.classes.index(name)].tolist()
        assert re.findall(r"\d+", style) == [str(c) for c in color]
    order = [items.nth(i).locator("span").inner_text() for i in range(len(shares))]
    assert order == list(shares), "most pixels first"
    other = float((found.labels == 255).mean())
    rest = shown.locator(".viewer .rest")
    said = float(re.findall(r"[\d.]+", rest.inner_text())[0]) / 100 if rest.count() else 0.0
    assert abs(said - other) < 0.011, "what belongs to no class"
    assert "3 classes" in shown.locator("#understood").inner_text()


def test_views_and_toggles_change_the_picture(shown, served):
    palette = _of(shown, served).vocabulary.palette().tolist()
    wanted = {",".join(map(str, color)) for color in palette} | {"0,0,0"}
    shown.get_by_role("button", name="Classes", exact=True).click()
    classes = _colors(shown)
    assert classes <= wanted and len(classes) > 1
    first = shown.locator(".viewer .classes input").first
    first.uncheck()
    shown.mouse.move(5, 5)  # off the legend, whose row under the pointer stands out
    assert len(_colors(shown) - {"0,0,0"}) == len(classes - {"0,0,0"}) - 1
    first.check()
    shown.mouse.move(5, 5)
    assert _colors(shown) == classes
    photo = shown.get_by_role("button", name="Photo", exact=True)
    photo.click()
    assert photo.get_attribute("aria-pressed") == "true" and len(_colors(shown)) > 500
    shown.get_by_role("button", name="Uncertainty").click()
    uncertain = _colors(shown)
    assert "0,0,4" in uncertain or len(uncertain) > 20
    shown.get_by_role("button", name="Overlay", exact=True).click()


def test_scores_under_the_pointer(shown, served):
    found = _of(shown, served)
    box = shown.locator(".viewer canvas").bounding_box()
    for u, v in ((0.3, 0.4), (0.75, 0.6)):
        shown.mouse.move(box["x"] + u * box["width"], box["y"] + v * box["height"])
        tip = shown.locator(".viewer .tip")
        said = dict(
            zip(
                tip.locator("span").all_inner_texts(),
                tip.locator("b").all_inner_texts(),
                strict=True,
            )
        )
        height, width = found.labels.shape
        y, x = int(v * height), int(u * width)
        for number, name in enumerate(found.classes):
            around = found.scores[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2, number]
            assert around.min() - 0.02 <= float(said[name]) <= around.max() + 0.02
    shown.mouse.move(5, 5)
    assert shown.locator(".viewer .tip").is_hidden()


def test_downloads_in_the_formats_of_predict(shown):
    shown.get_by_role("button", name="Download", exact=False).first.click()
    shown.locator("#formats input").first.wait_for()  # `all` does not wait for what unfolds
    for box in shown.locator("#formats input").all():
        box.check()
    with shown.expect_download() as caught:
        shown.locator("#download").click()
    assert caught.value.suggested_filename == "my_photo.zip"
    packed = zipfile.ZipFile(caught.value.path())
    names = set(packed.namelist())
    assert {
        "my_photo_labels.png",
        "my_photo_mask_0.png",
        "my_photo_score_2.png",
        "coco.json",
    } <= names
    assert {"yolo/data.yaml", "yolo/labels/my_photo.txt", "cvat.zip", "my_photo.json"} <= names
    said = json.loads(packed.read("my_photo.json"))
    assert (said["width"], said["height"]) == (60, 40) and said["settings"]["seed"] == 0


def test_names_are_text_wherever_they_are_shown(served, open_page):
    page = open_page(served.url)
    _upload(page, name="<img src=x onerror=alert(9)>.png")
    _segment(page, "\n".join(EVIL))
    assert sorted(page.locator(".viewer .classes span").all_inner_texts()) == sorted(EVIL)
    assert page.locator(".viewer img, .viewer script, #understood img").count() == 0
    box = page.locator(".viewer canvas").bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + 9)
    page.locator("#classes textarea").fill(f"{EVIL[0]}\n{EVIL[0]}")
    page.locator("#segment").click()
    toast = page.get_by_text("duplicate class name").first
    toast.wait_for()
    assert toast.locator("img").count() == 0
    assert page.locator("#result .error").is_hidden(), "nothing lies over the views"
    assert page.locator("h2 b").count() == 0, "nor is the title markup"


def test_a_visitor_is_told_what_the_model_does_not_see_of_a_name(served, open_page):
    page = open_page(served.url)
    page.locator("#classes textarea").fill("sky; road")
    page.wait_for_function("document.querySelector('#understood').innerText.includes('2 classes')")
    assert "Too long" not in page.locator("#understood").inner_text()
    page.locator("#classes textarea").fill("sky; " + "a long name of a class " * 8)
    page.wait_for_function("document.querySelector('#understood').innerText.includes('Too long')")
    assert "does not see" in page.locator("#understood").inner_text()


def test_masks_of_a_photo_leave_with_it(served, open_page):
    page = open_page(served.url)
    _upload(page)
    _segment(page, "sky; road")
    assert page.get_by_label("Strength of the colours").is_visible()
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.wait_for_selector(".viewer canvas", state="detached")
    _upload(page, (30, 30))
    _segment(page, "sky")
    assert page.locator(".viewer .classes li").count() == 1


def test_an_example_fills_the_form(served, open_page):
    page = open_page(served.url)
    page.locator("table tr img, .gallery-item").first.click()
    page.wait_for_selector("#photo img")
    page.wait_for_function("document.querySelector('#classes textarea').value == 'sky\\nroad'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_all_in_its_width(served, open_page, scheme):
    page = open_page(
        served.url, viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True
    )
    _upload(page, (80, 30))
    _segment(page, "sky; road; " + "a very long name of a class " * 6)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, "no sideways scrolling"
    box = page.locator(".viewer canvas").bounding_box()
    assert box["width"] > 300 and abs(box["width"] / box["height"] - 80 / 30) < 0.05
    text, ground = page.evaluate(
        """() => ['.viewer', 'body'].map((s) => {
            const style = getComputedStyle(document.querySelector(s));
            return s === 'body' ? style.backgroundColor : style.color;
        })"""
    )
    bright = [sum(map(float, re.findall(r"[\d.]+", c)[:3])) / 3 for c in (text, ground)]
    assert (bright[0] > 150 > 100 > bright[1]) == (scheme == "dark"), (text, ground)
    page.locator(".viewer canvas").tap(position={"x": 40, "y": 40})  # scrolls to it
    tip = page.locator(".viewer .tip")
    tip.wait_for()
    assert tip.bounding_box()["x"] + tip.bounding_box()["width"] <= 390


def test_the_page_is_there_before_the_model_is(make_segmenter, open_page, tmp_path, monkeypatch):
    loading, segmenter = Future(), make_segmenter()
    with serve(tmp_path, loading, segmenter, monkeypatch) as found:
        page = open_page(found.url)
        page.get_by_text("Loading the model:").wait_for()
        _upload(page)
        page.locator("#classes textarea").fill("sky")
        page.locator("#segment").click()
        page.get_by_text("The model is being loaded").first.wait_for()
        loading.set_result(segmenter)
        page.wait_for_selector(".viewer canvas")
        page.get_by_text("Loading the model:").wait_for(state="hidden")
        page.close()
