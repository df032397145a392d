"""Clips and volumes: reading them, windows of frames, splits, bad clips, and a run of all stages.

Covers: pipelines/images/clip_files.py.
"""

from __future__ import annotations

import gc
import math
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command import fails
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines import ImagePipeline, evaluate, train_prior, train_tokenizer
from pipelines.__main__ import main
from pipelines.config import UserError
from pipelines.images import DataConfig, clip_files, load_images
from pipelines.images.animations import write_animation
from pipelines.images.augment import AugmentConfig, draw_changes
from pipelines.images.dataset import prepare_images
from pipelines.images.formats import try_decode
from pipelines.images.sources import of_files
from pipelines.options import open_files, read_files
from pipelines.tokens import load_tokens
from tokenizer import Tokenizer
from tokenizer.frame_by_frame import FrameByFrame
from tokenizer.spec import ImageSpec, to_float

SIDE = 16
KINDS = ["folder", "gif", "webp", "png", "tiff", "npy", "npz"]


def blob(frames, seed, side=SIDE):
    """A bright spot that moves, uint8 (frames, side, side)."""
    rng = np.random.default_rng(seed)
    (y, x), (down, right) = rng.uniform(3, side - 4, 2), rng.uniform(-1, 1, 2)
    grid, t = np.arange(side), np.arange(frames)[:, None, None]
    away = [np.abs(grid[:, None] - (y + down * t) % side), np.abs(grid - (x + right * t) % side)]
    squares = sum(np.minimum(part, side - part) ** 2 for part in away)
    return (250 * np.exp(-squares / 6) + seed % 5).round().astype(np.uint8)


