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


def test_values_of_another_type_are_kept(tmp_path):
    pipe = make_clips(channels=2, sizes={"dtype": "uint16", "range": (0.0, 4095.0)})
    pipe.save_pretrained(tmp_path / "pipeline")
    clips = pipe(4, [0, 1, 0, 1], seed=3, output_type="np").images
    generate(tmp_path / "pipeline", tmp_path / "npy")
    generate(tmp_path / "pipeline", tmp_path / "it.npz")
    generate(tmp_path / "pipeline", tmp_path / "gif", "format=gif")
    stored = np.load(tmp_path / "npy/00001.npy")
    assert clips.dtype == stored.dtype == np.uint16 and np.array_equal(stored, clips[1])
    assert np.array_equal(np.load(tmp_path / "it.npz")["arr_0"], clips)
    assert len(read_clip(tmp_path / "gif/00001.gif")) == T


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


def test_evaluate_prints_bits_per_frame(pipe, folder, tmp_path, capsys):
    save_clips(tmp_path / "in", 60)
    data = describe_data(tmp_path / "in")
    run = ["evaluate", f"pipeline={folder}", *data, "num_images=0", "update_card=false", f"out={tmp_path / 'out'}"]
    main(run)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bits per frame")]
    stored = json.loads((tmp_path / "out/evaluation.json").read_text())
    stored = stored.get("figures", stored)
    assert len(stored["frame_bits"]) == T and f"{stored['frame_bits'][0]:.0f}, " in line


def test_a_clip_is_the_nearest_to_itself(folder, tmp_path, capsys):
    save_clips(tmp_path / "in/train", 8)
    save_clips(tmp_path / "in/test", 2, seed=1)
    file = tmp_path / "in/train/dog/03.npy"
    out = f"out={tmp_path / 'it.png'}"
    main(["search", f"pipeline={folder}", *describe_data(tmp_path / "in"), f"images={file}", "k=1", out])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "03.npy[0:3]: " in line]
    assert "dog/03.npy" in line.split(": ")[1] and line.endswith("0.000")


# Streams


