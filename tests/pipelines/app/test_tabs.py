"""The tabs without a browser: they do the same as the Python code they show; and bad uploads.

Covers: pipelines/app/served.py, pipelines/app/tabs/sample.py, pipelines/app/tabs/complete.py,
pipelines/app/tabs/canvas.py, pipelines/app/tabs/compare.py, pipelines/app/tabs/anomaly.py,
pipelines/app/tabs/infer.py, pipelines/app/tabs/search.py, pipelines/app/tabs/compress.py, pipelines/app/parts.py,
pipelines/app/page.py.
"""

from __future__ import annotations

import base64
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from givens.images import png_of
from optional import Late, needs_digits, needs_gradio
from PIL import Image
from small import make_prior, make_tokenizer
from small_pipelines import as_pil, make_pipeline, pixels_for

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.anomaly.calibrating import calibrate
from pipelines.images.animations import gif_bytes
from pipelines.images.clip_files import open_clip
from pipelines.saving import list_shipped
from tokenizer.frame_by_frame import FrameByFrame

gr, page, parts, served_ = (
    Late(name) for name in ("gradio", *(f"pipelines.app.{x}" for x in ("page", "parts", "served")))
)
sample, complete, canvas, compare, anomaly, infer, search, compress = (
    Late(f"pipelines.app.tabs.{name}")
    for name in ("sample", "complete", "canvas", "compare", "anomaly", "infer", "search", "compress")
)
pytestmark = needs_gradio
SIDE = 12


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    pipe = make_pipeline("pixels", "blocks", size=(SIDE, SIDE), any_order=True)
    calibrate(pipe, pixels_for(pipe, 60))
    return pipe


@pytest.fixture
def served(pipe):
    return served_.Served(pipe, "digits", max_images=8)


@pytest.fixture
def picked(pipe, tmp_path):
    """Three images as the value of a gallery."""
    for number, image in enumerate(as_pil(pixels_for(pipe, 3))):
        image.save(tmp_path / f"{number}.png")
    return [(str(tmp_path / f"{number}.png"), None) for number in range(3)]


def quiet(done, total, unit):
    """A step without a display."""


def settings(pipe):
    """The initial values of the settings."""
    from pipelines.app.controls import get_slider_values

    return list(get_slider_values(pipe).values())


def result_of(code, pipe, monkeypatch, **names):
    """Run the Python code and return `out`."""
    monkeypatch.setattr(ImagePipeline, "from_pretrained", lambda name: pipe)
    exec(code, names)
    return names["out"]


def arrays(images):
    return np.stack([np.asarray(image[0] if isinstance(image, tuple) else image) for image in images])


def test_samples_are_those_of_the_python_lines(served, pipe, monkeypatch):
    images, _, code = sample.sample_images(served, quiet, [], 7, 5, "raster/7", *settings(pipe))
    assert np.array_equal(arrays(images), arrays(result_of(code, pipe, monkeypatch).images))
    assert [caption for _, caption in images[:4]] == ["cat · seed 5", "dog · seed 6", "eel · seed 7", "cat · seed 8"]


def layer(mask, times):
    """The value of the editor after painting a mask."""
    alpha = np.kron(mask, np.full((times, times), 216, np.uint8)).astype(np.uint8)
    return {"background": None, "layers": [np.dstack([np.zeros((*alpha.shape, 3), np.uint8), alpha])]}


def test_a_canvas_is_drawn_and_only_the_painted_part_is_repainted(served, pipe, monkeypatch):
    more = (1, 24, 18, True, 5, *settings(pipe))
    large, drawn, facts, code = canvas.draw_canvas(served, quiet, *more)
    assert np.array_equal(drawn[..., 0], np.asarray(result_of(code, pipe, monkeypatch).images[0]))
    assert large.shape == (24 * 21, 18 * 21, 3) and facts.startswith("24 x 18 pixels, 6 windows in 6 waves")
    mask = np.zeros((24, 18), bool)
    mask[14:20, 2:9] = True
    _, again, _, code = canvas.repaint_canvas(served, quiet, layer(mask, 21), drawn, 1, 24, 18, False, 6, *more[5:])
    assert (again == drawn)[~mask].all() and (again != drawn)[mask].any()
    files = {"image_file": Image.fromarray(drawn[..., 0]), "mask_file": Image.fromarray(mask)}
    lines = re.sub(r"Image.open\(.(\w+).png.\)", r"\1_file", code)
    assert np.array_equal(np.asarray(result_of(lines, pipe, monkeypatch, **files).images[0]), again[..., 0])
    with pytest.raises(ValueError, match="draw an image first"):
        canvas.repaint_canvas(served, quiet, layer(mask, 21), None, *more)