def write_clip(path, frames, kind):
    """Write an array of frames as a folder of PNG (numbered without zeros), or as one file; the path has no suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind in ("npy", "npz"):
        np.save(f"{path}.npy", frames) if kind == "npy" else np.savez_compressed(f"{path}.npz", frames)
        return path.with_suffix(f".{kind}")
    pictures = [Image.fromarray(frame) for frame in frames]
    if kind == "folder":
        path.mkdir()
        for number, picture in enumerate(pictures):
            picture.save(path / f"{number}.png")
        return path
    options = {"lossless": True} if kind == "webp" else {}
    options |= {} if kind == "tiff" else {"duration": 100}
    pictures[0].save(f"{path}.{kind}", save_all=True, append_images=pictures[1:], **options)
    return path.with_suffix(f".{kind}")


def write_clips(folder, lengths, kind, make=blob):
    """Write a clip for each length; return their frames by name."""
    found = {f"clip{number:02d}": make(length, number) for number, length in enumerate(lengths)}
    for name, frames in found.items():
        write_clip(folder / name, frames, kind)
    return found


def load(folder, frames=4, **options):
    keys = {"source": str(folder), "frames": frames, "image_size": SIDE, **options}
    single = keys.pop("single_frames", False)
    return load_images(DataConfig(**keys), single_frames=single)


def by_name(splits):
    """The images of all splits by name."""
    return {
        name: pixels.numpy()
        for part in splits.by_name().values()
        for name, pixels in zip(part.names(range(len(part))), part.pixels(range(len(part))), strict=True)
    }


def clip_and_start(name):
    path, _, frames = name.partition("[")
    return path.partition(".")[0], int(frames.strip("]").partition(":")[0])


# Windows


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_the_consecutive_frames_of_each_clip(tmp_path, kind, capsys):
    lengths = [12, 4, 9, 8, 11]
    known = write_clips(tmp_path, lengths, kind)
    found = by_name(load(tmp_path))
    assert "data.frames: 5 clips, 10 windows of 4 frames; 4 frames at the ends of clips are not used" in (
        capsys.readouterr().err
    )
    expected = {(name, start) for name, clip in known.items() for start in range(0, len(clip) - 3, 4)}
    assert {clip_and_start(name) for name in found} == expected
    for name, window in found.items():
        clip, start = clip_and_start(name)
        assert np.array_equal(window, known[clip][start : start + 4, None])


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 20), min_size=6, max_size=9), st.integers(2, 6), st.booleans())
def test_each_split_has_whole_clips_and_frames_divide_like_windows(tmp_path_factory, lengths, frames, cached):
    folder = tmp_path_factory.mktemp("clips")
    lengths = [max(length, frames) for length in lengths]
    write_clips(folder, lengths, "npy")
    options = {"validation_fraction": 0.3, "held_out_fraction": 0.3, "cache_mb": 2048 * cached}
    windows, single = load(folder, frames, **options), load(folder, frames, single_frames=True, **options)
    owners, count = {}, 0
    for split, part in windows.by_name().items():
        apart = single.by_name()[split]
        assert apart.spec.shape == (1, SIDE, SIDE) and len(apart) == frames * len(part)
        clips, names = part.pixels(range(len(part))), part.names(range(len(part)))
        assert torch.equal(apart.pixels(range(len(apart))), clips.flatten(0, 1))
        wanted = [(clip, start + k) for clip, start in map(clip_and_start, names) for k in range(frames)]
        assert list(map(clip_and_start, apart.names(range(len(apart))))) == wanted
        count += len(part)
        for name in names:
            assert owners.setdefault(clip_and_start(name)[0], split) == split
    assert count == sum(length // frames for length in lengths)


@pytest.mark.parametrize("kind", ["folder", "gif"])
def test_classes_come_from_the_folder_above_a_clip(tmp_path, kind):
    for number in range(10):
        write_clip(tmp_path / "ab"[number % 2] / f"{number}", blob(8, number), kind)
    train = load(tmp_path).train
    assert train.class_names == ["a", "b"]
    assert [name[0] for name in train.names(range(len(train)))] == ["ab"[label] for label in train.labels]
    single = load(tmp_path, single_frames=True).train
    assert [name[0] for name in single.names(range(len(single)))] == ["ab"[label] for label in single.labels]
    assert load(tmp_path / "a").train.labels is None


def test_a_sheet_lists_clips(tmp_path):
    for number in range(10):
        write_clip(tmp_path / f"{number}", blob(8, number), "folder")
    rows = [f"{number},{'xy'[number % 2]}" for number in range(10)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    train = load(tmp_path).train
    names = train.names(range(len(train)))
    assert ["xy"[int(clip_and_start(name)[0]) % 2] for name in names] == [train.class_names[k] for k in train.labels]


def test_frames_are_resized_like_images_one_by_one(tmp_path):
    known = write_clips(tmp_path, [4] * 4, "gif", lambda length, seed: blob(length, seed, 24))
    for name, window in by_name(load(tmp_path, image_size=(10, 8), held_out_fraction=0.5)).items():
        frames = known[clip_and_start(name)[0]]
        assert np.array_equal(window, [try_decode(frame, ImageSpec(1, 10, 8)) for frame in frames])


# MP4


def write_videos(folder, lengths, name=None):
    """Write bright and dark frames as MP4, which is inexact; return their grey levels by name."""
    folder.mkdir(exist_ok=True)
    found = {}
    for number, length in enumerate(lengths):
        found[f"clip{number:02d}"] = levels = np.random.default_rng(number).permutation(np.linspace(10, 245, length))
        frames = np.broadcast_to(levels[:, None, None, None], (length, 128, 128, 1)).round().astype(np.uint8)
        write_animation(frames, folder / (name or f"clip{number:02d}.mp4"))
    return found


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_frames_are_read_in_any_order(tmp_path, kind):
    clip = np.random.default_rng(1).integers(0, 256, (4, SIDE, SIDE), np.uint8)
    path = str(write_clip(tmp_path / "clip", clip, kind))
    order, deep = clip_files.open_clip(path), [True, False]
    for number in (0, 2, 1, 3, 0, 3, 2, 2, 1):
        found = [np.asarray(order.read(number, each)) for each in deep]
        first = [np.asarray(clip_files.open_clip(path).read(number, each)) for each in deep]
        assert all(map(np.array_equal, found, first)), number
        assert kind == "webp" or np.array_equal(np.asarray(Image.fromarray(found[0]).convert("L")), clip[number])


def test_an_mp4_is_cut_into_windows_and_read_in_any_order(tmp_path, capsys, monkeypatch):
    pytest.importorskip("av")
    known, seeks = write_videos(tmp_path, [12, 4, 9, 8, 40]), []
    (tmp_path / ".hidden").mkdir()
    write_videos(tmp_path / ".hidden", [4])
    (tmp_path / "bad.MP4").write_bytes((tmp_path / "clip03.mp4").read_bytes()[:300])
    with pytest.raises(UserError, match="bad.MP4: not an MP4, or damaged: Invalid data"):
        load(tmp_path)
    (tmp_path / "bad.MP4").unlink()
    splits = load(tmp_path)
    assert "5 clips, 18 windows of 4 frames; 1 frames" in capsys.readouterr().err
    for name, window in by_name(splits).items():
        clip, at = clip_and_start(name)
        assert np.abs(window.mean((1, 2, 3)) - known[clip][at : at + 4]).max() < 3
    lazy = load(tmp_path, cache_mb=0).train
    order = np.random.default_rng(0).permutation(len(lazy))
    find_times = clip_files.VideoClip._find_times
    monkeypatch.setattr(clip_files.VideoClip, "_find_times", lambda clip: seeks.append(clip) or find_times(clip))
    assert torch.equal(lazy.pixels(order), splits.train.pixels(order)) and not seeks


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_each_frame_of_an_mp4_is_found_whatever_its_time(tmp_path, codec):
    """Frames at irregular times, which are stored in another order, in groups that refer to one another."""
    av = pytest.importorskip("av")
    gaps, levels = np.random.default_rng(0).integers(1, 9, 60), np.arange(60) * 4
    with av.open(str(tmp_path / "it.mp4"), "w") as file:
        options = (
            {"x264-params": "open-gop=1:bframes=3:keyint=7:min-keyint=4"}
            if codec == "libx264"
            else {"qmin": "1", "qmax": "1"}
        )
        stream = file.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        if codec == "mpeg4":
            stream.codec_context.gop_size, stream.codec_context.max_b_frames = 7, 2
        for time, level in zip(gaps.cumsum(), levels, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), level, np.uint8), "rgb24")
            frame.pts = int(time)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    clip = clip_files.open_clip(str(tmp_path / "it.mp4"))
    assert len(clip) == 60
    for index in [*range(60), *np.random.default_rng(1).permutation(60)]:
        frame = clip.read(int(index), deep=True)
        assert frame.shape == (32, 48, 3) and abs(frame.mean() - levels[index]) < 2, index
    decoded, file = [], clip._file
    decode = lambda stream: (decoded.append(frame) or frame for frame in file.decode(stream))  # noqa: E731
    clip._file = SimpleNamespace(seek=file.seek, decode=decode)
    assert [round(clip.read(index, deep=True).mean() / 4) for index in (3, 55)] == [3, 55]
    assert len(decoded) < 30  # not all those before


def test_a_damaged_frame_of_an_mp4_is_refused(tmp_path):
    """The decoder would make one up from those before."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "it.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=5)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for pixels in np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        file.mux(stream.encode())
    with av.open(str(tmp_path / "it.mp4")) as file:
        packets = [packet for packet in file.demux(file.streams.video[0]) if packet.pts is not None]
        damaged = sorted(packets, key=lambda packet: packet.pts)[4]
    data, start = bytearray((tmp_path / "it.mp4").read_bytes()), damaged.pos + damaged.size // 2
    data[start : damaged.pos + damaged.size] = bytes(damaged.pos + damaged.size - start)
    (tmp_path / "it.mp4").write_bytes(data)
    clip = clip_files.open_clip(str(tmp_path / "it.mp4"))
    with pytest.raises(ValueError, match="cannot be decoded"):
        clip.read(4, deep=True)
    assert clip.read(3, deep=True).shape == (48, 64, 3)


