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
from givens.token_datasets import make_split
from PIL import Image
from small import make_prior, make_tokenizer
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.commands.complete import ORANGE
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


def describe_data(source) -> list[str]:
    return [f"data.source={source}", "data.frames=3", "data.image_size=[8,12]", "data.channels=1"]


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


def test_a_sheet_of_clips_moves_or_shows_strips(pipe, folder, tmp_path):
    clips = pipe(4, [0, 1, 0, 1], seed=3, output_type="np").images
    for name in ("it.gif", "it.png", "it.npz"):
        generate(folder, tmp_path / name, "captions=false", "columns=4")
    moving = read_clip(tmp_path / "it.gif")
    assert len(moving) == T
    for number in range(T):  # enlarged five times, with two pixels around each
        for column in range(4):
            cell = moving[number, 2:-2, 2 + 62 * column :][:, :60][::5, ::5]
            assert np.array_equal(cell, clips[column, number, ..., 0])
    assert Image.open(tmp_path / "it.png").height == 4 + T * H * 5
    with np.load(tmp_path / "it.npz") as found:
        assert np.array_equal(found["arr_0"], clips) and found["arr_1"].tolist() == [0, 1, 0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.gif", "it.npz", "it.png"]


def test_one_clip_as_a_film(folder, tmp_path):
    pytest.importorskip("av")
    main(["generate", f"pipeline={folder}", "num_images=1", f"out={tmp_path / 'it.mp4'}"])
    assert len(open_clip(str(tmp_path / "it.mp4"))) == T
    main(["complete", f"pipeline={folder}", "frames=1", f"images={tmp_path / 'it.mp4'}", f"out={tmp_path / 'out'}"])
    assert len(open_clip(str(next((tmp_path / "out").glob("*.gif"))))) == T


@pytest.mark.parametrize("form", ["files", "folder", "frames"])
def test_files_of_clips_are_continued(pipe, folder, tmp_path, form):
    """From files, a folder of clips, or a folder of frames: as `pipe.complete` does, and given frames are kept."""
    clips = save_clips(tmp_path / "in", 2)
    named = {"files": [f"{tmp_path}/in/cat/00.npy", f"{tmp_path}/in/dog/01.npy"], "folder": [f"{tmp_path}/in"]}
    if form == "frames":
        for number, frame in enumerate(clips[0]):
            (tmp_path / "stills").mkdir(exist_ok=True)
            Image.fromarray(frame).save(tmp_path / f"stills/{number}.png")
        named["frames"], clips = [f"{tmp_path}/stills"], clips[:1]
    images = f"images=[{','.join(named[form])}]"
    main(["complete", f"pipeline={folder}", "frames=2", images, "draws=2", f"out={tmp_path / 'out'}"])
    expected = pipe.complete(clips[..., None], frames=2, draws=2, seed=0, output_type="np").images[..., 0]
    for clip in range(len(clips)):
        for draw in range(2):
            found = read_clip(tmp_path / f"out/{clip:05d}_{draw}.gif")
            assert np.array_equal(found, expected[clip, draw])
            assert np.array_equal(found[:2], clips[clip, :2])


def test_the_sheet_marks_what_was_drawn(folder, tmp_path):
    save_clips(tmp_path / "in", 2)
    run = ["complete", f"pipeline={folder}", "frames=1", f"images={tmp_path / 'in'}", "draws=1"]
    main([*run, f"out={tmp_path / 'it.png'}"])
    main([*run, f"out={tmp_path / 'it.gif'}"])
    corners = np.asarray(Image.open(tmp_path / "it.png"))[:: H * 5 + 4, :: W * 5 + 4]
    drawn = (corners == ORANGE).all(-1)
    assert drawn.tolist() == [[False] * T, [False, True, True]] * 2
    clip = open_clip(str(tmp_path / "it.gif"))
    for number in range(T):
        corners = np.asarray(clip.read(number, False).convert("RGB"))[:: H * 5 + 4, :: W * 5 + 4]
        near = np.abs(corners.astype(int) - ORANGE).max(-1) < 20
        assert near.tolist() == [[False, number >= 1]] * 2


def test_windows_of_files_are_scored(folder, tmp_path, capsys):
    """Each window of a file of several, under the name of the file and with the class of its folder."""
    ImagePipeline.from_pretrained(folder).save_pretrained(tmp_path / "pipeline")
    for split in ("train", "test"):
        save_clips(tmp_path / "data" / split, 40, seed=len(split))
    main(["calibrate", f"pipeline={tmp_path / 'pipeline'}", *describe_data(tmp_path / "data"), "false_alarms=0.2"])
    pipe = ImagePipeline.from_pretrained(tmp_path / "pipeline")
    assert len(pipe.calibration.digests) == 20, "each second of the 40 held-out windows"
    clips = save_clips(tmp_path / "in", 4, frames=2 * T + 1)
    out = tmp_path / "out"
    main(
        ["detect", f"pipeline={tmp_path / 'pipeline'}", f"images={tmp_path / 'in'}", "normal_labels=cat", f"out={out}"]
    )
    rows = [line.split(",") for line in (out / "scores.csv").read_text().splitlines()]
    found = {row[0]: float(row[rows[0].index("score")]) for row in rows[1:]}
    assert len(found) == 8 and [row[1] for row in rows[1:]] == ["cat"] * 4 + ["dog"] * 4
    window = clips[2, T : 2 * T]
    assert found[f"{tmp_path}/in/cat/02.npy[3:6]"] == pytest.approx(float(pipe.anomaly_score(window)), rel=1e-4)
    scored = ["detect", f"pipeline={tmp_path / 'pipeline'}", f"images={tmp_path / 'in'}", f"out={tmp_path / 'new'}"]
    truth = ["normal_labels=cat", f"ground_truth={tmp_path}"]
    assert "ground_truth: is for images" in fails(capsys, *scored, *truth)
    assert "tile" in fails(capsys, *scored, "tile=true")


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
    assert evaluate_frames(pipe.prior, 1, make_split(tokens, label=labels)) == {}
    backwards = make_prior("gpt", grid=pipe.tokenizer.grid, num_classes=0, any_order=True, order="random:0")
    assert evaluate_frames(backwards, T, make_split(tokens)) == {}


# Streams


def read_values(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    clip = open_clip(str(path))
    return np.stack([np.asarray(clip.read(k, True)) for k in range(len(clip))]).reshape(len(clip), H, W, -1)


@pytest.mark.parametrize(
    ("kind", "channels", "lossless", "form"),
    [
        ("pixels", 1, False, "arrays"),
        ("pixels", 1, True, "pictures"),
        ("vqvae", 1, False, "pictures"),
        ("vqvae", 3, True, "arrays"),
        ("vqvae", 3, True, "pictures"),
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


def test_only_clips_of_the_size_are_compressed_or_resized_ones(tmp_path, capsys):
    """Exact pixels: no clip of another size, none of other values than 8 bits, no colours in grey."""
    pytest.importorskip("constriction")
    pipe = make_clips("marginal", sizes={"levels": 256}, kind="pixels")
    pipe.save_pretrained(tmp_path / "pipeline")
    clip = np.random.default_rng(1).integers(0, 256, (T, H, W, 1), dtype=np.uint8)
    argv = [f"pipeline={tmp_path / 'pipeline'}", f"out={tmp_path / 'it.smalti'}", "lossless=true"]
    (tmp_path / "large.gif").write_bytes(gif_bytes(clip.repeat(2, 1)))
    (tmp_path / "cut.gif").write_bytes(gif_bytes(clip)[:-60])
    (tmp_path / "colours.gif").write_bytes(gif_bytes(np.concatenate([clip, 255 - clip, clip], -1)))
    np.save(tmp_path / "large.npy", clip.repeat(2, 2))
    np.save(tmp_path / "deep.npy", clip.astype(np.uint16))
    for name, word in {
        "large.gif": "frame 0: the pipeline's images are 12 x 8 pixels, this one is 12 x 16; resize=true",
        "large.npy": "this one is 24 x 8",
        "deep.npy": "its values are uint16, not uint8",
        "cut.gif": "remove or replace this file",
        "colours.gif": "frame 0: shape (8, 12, 3)",
    }.items():
        line = fails(capsys, "compress", *argv, f"images={tmp_path / name}")
        assert word in line and name in line and not (tmp_path / "it.smalti").exists()
    few = clip // 64 * 64  # with a palette of four greys, which Pillow reads as colours
    (tmp_path / "few.gif").write_bytes(gif_bytes(few.repeat(3, -1)))
    main(["compress", *argv, f"images={tmp_path / 'few.gif'}"])
    assert np.array_equal(pipe.decompress((tmp_path / "it.smalti").read_bytes(), output_type="np")[0], few)
    main(["compress", *argv, f"images={tmp_path / 'large.gif'}", "resize=true", "overwrite=true"])
    assert len(pipe.decompress((tmp_path / "it.smalti").read_bytes())) == 1
    (tmp_path / "both").mkdir()
    for name in ("large.gif", "large.npy"):
        (tmp_path / name).rename(tmp_path / "both" / name)
    assert ".npy clips and others" in fails(capsys, "compress", *argv, f"images={tmp_path / 'both'}", "overwrite=true")


def test_one_table_serves_both_ways_for_folders_and_longer_clips(folder, tmp_path):
    pytest.importorskip("constriction")
    frames = np.random.default_rng(0).integers(0, 256, (2 * T, H, W, 1), dtype=np.uint8)
    (tmp_path / "in" / "walk").mkdir(parents=True)
    (tmp_path / "in" / "long.gif").write_bytes(gif_bytes(frames))
    (tmp_path / "in" / "run_00001.gif").write_bytes(gif_bytes(frames[:T]))
    for number, frame in enumerate(frames[:T]):
        Image.fromarray(frame[..., 0]).save(tmp_path / "in" / "walk" / f"{number}.png")
    (tmp_path / "rows.csv").write_text("file_name,label\nwalk,dog\nlong.gif,cat\nrun_00001.gif,dog\n")
    run = [f"pipeline={folder}", f"conditions={tmp_path / 'rows.csv'}"]
    main(["compress", *run, f"images={tmp_path / 'in'}", f"out={tmp_path / 'it.smalti'}"])
    main(["decompress", *run, f"stream={tmp_path / 'it.smalti'}", f"out={tmp_path / 'out'}"])
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["long_00000.gif", "long_00001.gif", "run_00001.gif", "walk.gif"]


BAD = {
    "no frames": (["complete"], "frames: give the number of frames to keep, from 1 to 2"),
    "none kept": (["complete", "frames=0"], "frames: keep from 1 to 2 of the 3 frames (got 0)"),
    "a mask": (["complete", "frames=1", "mask=top"], "mask: is that of images"),
    "too short": (["complete", "frames=1", "images=SHORT"], "2 frames, fewer than data.frames=3"),
    "no clips": (["complete", "frames=1", "images=EMPTY"], "images: no clips in"),
    "another suffix": (["complete", "frames=1", "out=it.txt"], "should end in"),
    "a format of a file": (["generate", "format=gif", "out=it.npz"], "format: is that of files in a folder"),
    "tiles": (["compress", "images=SHORT", "out=it.smalti", "tile=true"], "tile: clips are not cut into tiles"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    save_clips(tmp_path / "short", 1, frames=2)
    (tmp_path / "empty").mkdir()
    (verb, *more), word = BAD[case]
    more = [each.replace("SHORT", f"{tmp_path}/short/cat/00.npy").replace("EMPTY", "empty") for each in more]
    assert word in fails(capsys, verb, f"pipeline={folder}", *more)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["empty", "short"]


def test_settings_of_clips_are_refused_for_images(folder, tmp_path, capsys):
    images = f"pipeline={folder.parent / 'images'}"
    for more, word in (
        (["complete", images, "frames=1"], "frames: this pipeline makes images, not clips"),
        (["generate", images, "format=gif", f"out={tmp_path / 'out'}"], "format: is that of clips"),
        (["generate", images, f"out={tmp_path / 'it.gif'}"], "out: .gif shows clips"),
    ):
        assert word in fails(capsys, *more)
