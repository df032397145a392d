"""The page in a real browser, step by step as a visitor takes them; and the server, asked for more than the page asks.

Covers: pipelines/app/elements.py, pipelines/app/page.py, pipelines/app/served.py, pipelines/app/serving.py,
pipelines/app/widgets.py, pipelines/app/tabs/sample.py, pipelines/app/tabs/complete.py, pipelines/app/tabs/compare.py,
pipelines/app/tabs/anomaly.py, pipelines/app/tabs/search.py, pipelines/app/tabs/compress.py.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import struct
import time
import zlib

import httpx
import numpy as np
import pytest
import torch
from optional import needs_gradio
from PIL import Image
from servers.app_server import Driver, app
from servers.chromium import browser
from small_pipelines import make_pipeline, pixels_for

from pipelines import ImagePipeline
from pipelines.anomaly.calibrating import calibrate

pytestmark = needs_gradio
SIDE, IMAGES, MEGABYTES = 12, 400, 0.25
LABELS = ["cat", "<b>dog</b>", "${7*7} {{eel}}"]  # a pipeline may come from anybody


RIGHT = """() => {
  const parts = document.querySelectorAll("button, img, canvas, input, .smalti-picker, .block");
  const seen = [...parts].filter((part) => part.offsetParent && part.closest("[role=tabpanel]"));
  return Math.max(...seen.map((part) => part.getBoundingClientRect().right));
}"""
"""How far to the right the parts of the tab that is shown reach, in pixels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small calibrated pipeline that takes any order in blocks, and a folder of images to search."""
    pytest.importorskip("constriction")
    place = tmp_path_factory.mktemp("app")
    torch.manual_seed(0)
    pipe = make_pipeline("pixels", "blocks", size=(SIDE, SIDE), labels=LABELS, any_order=True)
    calibrate(pipe, pixels_for(pipe, 60))
    pipe.save_pretrained(place / "pipeline")
    for number, pixels in enumerate(pixels_for(pipe, 40)):
        (place / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels[0].numpy()).save(place / "images" / f"{number}.png")
    (place / "here").mkdir()
    return place


@pytest.fixture(scope="module")
def server(folder):
    keys = [f"max_images={IMAGES}", f"max_upload_mb={MEGABYTES}", "queue=2", f"data.source={folder / 'images'}"]
    keys += [f"data.image_size={SIDE}", "data.channels=1"]
    here = folder / "here"
    with app(folder / "pipeline", here, *keys, TMPDIR=str(here)) as running:
        yield running
        assert len(list(here.glob("smalti-app-*"))) == 1
    assert not list(here.glob("smalti-app-*"))  # what gradio wrote, if anything, is gone
    assert running.process.returncode == 0 and "a request of the page failed" not in running.said


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@contextlib.contextmanager
def sampled(server, chromium):
    """A page on which six images were sampled. Whatever is done with it, its console stays without errors, and it asks
    nothing of another machine."""
    driver = Driver(chromium.new_page(viewport={"width": 1280, "height": 900}), server.url)
    driver.number("number input for Images", 6)
    driver.click("Sample")
    driver.wait("#samples figure >> nth=5")
    yield driver
    assert not driver.problems, driver.problems
    assert {url.split("/")[2] for url in driver.asked if not url.startswith("data:")} == {server.url.split("/")[2]}
    driver.page.close()


@pytest.fixture(scope="module")
def shared_page(server, chromium):
    with sampled(server, chromium) as driver:
        yield driver


@pytest.fixture
def page(shared_page):
    """A page that others have used, with its first tab in front. Its samples and their settings stay as they are."""
    shared_page.tab("Sample")
    return shared_page


@pytest.fixture
def own_page(server, chromium):
    """For a test that looks at the settings of samples, or changes them."""
    with sampled(server, chromium) as driver:
        yield driver


def shown(driver, name):
    """The pictures that are shown under a name, uint8 arrays."""
    sources = driver.page.locator(f"#{name} figure img").evaluate_all("images => images.map(image => image.src)")
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))) for source in sources]


def captions(driver, name):
    return driver.page.locator(f"#{name} figcaption").all_inner_texts()


def write_png(path, size):
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(image).save(path)
    return path


def hostile_png(path):
    """100,000 x 100,000 pixels in a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))
    return path