def read_values(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    clip = open_clip(str(path))
    return np.stack([np.asarray(clip.read(k, True)) for k in range(len(clip))]).reshape(len(clip), H, W, -1)


@pytest.mark.parametrize("form", ["arrays", "pictures"])
@pytest.mark.parametrize(
    ("kind", "channels", "lossless"),
    [("pixels", 1, False), ("pixels", 1, True), *(("vqvae", c, keep) for c in (1, 3) for keep in (False, True))],
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


@pytest.mark.parametrize("lossless", ["true", "false"])
def test_only_clips_of_the_size_are_compressed_or_resized_ones(tmp_path, capsys, lossless):
    """Exact pixels: no clip of another size, none of other values than 8 bits, no colours in grey."""
    pytest.importorskip("constriction")
    pipe = make_clips("marginal", sizes={"levels": 256}, kind="pixels")
    pipe.save_pretrained(tmp_path / "pipeline")
    clip = np.random.default_rng(1).integers(0, 256, (T, H, W, 1), dtype=np.uint8)
    argv = [f"pipeline={tmp_path / 'pipeline'}", f"out={tmp_path / 'it.smalti'}", f"lossless={lossless}"]

    def refused(name: str) -> str:
        line = fails(capsys, "compress", *argv, f"images={tmp_path / name}")
        assert not (tmp_path / "it.smalti").exists() and name in line
        return line

    (tmp_path / "large.gif").write_bytes(gif_bytes(clip.repeat(2, 1)))
    assert "frame 0: the pipeline's images are 12 x 8 pixels, this one is 12 x 16; resize=true" in refused("large.gif")
    np.save(tmp_path / "large.npy", clip.repeat(2, 2))
    assert "this one is 24 x 8" in refused("large.npy")
    np.save(tmp_path / "deep.npy", clip.astype(np.uint16))
    assert "its values are uint16, not uint8" in refused("deep.npy")
    (tmp_path / "cut.gif").write_bytes(gif_bytes(clip)[:-60])
    assert "remove or replace this file" in refused("cut.gif")
    colours = np.concatenate([clip, 255 - clip, clip], -1)
    (tmp_path / "colours.gif").write_bytes(gif_bytes(colours))
    if lossless == "true":
        assert "frame 0: shape (8, 12, 3)" in refused("colours.gif")
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


def test_streams_of_clips_take_rows_of_conditions(pipe, folder, tmp_path, capsys):
    """All windows of a clip have the row of its file."""
    pytest.importorskip("constriction")
    save_clips(tmp_path / "in", 2)
    (tmp_path / "rows.csv").write_text("file_name,label\n01.npy,dog\n00.npy,cat\n")
    run = [f"pipeline={folder}", f"conditions={tmp_path / 'rows.csv'}"]
    main(["compress", *run, f"images={tmp_path / 'in'}", f"out={tmp_path / 'it.smalti'}"])
    main(["decompress", *run, f"stream={tmp_path / 'it.smalti'}", f"out={tmp_path / 'out'}"])
    data = (tmp_path / "it.smalti").read_bytes()
    clips = pipe.decompress(data, condition={"label": ["cat", "dog"]}, output_type="np")
    assert np.array_equal(read_values(tmp_path / "out/cat/00.npy.gif"), clips[0])
    (tmp_path / "rows.csv").write_text("file_name,label\n01.npy,cat\n00.npy,dog\n")
    assert "another condition" in fails(
        capsys, "decompress", *run, f"stream={tmp_path / 'it.smalti'}", f"out={tmp_path / 'new'}"
    )


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
    "all kept": (["complete", "frames=3"], "frames: keep from 1 to 2 of the 3 frames (got 3)"),
    "a mask": (["complete", "frames=1", "mask=top"], "mask: is that of images"),
    "too short": (["complete", "frames=1", "images=SHORT"], "2 frames, fewer than data.frames=3"),
    "missing": (["complete", "frames=1", "images=nowhere"], "images: no such file or folder"),
    "no clips": (["complete", "frames=1", "images=EMPTY"], "images: no clips in"),
    "another suffix": (["complete", "frames=1", "out=it.txt"], "should end in"),
    "a format of a file": (["generate", "format=gif", "out=it.npz"], "format: is that of files in a folder"),
    "another format": (["generate", "format=avi", "out=new"], "format"),
    "tiles": (["compress", "images=SHORT", "out=it.smalti", "tile=true"], "tile: clips are not cut into tiles"),
    "a short one": (["compress", "images=SHORT", "out=it.smalti"], "2 frames, fewer than data.frames=3"),
    "no clips to compress": (["compress", "images=EMPTY", "out=it.smalti"], "images: no clips in"),
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


def test_at_most_ten_bad_clips_are_listed(folder, tmp_path, capsys):
    save_clips(tmp_path / "short", 24, frames=T - 1)
    with pytest.raises(SystemExit) as stopped:
        run = ["complete", "frames=1", f"pipeline={folder}", f"images={tmp_path / 'short'}", "num_images=24"]
        main([*run, f"out={tmp_path / 'out'}"])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 11
    assert "2 frames, fewer than data.frames=3" in lines[0] and "and 14 more" in lines[-1]


def test_settings_of_clips_are_refused_for_images(folder, tmp_path, capsys):
    images = f"pipeline={folder.parent / 'images'}"
    for more, word in (
        (["complete", images, "frames=1"], "frames: this pipeline makes images, not clips"),
        (["generate", images, "format=gif", f"out={tmp_path / 'out'}"], "format: is that of clips"),
        (["generate", images, f"out={tmp_path / 'it.gif'}"], "out: .gif shows clips"),
    ):
        assert word in fails(capsys, *more)


def test_films_without_the_extra_are_one_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.images.animations.find_spec", lambda name: None)
    for verb, *more in (
        ["generate", f"out={tmp_path / 'it.mp4'}"],
        ["generate", f"out={tmp_path / 'out'}", "format=mp4"],
        ["complete", "frames=1", f"out={tmp_path / 'it.mp4'}"],
    ):
        assert "smalti[video]" in fails(capsys, verb, f"pipeline={folder}", *more)