def test_an_mp4_is_upright_and_of_limited_size(tmp_path, monkeypatch):
    pytest.importorskip("av")
    frames = np.zeros((2, 128, 140, 1), np.uint8)
    frames[:, :64] = 250
    write_animation(frames, tmp_path / "it.mp4")
    data = bytearray((tmp_path / "it.mp4").read_bytes())
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # clockwise
    struct.pack_into(f"{len(turned)}s", data, data.index(b"tkhd") + 44, turned)
    (tmp_path / "turned.mp4").write_bytes(data)
    frame = clip_files.open_clip(str(tmp_path / "turned.mp4")).read(1, deep=True)
    assert frame.shape == (140, 128, 3) and frame[:, 70:].min() > 240 and frame[:, :60].max() < 10
    monkeypatch.setattr("pipelines.images.formats.MAX_PIXELS", 128 * 140 - 1)
    with pytest.raises(ValueError, match="140 x 128 pixels; the limit is"):
        clip_files.open_clip(str(tmp_path / "it.mp4"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_few_mp4_are_open_at_a_time(tmp_path, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.setattr(clip_files, "OPEN_CLIPS", 4)
    write_videos(tmp_path, [4] * 12)
    windows, before = clip_files.cut_windows(of_files(clip_files.find_clips(tmp_path)), 2), os.listdir("/proc/self/fd")
    gc.disable()
    try:
        for row in range(windows.size):
            assert not isinstance(try_decode(windows.payloads([row])[0], ImageSpec(1, SIDE, SIDE, 2)), str)
        assert len(os.listdir("/proc/self/fd")) <= len(before) + 4
    finally:
        gc.enable()


# More than 8 bits


@pytest.mark.parametrize(("kind", "dtype"), [("folder", "uint16"), ("tiff", "float32"), ("npz", "uint16")])
def test_deep_clips_keep_their_type_and_the_measured_range(tmp_path, kind, dtype):
    def make(length, seed):
        return blob(length, seed).astype(dtype) * np.array(200 if dtype == "uint16" else 0.5, dtype) + seed

    known = write_clips(tmp_path, [2, 2, 2, 6, 6, 5, 9], kind, make)
    splits = load(tmp_path, on_error="skip", max_bad_fraction=0.5, validation_fraction=0)  # three are too short
    spec = splits.train.spec
    used = [known[clip][at : at + 4] for clip, at in map(clip_and_start, splits.train.names(range(len(splits.train))))]
    assert (spec.dtype, spec.low, spec.high) == (dtype, np.min(used), np.max(used))
    for name, window in by_name(splits).items():
        clip, at = clip_and_start(name)
        assert np.array_equal(window, spec.scale(known[clip][at : at + 4, None]))


# Augmentation


def test_augmentation_moves_each_frame_and_all_alike():
    """Frames of one value each stay that: nothing of a neighbour moves in."""
    config = AugmentConfig(flip=True, shift=5, rotate=30, zoom=0.3)
    changes = draw_changes(np.arange(8), 0, config, 0)
    flat = torch.tensor([0, 90, 180, 255], dtype=torch.uint8)[:, None, None, None].expand(8, 4, 1, SIDE, SIDE)
    assert torch.allclose(prepare_images(flat, changes, config), to_float(flat), atol=1e-6)
    frames = torch.from_numpy(np.stack([blob(1, seed) for seed in range(8)]))
    moved = prepare_images(frames[:, None].expand(8, 4, 1, SIDE, SIDE), changes, config)
    alone = prepare_images(frames, changes, config)
    assert torch.equal(moved, alone[:, None].expand_as(moved))


# Bad clips


def with_nan(length, seed):
    frames = blob(length, seed).astype(np.float32)
    frames[5, 0, 0] = math.nan
    return frames


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: write_clip(path, blob(3, 0), "gif"), "bad.gif: 3 frames, fewer than data.frames=4"),
        (lambda path: write_clip(path, blob(4, 0)[0], "npy"), r"bad.npy: shape \(16, 16\); a clip needs \(T, H, W\)"),
        (lambda path: write_clip(path, with_nan(8, 0), "npy"), r"bad.npy\[4:8\]: frame 5: 1 of 256 values are NaN"),
        (lambda path: np.save(f"{path}.npy", np.array([{}] * 4), allow_pickle=True), "bad.npy: .*object"),
        (lambda path: path.with_suffix(".gif").write_bytes(b"GIF89a"), "bad.gif: "),
    ],
)
def test_bad_clips_are_listed_with_the_reason(tmp_path, write, message):
    dtype = np.float32 if "NaN" in message else np.uint8
    kind = "npy" if "npy" in message else "gif"
    write_clips(tmp_path / "good", [8] * 6, kind, lambda *args: blob(*args).astype(dtype))
    write(tmp_path / "good" / "bad")
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "good")
    assert len(str(caught.value).splitlines()) <= 3
    good = by_name(load(tmp_path / "good", on_error="skip", max_bad_fraction=0.5, held_out_fraction=0.3))
    assert len(good) == 12 + ("NaN" in message)  # of a clip with a bad frame, the other windows are used