# What a visitor does


def test_samples_are_those_of_the_python_lines(own_page, folder):
    """What the page shows is what the lines beside it make; names of classes are text, whatever is in them."""
    code = own_page.page.locator(".cm-content").first.inner_text()
    assert "pipe(6, seed=0, labels=(pipe.labels * 2)[:6])" in code and str(folder / "pipeline") in code
    pipe = ImagePipeline.from_pretrained(folder / "pipeline")
    expected = pipe(6, seed=0, labels=(pipe.labels * 2)[:6], progress=False, output_type="np").images[..., 0]
    assert np.array_equal(np.stack(shown(own_page, "samples")), expected)
    assert captions(own_page, "samples")[:3] == [f"{label} · seed {seed}" for seed, label in enumerate(LABELS)]


def test_small_images_are_shown_large_and_crisp(page):
    image = page.page.locator("#samples img").first
    style = image.evaluate("image => [image.width / image.naturalWidth, getComputedStyle(image).imageRendering]")
    assert style == [9, "pixelated"]


def test_fewer_passes_by_the_slider(own_page, folder):
    own_page.number("number input for Passes", 3)
    own_page.click("Sample")
    own_page.page.wait_for_selector("text=order=")
    code = own_page.page.locator(".cm-content").first.inner_text()
    assert f"order='raster/{SIDE * SIDE // 3}'" in code
    pipe = ImagePipeline.from_pretrained(folder / "pipeline")
    options = {"order": f"raster/{SIDE * SIDE // 3}", "progress": False, "output_type": "np"}
    expected = pipe(6, seed=0, labels=(pipe.labels * 2)[:6], **options).images[..., 0]
    assert np.array_equal(np.stack(shown(own_page, "samples")), expected)


def test_paint_and_complete(page):
    """Only what is painted changes."""
    page.page.locator("#samples figure").nth(2).click()
    sample = shown(page, "samples")[2]
    page.tab("Complete")
    page.click("Complete")
    assert "pick an image first" in page.toast()
    page.click("Take the chosen sample")
    canvas = page.wait("#painting .filled canvas")
    page.click("Complete")
    assert "nothing is painted" in page.toast()
    box = canvas.bounding_box()
    for share in (0.1, 0.9):
        page.page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.8 * box["height"])
        page.page.mouse.down() if share == 0.1 else page.page.mouse.up()
    mask = np.array(list(value(page, "painting")["mask"])).reshape(SIDE, SIDE) == "1"
    assert mask.any(1)[SIDE * 8 // 10] and mask.any(0)[2:-2].all() and not mask[: SIDE // 2].any()
    page.click("Complete")
    page.wait("#completed figure >> nth=3")
    draws = np.stack(shown(page, "completed"))
    near = np.abs(draws.astype(int) - sample)[:, ~mask]
    assert draws.shape == (4, SIDE, SIDE) and near.max() == 0
    assert len({draw.tobytes() for draw in draws}) > 1


def value(driver, name):
    """What a part of the page would send."""
    return json.loads(
        driver.page.evaluate(
            """name => {
              const canvas = document.querySelector(`#${name} canvas`);
              const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
              const mask = [];
              for (let at = 0; at < pixels.length; at += 4) mask.push(Number(pixels[at] - pixels[at + 2] > 10));
              return JSON.stringify({ mask: mask.join("") });
            }""",
            name,
        )
    )


def test_compare_an_uploaded_image(page, tmp_path):
    page.tab("Compare")
    page.pick("compare-image", write_png(tmp_path / "good.png", 40))
    page.wait("#compare-image .filled")
    page.click("Compare")
    page.wait("#compared figure >> nth=3")
    image, again, tokens, surprise = shown(page, "compared")
    assert image.shape == again.shape == (SIDE, SIDE) and tokens.shape == (SIDE, SIDE, 3) == surprise.shape
    assert len(np.unique(again)) <= 5 and np.abs(image.astype(int) - again).max() <= 32  # five grey levels
    assert "bits of the tokens" in page.page.locator("#compare-facts").inner_text()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.write_text("no picture at all"), "not an image in one of the formats"),
        (hostile_png, "cannot be read"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(90)), "cannot be read"),
    ],
    ids=["text", "hostile", "cut off"],
)
def test_a_bad_file_gets_a_sentence(page, server, tmp_path, make, sentence):
    make(path := tmp_path / "bad.png")
    page.tab("Compare")
    page.pick("compare-image", path)
    page.wait("#compare-image .filled")
    page.click("Compare")
    assert sentence in page.toast()
    assert "a request of the page failed" not in server.said