@pytest.mark.parametrize(("inverted", "draws"), [(False, 3), (True, 1)])
def test_only_the_painted_area_is_regenerated(served, pipe, picked, monkeypatch, inverted, draws):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[6:, 2:9] = True
    arguments = (layer(mask, 28), inverted, 1, draws, 3, *settings(pipe))
    (shown_mask, *found), code = complete.complete_image(served, quiet, picked[:1], *arguments)
    image = Image.open(picked[0][0])
    hidden = mask != inverted
    assert np.array_equal(np.asarray(shown_mask[0]), hidden) and len(found) == draws
    assert (arrays(found) == np.asarray(image))[:, ~hidden].all()
    assert (arrays(found) != np.asarray(image))[:, hidden].any()
    lines = re.sub(r"Image.open\(.(\w+).png.\)", r"\1_file", code)
    again = result_of(lines, pipe, monkeypatch, image_file=image, mask_file=shown_mask[0])
    assert np.array_equal(arrays(found), arrays(again.images if draws == 1 else again.images[0]))


def test_a_pixel_counts_as_painted_if_half_of_it_is(served, picked):
    mask = np.zeros((SIDE, SIDE), bool)
    mask[3, 4] = True
    strokes = layer(mask, 28)
    strokes["layers"][0][84:98, 112:126, 3] = 0  # a quarter of the pixel is erased
    assert np.array_equal(complete.find_painted(strokes, SIDE, SIDE), mask)
    with pytest.raises(ValueError, match="nothing is painted"):
        complete.find_painted(layer(np.zeros((SIDE, SIDE)), 28), SIDE, SIDE)
    canvas = complete.enlarge_image(served, quiet, picked[:1])
    assert np.array_equal(canvas[14::28, 14::28, 0], np.asarray(Image.open(picked[0][0])))


