"""The verbs write, continue, score and measure clips as files.

Covers: pipelines/generate.py, pipelines/commands/complete.py, pipelines/commands/compress.py,
pipelines/commands/decompress.py, pipelines/commands/detect.py, pipelines/evaluate.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import fails
from folders import rows_of
from givens.token_datasets import make_split
from PIL import Image
from small import make_prior, make_tokenizer
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.images.animations import gif_bytes
from pipelines.images.clip_files import open_clip
from pipelines.metrics.likelihood import evaluate_frames
from tokenizer.frame_by_frame import FrameByFrame

T, H, W = 3, 8, 12


def make_clips(prior="gpt", channels=1, sizes=None, kind="vqvae", **config):
    torch.manual_seed(0)
    tokenizer = FrameByFrame.wrap(make_tokenizer(kind, (H, W), channels, **(sizes or {})).eval(), T)
    config = {"grid": tokenizer.grid, "num_classes": 2, "tokenizer": tokenizer.fingerprint(), **config}
    return ImagePipeline(tokenizer, make_prior(prior, **config), labels=["cat", "dog"])


@pytest.fixture(scope="module")
def pipe() -> ImagePipeline:
    return make_clips()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory) -> Path:
    """An untrained pipeline of grey clips, and one of images."""
    folder = tmp_path_factory.mktemp("clips")
    pipe.save_pretrained(folder / "pipeline")
    make_pipeline(size=(H, W)).save_pretrained(folder / "images")
    return folder / "pipeline"


def save_clips(folder: Path, count=6, frames=T, seed=0) -> np.ndarray:
    """Write clips (B, T, H, W) as `.npy` in folders of two classes."""
    clips = np.random.default_rng(seed).integers(0, 256, (count, frames, H, W), dtype=np.uint8)
    for number, clip in enumerate(clips):
        (folder / ("cat", "dog")[number % 2]).mkdir(parents=True, exist_ok=True)
        np.save(folder / ("cat", "dog")[number % 2] / f"{number:02d}.npy", clip)
    return clips


def read_clip(path) -> np.ndarray:
    clip = open_clip(str(path))
    return np.stack(
        [np.asarray(Image.fromarray(np.asarray(clip.read(k, True))).convert("L")) for k in range(len(clip))]
    )


def generate(folder, out, *more):
    main(["generate", f"pipeline={folder}", "num_images=4", "seed=3", f"out={out}", *more])


def test_a_folder_holds_the_clips_of_the_pipeline(pipe, folder, tmp_path):
    """As GIF, `.npy` or strips; the sheet names the classes, and each form can be read as clips again."""
    clips = pipe(4, [0, 1, 0, 1], seed=3, output_type="np").images
    generate(folder, tmp_path / "gif")
    generate(folder, tmp_path / "npy", "format=npy")
    generate(folder, tmp_path / "png", "format=png")
    for number, clip in enumerate(clips):
        assert np.array_equal(read_clip(tmp_path / f"gif/{number:05d}.gif"), clip[..., 0])
        assert np.array_equal(np.load(tmp_path / f"npy/{number:05d}.npy"), clip)
        strip = np.asarray(Image.open(tmp_path / f"png/{number:05d}.png"))
        assert np.array_equal(strip, clip.reshape(T * H, W))
    rows = [json.loads(line) for line in (tmp_path / "gif/metadata.jsonl").read_text().splitlines()]
    assert rows[1] == {"file_name": "00001.gif", "label": "dog"}


def test_one_clip_as_a_film(folder, tmp_path):
    pytest.importorskip("av")
    main(["generate", f"pipeline={folder}", "num_images=1", f"out={tmp_path / 'it.mp4'}"])
    assert len(open_clip(str(tmp_path / "it.mp4"))) == T
    main(["complete", f"pipeline={folder}", "frames=1", f"images={tmp_path / 'it.mp4'}", f"out={tmp_path / 'out'}"])
    assert len(open_clip(str(next((tmp_path / "out").glob("*.gif"))))) == T


@pytest.mark.parametrize("form", ["files", "frames"])
def test_files_of_clips_are_continued(pipe, folder, tmp_path, form):
    """From files, or a folder of frames: as `pipe.complete` does, and given frames are kept."""
    clips = save_clips(tmp_path / "in", 2)
    images = f"images=[{tmp_path}/in/cat/00.npy, {tmp_path}/in/dog/01.npy]"
    if form == "frames":
        for number, frame in enumerate(clips[0]):
            (tmp_path / "stills").mkdir(exist_ok=True)
            Image.fromarray(frame).save(tmp_path / f"stills/{number}.png")
        images, clips = f"images={tmp_path}/stills", clips[:1]
    main(["complete", f"pipeline={folder}", "frames=2", images, "draws=2", f"out={tmp_path / 'out'}"])
    expected = pipe.complete(clips[..., None], frames=2, draws=2, seed=0, output_type="np").images[..., 0]
    for clip in range(len(clips)):
        for draw in range(2):
            found = read_clip(tmp_path / f"out/{clip:05d}_{draw}.gif")
            assert np.array_equal(found, expected[clip, draw])
            assert np.array_equal(found[:2], clips[clip, :2])


def test_windows_of_files_are_scored(folder, tmp_path):
    """Each window of a file of several, under the name of the file and with the class of its folder."""
    ImagePipeline.from_pretrained(folder).save_pretrained(tmp_path / "pipeline")
    for split in ("train", "test"):
        save_clips(tmp_path / "data" / split, 40, seed=len(split))
    data = [f"data.source={tmp_path}/data", "data.frames=3", "data.image_size=[8,12]", "data.channels=1"]
    main(["calibrate", verb := f"pipeline={tmp_path}/pipeline", *data, "false_alarms=0.2"])
    pipe = ImagePipeline.from_pretrained(tmp_path / "pipeline")
    assert len(pipe.calibration.digests) == 20, "each second of the 40 held-out windows"
    clips = save_clips(tmp_path / "in", 4, frames=2 * T + 1)
    main(["detect", verb, f"images={tmp_path}/in", "normal_labels=cat", f"out={tmp_path}/out"])
    rows = rows_of(tmp_path / "out/scores.csv")
    assert len(rows) == 8 and [row["class"] for row in rows] == ["cat"] * 4 + ["dog"] * 4
    found = {row["file"]: float(row["score"]) for row in rows}
    window = clips[2, T : 2 * T]
    assert found[f"{tmp_path}/in/cat/02.npy[3:6]"] == pytest.approx(float(pipe.anomaly_score(window)), rel=1e-4)


def test_bits_of_frames_are_those_given_the_past():
    """They add up to the bits of clips, and those of the first frames do not depend on the last."""
    pipe = make_clips()
    tokens = torch.randint(0, pipe.prior.grid.vocab_size, (7, T, 2, 3))
    labels = torch.tensor([0, 1] * 3 + [-1])
    found = evaluate_frames(pipe.prior, T, make_split(tokens, label=labels))
    other = torch.cat([tokens[:, :2], tokens[:, 2:].roll(1, 0)], 1)
    changed = evaluate_frames(pipe.prior, T, make_split(other, label=labels))
    with torch.inference_mode():
        total = -pipe.prior.log_prob(tokens, labels).double().mean() / np.log(2)
    assert sum(found["frame_bits"]) == pytest.approx(float(total), rel=1e-5)
    assert found["bits_per_frame"] == pytest.approx(float(total) / T, rel=1e-5)
    assert found["frame_bits"][:2] == pytest.approx(changed["frame_bits"][:2])
    assert found["frame_bits"][2] != pytest.approx(changed["frame_bits"][2])


# Streams


def read_values(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    clip = open_clip(str(path))
    return np.stack([np.asarray(clip.read(k, True)) for k in range(len(clip))]).reshape(len(clip), H, W, -1)


@pytest.mark.parametrize(
    ("kind", "channels", "lossless", "form"),
    [
        ("pixels", 1, True, "pictures"),
        ("vqvae", 1, False, "pictures"),
        ("vqvae", 3, True, "arrays"),
    ],
)
def test_a_folder_of_clips_comes_back(tmp_path, capsys, kind, channels, lossless, form):
    """With its names, windows numbered; every value if lossless, or else reconstructions, in 256 colours."""
    pytest.importorskip("constriction")
    sizes = {"levels": 256} if kind == "pixels" else {"likelihood": {"kind": "discretized_logistic"}}
    pipe = make_clips("marginal", channels, sizes, kind=kind)
    pipe.save_pretrained(tmp_path / "pipeline")
    clips = np.random.default_rng(1).integers(0, 256, (3, T, H, W, channels), dtype=np.uint8)
    clips = clips if form == "arrays" else clips // 43 * 43  # 6 x 6 x 6 colours, which GIF keeps
    long = np.concatenate([*clips[:2], clips[0, :2]])  # two windows, and two frames
    (tmp_path / "in/of/one").mkdir(parents=True)
    if form == "arrays":
        np.save(tmp_path / "in/long.npy", long)
        np.save(tmp_path / "in/of/one/a.npy", clips[2])
    else:
        (tmp_path / "in/long.gif").write_bytes(gif_bytes(long))
        for number, frame in enumerate(clips[2]):
            Image.fromarray(frame.squeeze()).save(tmp_path / f"in/of/one/{number}.png")
    argv = [f"pipeline={tmp_path / 'pipeline'}", f"images={tmp_path / 'in'}", f"out={tmp_path / 'it.smalti'}"]
    main(["compress", *argv, f"lossless={str(lossless).lower()}"])
    out, err = capsys.readouterr()
    assert "3 clips, " in out and "images: 2 frames at the ends of clips are left out" in out + err
    main(["decompress", argv[0], f"stream={tmp_path / 'it.smalti'}", f"out={tmp_path / 'out'}"])
    assert "out: 3 clips" in capsys.readouterr().out
    exact = lossless or kind == "pixels"
    suffix = ".npy" if exact and channels == 3 else ".gif"
    first, last = ("long.npy", "of/one/a.npy") if form == "arrays" else ("long.gif", "of/one")
    names = [f"{first.removesuffix(suffix)}_{number:05d}{suffix}" for number in (0, 1)]
    names.append(last if last.endswith(suffix) else last + suffix)
    found = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*.*")}
    assert sorted(found) == sorted(names)
    again = np.stack([read_values(found[name]) for name in names])
    expected = clips if exact else pipe.reconstruct(clips, output_type="np")
    assert np.abs(again.astype(int) - expected).max() <= (0 if exact or channels == 1 else 60)
    stored = pipe.decompress((tmp_path / "it.smalti").read_bytes(), output_type="np")
    assert np.array_equal(stored, expected)


def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, capsys):
    """Settings of images, and of the other kind of output; a clip that is too short."""
    monkeypatch.chdir(tmp_path)
    save_clips(tmp_path / "short", 1, frames=2)
    for (verb, *more), key in (
        (["complete", "frames=0"], "frames: "),
        (["complete", "frames=1", "mask=top"], "mask: "),
        (["complete", "frames=1", "images=short/cat/00.npy"], "fewer than data.frames=3"),
        (["generate", "format=gif", "out=it.npz"], "format: "),
        (["compress", "images=short", "out=it.smalti", "tile=true"], "tile: "),
        (["complete", f"pipeline={folder.parent}/images", "frames=1"], "frames: "),
    ):
        assert key in fails(capsys, verb, f"pipeline={folder}", *more)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["short"]