def test_frames_of_unequal_size_are_bad(tmp_path):
    write_clips(tmp_path, [8] * 6, "folder")
    Image.new("L", (20, 16)).save(tmp_path / "clip01" / "6.png")
    with pytest.raises(UserError, match=r"clip01\[4:8\]: frame 6: 20 x 16 pixels, unlike the first of its clip, 16 x"):
        load(tmp_path)


def test_a_damaged_animation_is_bad_from_there_on(tmp_path):
    write_clips(tmp_path, [8] * 6, "png")
    path = tmp_path / "clip03.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with pytest.raises(UserError, match=r"1 of 12 images cannot be decoded.*\n.*clip03.png\[4:8\]: frame"):
        load(tmp_path)


def test_what_holds_no_clips_is_refused(tmp_path):
    write_clip(tmp_path / "stills", blob(12, 0), "folder")
    with pytest.raises(UserError, match="holds single images, not clips"):
        load(tmp_path / "stills")
    with pytest.raises(UserError, match="read from a folder of files"):
        load(write_clip(tmp_path / "one", blob(8, 0), "gif"))


def test_settings_that_are_for_images_are_refused():
    for options in ({"streaming": True}, {"clips": True}, {"crop": "random"}):
        with pytest.raises(ValueError, match="not streamed|whole clips are held out|not cropped"):
            DataConfig(frames=4, **options)