def test_the_editor_shows_a_transparent_image_on_white(tmp_path):
    Image.new("RGBA", (12, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    served = served_.Served(make_pipeline(channels=4, sizes={"alpha": True}), "clear")
    canvas = complete.enlarge_image(served, quiet, [(str(tmp_path / "clear.png"), None)])
    assert canvas.shape[2] == 3 and (canvas == 255).all()


def test_an_image_beside_its_reconstruction(served, pipe, picked):
    (image, again, tokens, bits), figures, _ = compare.compare_image(served, quiet, picked[:1], -1)
    assert np.array_equal(np.asarray(image[0]), np.asarray(Image.open(picked[0][0])))
    expected = pipe.reconstruct(Image.open(picked[0][0]))[0]
    assert np.array_equal(np.asarray(again[0]), np.asarray(expected))
    assert tokens[0].size == bits[0].size == (SIDE, SIDE)
    nats = float(pipe.log_prob(Image.open(picked[0][0])))
    assert f"**{-nats / np.log(2):.1f} bits," in figures


def test_a_class_is_inferred_with_its_evidence(served, pipe, picked):
    facts, chart, pictures, code = infer.infer_upload(served, quiet, picked[:1], "label")
    found = pipe.infer(Image.open(picked[0][0]), "label")
    assert f"- label: **{found.mode[0]}**\n- probability: **{float(found.probabilities.max()):.4g}**" in facts
    assert "not calibrated, so too confident" in facts and "pipe.infer(image, 'label')" in code
    assert chart.shape[2] == 3 and len(pictures) == 1
    with pytest.raises(ValueError, match="column: 'label' is given"):
        infer.infer_upload(served, quiet, picked[:1], "label", 1)


def test_an_anomaly_has_a_score_and_a_p_value(served, pipe, picked):
    method = next(iter(pipe.calibration.scores))
    facts, images, _ = anomaly.score_upload(served, quiet, picked[:1], method)
    image = Image.open(picked[0][0])
    p_value = float(pipe.anomaly_score(image, method, p_values=True))
    assert f"score: **{float(pipe.anomaly_score(image, method)):.4g}**" in facts
    assert f"p-value: **{p_value:.3g}**" in facts and len(images) == 2
    with pytest.raises(ValueError):
        served_.picked_files(picked, 2)  # too many


def test_a_calibration_with_a_mixture_scores_by_it(served, pipe, picked, monkeypatch):
    changed = pipe.calibration.model_copy(update={"marginal": "label", "labels": False})
    monkeypatch.setattr(pipe, "calibration", changed)
    method = next(iter(changed.scores))
    facts, _, code = anomaly.score_upload(served, quiet, picked[:1], method)
    expected = float(pipe.anomaly_score(Image.open(picked[0][0]), method, marginal="label"))
    assert f"score: **{expected:.4g}**" in facts and "marginal='label', p_values=True" in code


class Train:
    """Training images without classes."""

    labels = None

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def pixels(self, rows):
        return self.images[rows]

    def names(self, rows):
        return [f"row {row}" for row in rows]


def test_a_training_image_is_nearest_to_itself_and_stopping_keeps_the_index(pipe, picked):
    train = Train(pixels_for(pipe, 150))
    train.images[97] = torch.from_numpy(np.array(Image.open(picked[0][0])))
    served = served_.Served(pipe, "digits", train=train)
    index, seen = search.SearchIndex(served, train), []

    def stop_late(done, total, unit):
        seen.append(done)
        if done == 64:
            raise served_.Stopped

    with pytest.raises(served_.Stopped):
        search.find_neighbours(index, served, stop_late, picked[:1], 3)
    images = search.find_neighbours(index, served, lambda done, total, unit: seen.append(done), picked[:1], 3)
    assert seen == [0, 64, 64, 128] and images[1][1].startswith("row 97, distance 0.000")
    assert np.array_equal(np.asarray(images[1][0]), np.asarray(Image.open(picked[0][0])))


# Clips

T = 3


@pytest.fixture(scope="module")
def clips():
    """A calibrated pipeline of clips in colour."""
    torch.manual_seed(0)
    frames = make_tokenizer("vqvae", (8, 12), 3, likelihood={"kind": "discretized_logistic"})
    tokenizer = FrameByFrame.wrap(frames.eval(), T)
    prior = make_prior("masked", grid=tokenizer.grid, num_classes=2, tokenizer=tokenizer.fingerprint())
    pipe = ImagePipeline(tokenizer, prior, labels=["cat", "dog"])
    calibrate(pipe, random_clips(pipe, 40))
    return pipe


def random_clips(pipe, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *pipe.spec.shape), dtype=torch.uint8, generator=generator)


def frames_of(path):
    """The frames of a file, uint8 (T, H, W, C)."""
    clip = open_clip(str(path))
    return np.stack([np.atleast_3d(clip.read(k, True)) for k in range(len(clip))])


def to_array(clips):
    return clips.movedim(-3, -1).numpy()


def test_sampled_clips_move_and_are_exact(clips, monkeypatch):
    """Also where frames are equal; the files are those that the other tabs take."""
    served = served_.Served(clips, "clips", max_images=8)
    images, facts, code = sample.sample_images(served, quiet, [], 3, 5, "", *settings(clips))
    expected = clips(3, ["cat", "dog", "cat"], seed=5, output_type="np").images
    assert facts.startswith("3 clips in ") and [caption for _, caption in images][1] == "dog · seed 6"
    for (path, _), clip in zip(images, expected, strict=True):
        assert np.array_equal(frames_of(path), clip)
        assert torch.equal(served_.picked_image([(path, None)], clips.spec)[0], torch.from_numpy(clip).movedim(-1, -3))
    again = result_of(code, clips, monkeypatch).images
    assert np.array_equal(np.stack([frames_of(served_.to_gallery(one)) for one in again]), expected)
    still = torch.full(clips.spec.shape, 7, dtype=torch.uint8)
    assert np.array_equal(frames_of(served_.to_gallery(still)), to_array(still))


@pytest.mark.parametrize("draws", [1, 2])
def test_a_clip_is_continued_from_its_first_frames(clips, draws, monkeypatch):
    served = served_.Served(clips, "clips", max_images=8)
    (clip,) = random_clips(clips, 1)
    file = served_.to_gallery(clip)
    arguments = (2, 1, draws, 3, *settings(clips))
    (shown, *found), code = complete.continue_clip(served, quiet, [(file, None)], *arguments)
    expected = clips.complete(clip, frames=2, labels=1, draws=draws, seed=3, output_type="np").images
    expected = expected.reshape(draws, T, 8, 12, -1)
    assert np.array_equal(frames_of(shown[0]), to_array(clip))
    assert np.array_equal(np.stack([frames_of(path) for path, _ in found]), expected)
    assert (expected[:, :2] == to_array(clip)[:2]).all() and (expected[:, 2] != to_array(clip)[2]).any()
    opened = Image.open(file)
    again = result_of(code.replace('Image.open("clip.png")', "opened"), clips, monkeypatch, opened=opened)
    assert np.array_equal(clips.complete(clip, frames=2, labels="dog", draws=draws, seed=3).tokens, again.tokens)


def test_clips_are_compared_scored_and_searched(clips):
    served = served_.Served(clips, "clips", train=Train(random_clips(clips, 20, seed=1)))
    clip = served.train.images[13]
    picked = [(served_.to_gallery(clip), None)]
    (image, again, tokens, bits), figures, code = compare.compare_image(served, quiet, picked, 0)
    assert np.array_equal(frames_of(again[0]), clips.reconstruct(clip, output_type="np")[0])
    ids, colours = clips.encode(clip)[0], frames_of(tokens[0])
    assert colours.shape == (*clips.prior.grid.shape, 3) and (ids[0] != ids[2]).any()
    assert (colours[0] == colours[2]).all(-1).tolist() == (ids[0] == ids[2]).tolist()
    heat = frames_of(bits[0])
    assert heat.shape == (T, 8, 12, 3) and len({frame.tobytes() for frame in heat}) == T
    assert "bits per dim" in figures and "ImageSequence" in code and "import numpy as np" in code
    nats = float(clips.log_prob(clip, "cat"))
    assert f"**{-nats / np.log(2):.1f} bits," in figures or not clips.prior.exact
    method = next(iter(clips.calibration.scores))
    facts, shown, _ = anomaly.score_upload(served, quiet, picked, method)
    assert f"score: **{float(clips.anomaly_score(clip, method)):.4g}**" in facts and len(shown) == 2
    found = search.find_neighbours(search.SearchIndex(served, served.train), served, quiet, picked, 2)
    assert found[1][1].startswith("row 13, distance 0.000")
    assert np.array_equal(frames_of(found[1][0]), to_array(clip))


def test_streams_of_clips_come_back(clips):
    """All windows of all files, exactly if lossless."""
    pytest.importorskip("constriction")
    served = served_.Served(clips, "clips", max_images=4)
    some = random_clips(clips, 3)
    long = served_.to_gallery(torch.cat([*some[:2], some[0, :1]]))
    picked = [(long, None), (served_.to_gallery(some[2]), None)]
    link = compress.compress_images(served, quiet, picked, True)
    data = base64.b64decode(re.search(r"base64,([^\"]+)", link)[1])
    facts, found = compress.decompress_stream(served, quiet, data)
    assert np.array_equal(np.stack([frames_of(path) for path, _ in found]), to_array(some))
    assert facts.startswith("3 clips from ") and "3 clips: " in link
    served.max_images = 2
    with pytest.raises(ValueError, match="3 clips.*limit is 2"):
        compress.compress_images(served, quiet, picked, True)
    with pytest.raises(ValueError, match="3 images.*limit is 2"):
        compress.decompress_stream(served, quiet, data)


def test_visitors_bring_gif_and_animated_png_and_webp(clips, tmp_path, monkeypatch):
    """What is no clip, too short or too large is one line, and large ones are not decoded."""
    served = served_.Served(clips, "clips")
    (clip,) = random_clips(clips, 1) // 64 * 64
    pictures = [Image.fromarray(frame.squeeze()).convert("RGB") for frame in to_array(clip)]
    (tmp_path / "a.gif").write_bytes(gif_bytes(to_array(clip)))
    for name in ("a.png", "a.webp"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], lossless=True, duration=99)
    for name in ("a.gif", "a.png", "a.webp"):
        assert torch.equal(served_.picked_image([(str(tmp_path / name), None)], clips.spec)[0], clip), name
    pictures[0].save(tmp_path / "still.png")
    (tmp_path / "bomb.png").write_bytes(png_of(20_000, 20_000))
    (tmp_path / "text.gif").write_text("no picture")
    loaded, load = [], Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda image: loaded.append(image.size) or load(image))
    for name in ("still.png", "bomb.png", "text.gif"):
        with pytest.raises(gr.Error) as caught:
            served.handler(compare.compare_image)(visitor(), quiet_progress, [(str(tmp_path / name), None)], -1)
        assert caught.value.print_exception is False, name
        assert "\n" not in caught.value.message and str(tmp_path) not in caught.value.message
    assert not [size for size in loaded if max(size) > 1000]


