"""The verbs write, continue, score and measure clips as files.

Covers: pipelines/generate.py, pipelines/commands/complete.py, pipelines/commands/detect.py, pipelines/evaluate.py.
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
from pipelines.images.clip_files import open_clip
from pipelines.metrics.likelihood import evaluate_frames
from tokenizer.frame_by_frame import FrameByFrame

T, H, W = 3, 8, 12


def make_clips(prior="gpt", channels=1, sizes=None, **config):
    torch.manual_seed(0)
    tokenizer = FrameByFrame.wrap(make_tokenizer("vqvae", (H, W), channels, **(sizes or {})).eval(), T)
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
    "the app": (["app"], "app: takes images, not clips of 3 frames"),
    "pictures": (["compress", "images=SHORT", "out=it.smalti"], "compress: takes images, not clips"),
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
        main(["complete", "frames=1", f"pipeline={folder}", f"images={tmp_path / 'short'}", f"out={tmp_path / 'out'}"])
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