def test_too_large_a_file_is_not_even_sent(page, tmp_path):
    page.tab("Compare")
    page.pick("compare-image", write_png(tmp_path / "large.png", 400))
    page.wait("#compare-image .problem >> text=at most 0.3 MB")
    page.click("Compare")
    assert "pick a file first" in page.toast()


def test_an_anomaly_has_a_p_value(page):
    page.tab("Anomaly")
    page.click("Take the chosen sample")
    page.wait("#anomaly-image .filled")
    page.click("Score")
    page.wait("#scored figure >> nth=1")
    assert "p-value" in page.page.locator("#anomaly-facts").inner_text()


def test_the_nearest_training_images(page, folder):
    page.tab("Search")
    page.pick("search-image", folder / "images" / "7.png")
    page.wait("#search-image .filled")
    page.click("Search")
    page.wait("#found figure >> nth=9")
    query, *found = shown(page, "found")
    held = [np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))]
    assert all(any(np.array_equal(image, other) for other in held) for image in found)
    assert np.array_equal(query, np.asarray(Image.open(folder / "images" / "7.png")))


def test_compress_and_decompress(page, tmp_path):
    samples = np.stack(shown(page, "samples"))
    page.tab("Compress")
    page.click("Take all samples")
    page.wait("#compress-images .filled")
    page.click("Compress")
    link = page.wait("#stream-link a")
    with page.page.expect_download() as download:
        link.click()
    download.value.save_as(tmp_path / "images.smalti")
    assert "6 images" in page.page.locator("#stream-link").inner_text()
    page.pick("stream", tmp_path / "images.smalti")
    page.wait("#stream .filled")
    page.click("Decompress")
    page.wait("#decompressed figure >> nth=5")
    assert np.array_equal(np.stack(shown(page, "decompressed")), samples)
    (tmp_path / "other.smalti").write_bytes(b"no stream")
    page.pick("stream", tmp_path / "other.smalti")
    page.click("Decompress")
    assert "not a stream of ours" in page.toast()


def test_long_sampling_shows_its_steps_and_stops(own_page, server):
    before = captions(own_page, "samples")
    own_page.number("number input for Images", IMAGES)
    own_page.click("Sample")
    own_page.wait(".progress-text:has-text('/57.6k tokens')")
    own_page.click("Stop")
    assert "stopped after" in own_page.toast()
    own_page.number("number input for Images", 6)
    own_page.click("Sample")
    own_page.wait("text=6 images in")
    assert captions(own_page, "samples") == before


def test_a_narrow_page_does_not_overflow(server, chromium):
    """As on a phone, with pictures in it."""
    driver = Driver(chromium.new_page(viewport={"width": 390, "height": 844}), server.url)
    driver.number("number input for Images", 6)
    driver.click("Sample")
    driver.wait("#samples figure >> nth=5")
    for name in ("Complete", "Compare", "Anomaly", "Search", "Compress", "Sample"):
        driver.tab(name)
        if name == "Complete":
            driver.click("Take the chosen sample")
            driver.wait("#painting .filled canvas")
        driver.page.wait_for_timeout(100)
        assert driver.page.evaluate("document.documentElement.scrollWidth") == 390, name
        assert driver.page.evaluate(RIGHT) <= 390, name  # also of what would be cut off
    driver.page.close()