def visitor(name="me"):
    return SimpleNamespace(session_hash=name)


def quiet_progress(*progress, **more):
    """A progress bar without a display."""


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError("a <b>\nc\x1b[1m"), "a &lt;b&gt; c"),
        (KeyError("/secret"), "Something went wrong"),
    ],
)
def test_mistakes_are_shown_and_bugs_are_logged(served, error, shown):
    def work(served, step):
        raise error

    with pytest.raises(gr.Error) as caught:
        served.handler(work)(visitor(), quiet_progress)
    assert caught.value.message.startswith(shown) and "\x1b" not in caught.value.message
    assert caught.value.print_exception == (not isinstance(error, ValueError))


def test_a_visitor_stops_only_their_own_work(served, pipe, monkeypatch):
    monkeypatch.setattr("gradio.Info", lambda text, **more: None)
    monkeypatch.setattr("pipelines.app.served.REPORT_SECONDS", -1)
    seen = []

    def progress(at, unit):
        seen.append(at)
        served.stop(visitor("another" if at[0] < 144 else "me"))

    def work(served, step):
        return sample.sample_images(served, step, [], 2, 0, "", *settings(pipe))

    served.stop(visitor("me"))  # nothing is running yet
    assert served.handler(work)(visitor("me"), progress) == gr.skip()
    assert seen[-1] == (144, 288)
    assert len(served.handler(work)(visitor("me"), quiet_progress)) == 3