# Files that a verb takes


def test_windows_of_files_and_folders_are_read(tmp_path):
    known = write_clips(tmp_path, [9, 4], "gif")
    write_clip(tmp_path / "more", blob(5, 7), "folder")
    spec = ImageSpec(1, SIDE, SIDE, 4)
    source = open_files(sorted(map(str, tmp_path.iterdir())), spec)
    clips, names = read_files(source, range(source.size), spec), [source.name(row) for row in range(source.size)]
    assert [name.removeprefix(f"{tmp_path}/") for name in names] == [
        "clip00.gif[0:4]", "clip00.gif[4:8]", "clip01.gif[0:4]", "more[0:4]"
    ]  # fmt: skip
    assert np.array_equal(clips[1, :, 0], known["clip00"][4:8])
    longer = ImageSpec(1, SIDE, SIDE, 8)
    with pytest.raises(UserError, match="images: .*more: 5 frames, fewer than"):
        read_files(open_files([str(tmp_path / "more")], longer), [0], longer)


# All stages

SMALL = ["train.batch_size=16", "train.mixed_precision=no"]
VQVAE = ["model.kind=vqvae", "model.widths=[16]", "model.blocks=[1]", "model.quantizer.codes=32", "train.steps=20"]
GPT = ["model.kind=gpt", "model.dim=32", "model.depth=1", "model.heads=2", "train.steps=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Float volumes of two classes, and the runs of all stages on windows of 4 frames."""
    root = tmp_path_factory.mktemp("clips")
    for number in range(30):
        frames = blob(8 + number % 3, number).astype(np.float32) / 100 - 1
        write_clip(root / "clips" / "ab"[number % 2] / f"{number:02d}", frames, "npy")
    data = [f"data.source={root / 'clips'}", "data.frames=4", f"data.image_size={SIDE}"]
    train_tokenizer.main([f"out={root / 'tok'}", *data, *VQVAE, *SMALL])
    main(["encode", f"tokenizer={root / 'tok'}", f"out={root / 'tokens'}"])
    train_prior.main([f"out={root / 'prior'}", f"tokens={root / 'tokens'}", *GPT, *SMALL])
    return root


def test_the_tokenizer_is_one_of_frames(run):
    tokenizer = Tokenizer.from_pretrained(run / "tok" / "tokenizer")
    assert (tokenizer.spec.frames, tokenizer.spec.shape, tokenizer.grid.shape) == (1, (1, SIDE, SIDE), (4, 4))
    preview = Image.open(next((run / "tok" / "previews").glob("reconstructions-*20.png")))
    assert preview.height < 6 * 64  # two rows of frames and two of reconstructions, not strips


def test_encode_wraps_the_tokenizer_and_keeps_the_splits(run, capsys):
    tokens = load_tokens(run / "tokens")
    assert isinstance(tokens.tokenizer, FrameByFrame) and tokens.grid.shape == (4, 4, 4)
    splits = load_images(DataConfig.model_validate(tokens.source["data"]))
    for name, part in (("train", splits.train), ("test", splits.held_out)):
        with torch.inference_mode():
            expected = tokens.tokenizer.encode(part.batch(range(len(part))))
        assert torch.equal(torch.as_tensor(tokens.splits[name].tokens).long(), expected)
    frames = Tokenizer.from_pretrained(run / "tok" / "tokenizer")
    single = load_images(DataConfig.model_validate(tokens.source["data"]), single_frames=True).train
    with torch.inference_mode():
        expected = frames.encode(single.batch(range(8)))
    assert torch.equal(torch.as_tensor(tokens.splits["train"].tokens)[:2].long().flatten(0, 1), expected)
    main(["encode", f"tokenizer={run / 'tok'}", f"out={run / 'tokens'}"])
    assert "already finished" in capsys.readouterr().out


def test_the_pipeline_samples_clips(run):
    pipe = ImagePipeline.from_pretrained(run / "prior")
    assert pipe.prior.grid.shape == (4, 4, 4) and pipe.spec.shape == (4, 1, SIDE, SIDE)
    out = pipe(2, seed=0, output_type="pt")
    assert out.images.shape == (2, 4, 1, SIDE, SIDE) and out.tokens.shape == (2, 4, 4, 4)
    values = pipe(2, seed=0, output_type="np").images
    assert values.shape == (2, 4, SIDE, SIDE, 1) and values.dtype == np.float32


def test_evaluation_and_inspection_run(run, capsys):
    evaluate.main([f"pipeline={run / 'prior'}", "num_images=12", "feature_steps=2", f"out={run / 'ev'}"])
    assert Image.open(run / "ev" / "samples.png").height < 3000
    main(["inspect", f"tokenizer={run / 'tok'}", f"out={run / 'page.png'}"])
    assert "images of 1 x 16 x 16, 4 x 4 tokens" in capsys.readouterr().out


def test_tokenizers_without_a_grid_are_refused_before_training(run, tmp_path, capsys):
    data = [f"data.source={run / 'clips'}", "data.frames=4", f"data.image_size={SIDE}", f"out={tmp_path / 'x'}"]
    assert "does not give a grid of two axes" in fails(capsys, "train_tokenizer", *data, "model.kind=titok")
    assert "choose the tokenizer of a frame" in fails(capsys, "train_tokenizer", *data, "model.kind=frame_by_frame")


def test_other_lengths_continue_from_the_same_tokenizer(run, tmp_path):
    main(["encode", f"tokenizer={run / 'tok'}", f"out={tmp_path / 'eight'}", "data.frames=8"])
    eight, four = load_tokens(tmp_path / "eight"), load_tokens(run / "tokens")
    assert eight.grid.shape == (8, 4, 4)
    mine = torch.as_tensor(eight.splits["train"].tokens).reshape(-1, 4, 4, 4)
    assert torch.equal(mine, torch.as_tensor(four.splits["train"].tokens))
    train_tokenizer.main([f"out={tmp_path / 'again'}", f"init={tmp_path / 'eight'}", "train.steps=1", *SMALL])
    assert Tokenizer.from_pretrained(tmp_path / "again" / "tokenizer").name == "vqvae"


def test_a_table_has_a_row_for_each_clip(run, tmp_path, capsys):
    clips = [path for path in sorted((run / "clips").rglob("*")) if path.is_file()]
    rows = [f"{path.relative_to(run / 'clips')},{int(path.stem)}" for path in clips]
    (tmp_path / "speed.csv").write_text("\n".join(["file_name,speed", *rows]))
    command = ["encode", f"tokenizer={run / 'tok'}", f"out={tmp_path / 'x'}"]
    main([*command, f"table={tmp_path / 'speed.csv'}", "attributes.speed=speed"])
    tokens = load_tokens(tmp_path / "x")
    train = load_images(DataConfig.model_validate(tokens.source["data"])).train
    numbers = [float(clip_and_start(name)[0].rpartition("/")[2]) for name in train.names(range(len(train)))]
    assert tokens.splits["train"].given[:].raw("speed").flatten().tolist() == numbers
    grid = ["attributes.before.frame=-1", f"attributes.before.tokenizer={run / 'tok'}"]
    assert "images and frame are for single images" in fails(capsys, *command, *grid)