# What a visitor could do besides


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as found:
        yield found


@pytest.fixture(scope="module")
def functions(client):
    return {each["api_name"]: each for each in client.get("/config").json()["dependencies"]}


def joined(client, functions, name, data, session):
    body = {"data": data, "fn_index": functions[name]["id"], "session_hash": session}
    return client.post("/gradio_api/queue/join", json=body)


def outcome(client, session):
    """The last message of a session."""
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if message.get("msg") == "process_completed":
                return message
    return {}


def sample_data(functions, count):
    settings = len(functions["sample"]["inputs"]) - 5
    return [[], count, 0, "", 0, 1, "", 1, 1, "", ""][: 5 + settings]


def test_no_route_takes_or_gives_a_file(client, folder):
    secret = folder / "pipeline" / "model_index.json"
    for path in (
        f"/gradio_api/file={secret}",
        "/gradio_api/file=/etc/passwd",
        f"/file={secret}",
        f"/gradio_api/file/{secret}",
        "/gradio_api/file=http://127.0.0.1:1/x",
        "/gradio_api/proxy=http://127.0.0.1:1/x",
        "/assets/../../routes.py",
        "/assets/%2e%2e/%2e%2e/routes.py",
        "/static/..%2f..%2f..%2fetc/passwd",
        "/gradio_api/stream/a/b/1/playlist-file",
        "/gradio_api/deep_link?session_hash=a",
        "/gradio_api/runs",
        "/monitoring",
    ):
        answer = client.get(path)
        assert answer.status_code in (403, 404) and "_class_name" not in answer.text, path
    answer = client.post("/gradio_api/upload", files={"files": ("../../x.png", b"x")})
    assert answer.status_code == 404
    assert client.post("/gradio_api/component_server", json={}).status_code == 404
    assert client.post("/gradio_api/run/sample", json={"data": []}).status_code == 404


def test_no_value_names_a_file(client, functions):
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    for value in (file, [file], {"background": file}):
        answer = joined(client, functions, "compare", [value, -1], "files")
        assert answer.status_code == 403 and "names no file" in answer.text


def test_too_many_images_are_refused_whatever_the_page_allows(client, functions):
    assert joined(client, functions, "sample", sample_data(functions, IMAGES + 1), "many").status_code == 200
    message = outcome(client, "many")
    assert message["success"] is False and str(IMAGES) in message["output"]["error"]


def test_too_long_a_request_is_refused(client, functions):
    long = "data:image/png;base64," + "A" * int(2**20 * MEGABYTES * 1.6)
    answer = joined(client, functions, "compare", [json.dumps({"files": [long]}), -1], "long")
    assert answer.status_code == 413 and "at most" in answer.text
    chunks = (b" " * 2**16 for _ in range(100))
    answer = client.post("/gradio_api/queue/join", content=chunks, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_another_name_of_this_machine_is_refused(client):
    assert client.get("/config", headers={"Host": "evil.example:80"}).status_code == 403


@pytest.mark.slow
def test_a_full_queue_is_told(client, functions, own_page):
    """One request is worked on, two wait, and the next one is told to come back."""
    sessions = [f"full{number}" for number in range(4)]
    found = [joined(client, functions, "sample", sample_data(functions, IMAGES), name) for name in sessions]
    deadline = time.monotonic() + 5
    while found[-1].status_code == 200 and time.monotonic() < deadline:
        sessions.append(f"full{len(sessions)}")
        found.append(joined(client, functions, "sample", sample_data(functions, IMAGES), sessions[-1]))
    assert found[-1].status_code == 503 and "full" in found[-1].json()["detail"]
    own_page.click("Sample")
    assert "busy" in own_page.toast()
    stopped = functions["stop"]["id"]
    for _ in range(40):  # each as soon as it is worked on
        for name in sessions:
            client.post("/gradio_api/run/predict", json={"data": [], "fn_index": stopped, "session_hash": name})
        time.sleep(0.05)
    own_page.problems[:] = [text for text in own_page.problems if "503" not in text]
