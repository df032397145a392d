"""The page in a real browser, and requests to the server that the page does not make.

Covers: pipelines/app/parts.py, pipelines/app/page.py, pipelines/app/serving.py.
"""

from __future__ import annotations

import io

import httpx
import numpy as np
import pytest
import torch
from optional import Late, needs_gradio
from PIL import Image
from servers.app_server import Driver, app
from servers.chromium import browser
from small_pipelines import make_pipeline, pixels_for

from pipelines import ImagePipeline
from pipelines.anomaly.calibrating import calibrate

serving = Late("pipelines.app.serving")
pytestmark = needs_gradio
SIDE = 12
LABELS = ["cat", "<b>dog</b>", "${7*7} {{eel}}"]  # a pipeline may come from anybody


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small calibrated any-order pipeline, and a folder of images to search."""
    pytest.importorskip("constriction")
    place = tmp_path_factory.mktemp("app")
    torch.manual_seed(0)
    pipe = make_pipeline("pixels", "blocks", size=(SIDE, SIDE), labels=LABELS, any_order=True)
    calibrate(pipe, pixels_for(pipe, 60))
    pipe.save_pretrained(place / "pipeline")
    (place / "images").mkdir()
    for number, pixels in enumerate(pixels_for(pipe, 40)):
        Image.fromarray(pixels[0].numpy()).save(place / "images" / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def server(folder):
    keys = ["max_images=800", "max_upload_mb=0.25", "queue=2", f"data.source={folder / 'images'}"]
    keys += [f"data.image_size={SIDE}", "data.channels=1"]
    (folder / "here").mkdir()
    with app(folder / "pipeline", folder / "here", *keys, TMPDIR=str(folder / "here")) as running:
        yield running
    assert not [path for path in (folder / "here").rglob("*.png") if path.is_file()], "uploads and pictures are gone"
    assert running.process.returncode == 0 and "Traceback" not in running.output


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


@pytest.fixture
def page(chromium, server):
    """A page that sampled when it was opened, and then six images. Its console stays without errors, and it requests
    nothing from another machine."""
    driver = Driver(chromium.new_page(viewport={"width": 1280, "height": 900}), server.url)
    driver.wait("#samples .thumbnail-item >> nth=15")
    driver.number("number input for Images", 6)
    driver.click("Sample")
    driver.page.wait_for_function("document.querySelectorAll('#samples .thumbnail-item').length == 6")
    yield driver
    driver.page.close()
    problems = [text for text in driver.problems if "413" not in text]
    assert not problems, problems
    asked = {url.split("/")[2] for url in driver.asked if url.startswith("http")}
    assert asked == {server.url.split("/")[2]}


def shown(driver, name):
    """The pictures in a gallery, as arrays."""
    sources = driver.page.locator(f"#{name} .thumbnail-item img").evaluate_all("images => images.map(each => each.src)")
    files = [httpx.get(url, trust_env=False).content for url in sources]
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files]


def test_samples_are_exact_and_captions_are_text(page, folder):
    pipe = ImagePipeline.from_pretrained(folder / "pipeline")
    expected = pipe(6, seed=0, labels=(pipe.labels * 2)[:6], progress=False, output_type="np").images[..., 0]
    assert np.array_equal(np.stack(shown(page, "samples")), expected)
    captions = page.page.locator("#samples .caption-label").all_inner_texts()
    assert captions[:3] == [f"{label} · seed {seed}" for seed, label in enumerate(LABELS)]


def test_samples_are_crisp_and_every_tab_works(page, folder, tmp_path):
    style = "image => [image.width / image.naturalWidth, getComputedStyle(image).imageRendering]"
    assert page.page.locator("#samples img").first.evaluate(style) == [9, "pixelated"]
    page.page.locator("#samples .thumbnail-item").nth(2).click()
    sample = shown(page, "samples")[2]
    page.tab("Complete")
    page.click("Complete")
    assert "choose an image first" in page.toast()
    page.click("Use the selected sample")
    page.wait("#painting .layer-wrap, #painting button[title='Brush Size']")
    box = page.page.locator("#painting canvas").first.bounding_box()
    across, below = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 + 80
    page.page.mouse.move(across - 90, below)
    page.page.mouse.down()
    page.page.mouse.move(across + 90, below, steps=5)
    page.page.mouse.up()
    page.click("Complete")
    page.wait("#completed .thumbnail-item >> nth=4")
    mask, *draws = shown(page, "completed")
    hidden = np.asarray(mask) > 0
    assert hidden[8:10, 4:8].all() and not hidden[:6].any()
    assert all(np.array_equal(draw[~hidden], sample[~hidden]) for draw in draws)

    page.tab("Compare")
    page.click("Use the selected sample")
    page.wait("#compare-image .thumbnail-item")
    page.click("Compare")
    page.wait("#compared .thumbnail-item >> nth=3")
    assert np.array_equal(shown(page, "compared")[0], sample)

    page.tab("Anomaly")
    page.click("Use the selected sample")
    page.wait("#anomaly-image .thumbnail-item")
    page.click("Score")
    page.wait("#anomaly-facts >> text=p-value")

    page.tab("Search")
    page.pick("search-image", folder / "images" / "7.png")
    page.wait("#search-image .thumbnail-item")
    page.click("Search")
    page.wait("#found .thumbnail-item >> nth=9")
    assert np.array_equal(shown(page, "found")[0], np.asarray(Image.open(folder / "images" / "7.png")))

    page.tab("Compress")
    page.click("Use all samples")
    page.wait("#compress-images .thumbnail-item >> nth=5")
    page.click("Compress")
    with page.page.expect_download() as download:
        page.wait("#stream-link a").click()
    download.value.save_as(tmp_path / "images.smalti")
    page.pick("stream", tmp_path / "images.smalti")
    page.wait("#stream >> text=images.smalti")
    page.click("Decompress")
    page.wait("#decompressed .thumbnail-item >> nth=5")
    assert np.array_equal(np.stack(shown(page, "decompressed")), np.stack(shown(page, "samples")))


def test_bad_and_large_uploads_get_a_line(page, tmp_path):
    (tmp_path / "bad.png").write_text("no picture at all")
    page.tab("Compare")
    page.pick("compare-image", tmp_path / "bad.png")
    page.page.wait_for_timeout(500)
    page.click("Compare")
    assert "not an image in one of the formats" in page.toast()
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert "at most 0.25 MB" in page.page.locator("#compare-image").inner_text()
    page.pick("compare-image", tmp_path / "large.png")
    assert "Error" in page.toast()
    page.tab("Sample")
    page.page.get_by_label("Seed", exact=True).locator("visible=true").first.fill("-5")
    page.click("Sample")
    assert "seed: " in page.toast()
    page.page.get_by_label("Seed", exact=True).locator("visible=true").first.fill("0")


def test_long_sampling_shows_its_steps_and_stops(page):
    page.tab("Sample")
    before = shown(page, "samples")
    stop_button = page.page.locator(".smalti-stop >> visible=true")
    assert stop_button.evaluate("button => getComputedStyle(button).pointerEvents") == "none"
    page.number("number input for Images", 800)
    page.click("Sample")
    page.wait(".progress-text:has-text('tokens')")
    page.click("Stop")
    assert "stopped after" in page.toast()
    assert np.array_equal(shown(page, "samples"), before)


def test_a_foreign_host_files_and_large_uploads_are_refused(server):
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        port = server.url.rstrip("/").rpartition(":")[2]
        for name, status in ((f"evil.example:{port}", 400), ("evil.example", 400), (f"localhost:{port}", 200)):
            assert client.get("/config", headers={"Host": name}).status_code == status
        secret = server.log.parent.parent / "pipeline" / "model_index.json"
        assert client.get(f"/gradio_api/file={secret}").status_code == 403
        large = client.post("/gradio_api/upload", files={"files": ("x.png", bytes(2**19))})
        assert large.status_code == 413