@pytest.mark.parametrize("kind", [("pixels", "masked"), ("titok", "gpt"), ("vqvae", "next_scale")])
def test_a_page_of_every_kind_of_pipeline(kind, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "True")  # which gradio sets
    torch.manual_seed(0)
    pipe = make_pipeline(*kind, size=(8, 12), labels=[] if kind[1] == "masked" else ["cat", "dog", "eel"])
    served = served_.Served(pipe, "a/b/c")
    built = page.build_page([served])
    assert built.title == "Smalti: b/c" and "--side: 108px" in page.make_css([served])
    opened = [event for event in built.fns.values() if any(name == "load" for _, name in event.targets)]
    assert [len(event.outputs) for event in opened] == [4], "it samples when it is opened"


@needs_digits
def test_without_a_pipeline_the_app_serves_those_of_the_package(monkeypatch, tmp_path):
    """Even if a local folder has the name of one; with the training images that are on this machine, to search."""
    calls = []
    monkeypatch.setattr("pipelines.app.serving.serve", lambda *given: calls.append(given))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    main(["app", "max_images=3", "port=7999"])
    ((served, host, port, _),) = calls
    assert [each.name for each in served] == ["sprites", "digits", "garments"]
    assert {each.name for each in served} == {*list_shipped()} and (host, port) == ("127.0.0.1", 7999)
    for each in served:
        assert each.max_images == 3 and (each.train is not None) == (each.name == "digits")  # others are on the Hub
