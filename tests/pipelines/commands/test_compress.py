"""`smalti compress` and `smalti decompress`: a folder comes back with its names, and what is wrong is said.

Covers: pipelines/commands/decompress.py.
"""

import errno
import os

import numpy as np
import pytest
import torch
from command import fails
from givens.coded import images_of, pipeline_of
from PIL import Image

from pipelines.commands import decompress
from pipelines.commands.compress import main as compress_verb
from pipelines.commands.decompress import main as decompress_verb
from pipelines.compression.coding import compress

pytest.importorskip("constriction")


def saved(tmp_path, kind="bytes", **options):
    pipe = pipeline_of(kind, **options)
    pipe.save_pretrained(tmp_path / "pipeline")
    for index, image in enumerate(images_of(pipe).permute(0, 2, 3, 1).numpy()):
        path = tmp_path / "images" / ("some" if index % 2 else "") / f"{index}.{'bmp' if index == 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)
    return pipe


def arguments(tmp_path, *more):
    return [f"pipeline={tmp_path / 'pipeline'}", "device=cpu", *more]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_comes_back_with_its_names(tmp_path, capsys, channels):
    saved(tmp_path, channels=channels, prior="marginal")
    stream, out = tmp_path / "all.smalti", tmp_path / "out"
    compress_verb(arguments(tmp_path, f"images={tmp_path / 'images'}", f"out={stream}", "lossless=true"))
    assert "9 images" in capsys.readouterr().out
    decompress_verb(arguments(tmp_path, f"stream={stream}", f"out={out}"))
    originals = sorted(path for path in (tmp_path / "images").rglob("*") if path.is_file())
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    names = [path.relative_to(tmp_path / "images").as_posix() for path in originals]
    assert found == {name if name.endswith(".png") else f"{name}.png" for name in names}
    for path, name in zip(originals, names, strict=True):
        again = out / (name if name.endswith(".png") else f"{name}.png")
        assert (np.asarray(Image.open(path)) == np.asarray(Image.open(again))).all()


def test_verbs_say_what_is_wrong(tmp_path, capsys):
    saved(tmp_path, "tokens")
    stream = tmp_path / "all.smalti"
    assert "neither a folder" in fails(capsys, "compress", *arguments(tmp_path, "images=nowhere"))
    folder = f"images={tmp_path / 'images'}"
    line = fails(capsys, "compress", *arguments(tmp_path, folder, f"out={stream}", "lossless=true"))
    assert "likelihood" in line and not stream.exists()
    Image.new("L", (9, 9)).save(tmp_path / "images" / "other.png")
    line = fails(capsys, "compress", *arguments(tmp_path, folder, f"out={stream}"))
    assert "other.png" in line and "8 x 8" in line
    (tmp_path / "images" / "other.png").write_bytes(b"no image")
    assert "other.png" in fails(capsys, "compress", *arguments(tmp_path, folder, f"out={stream}"))
    assert [path.name for path in tmp_path.iterdir() if "smalti" in path.name] == []
    line = fails(capsys, "compress", *arguments(tmp_path, folder, f"out={tmp_path / 'images' / 'some' / 'all.smalti'}"))
    assert "it lies in what is read" in line
    (tmp_path / "images" / "other.png").unlink()
    compress_verb(arguments(tmp_path, folder, f"out={stream}"))
    capsys.readouterr()
    data = stream.read_bytes()
    for wrong, word in (
        (b"", "empty"),
        (b"PK\3\4" + data, "not a stream"),
        (data[:-9], "end"),
        (data + b"1", "follow"),
    ):
        stream.write_bytes(wrong)
        line = fails(capsys, "decompress", *arguments(tmp_path, f"stream={stream}", f"out={tmp_path / 'out'}"))
        assert word in line and not (tmp_path / "out").exists()
    stream.write_bytes(data)
    again = arguments(tmp_path, f"stream={stream}", f"out={tmp_path / 'images'}")
    assert "is there and not empty" in fails(capsys, "decompress", *again)
    few = arguments(tmp_path, f"stream={stream}", f"out={tmp_path / 'out'}", "max_images=3")
    assert "at most 3" in fails(capsys, "decompress", *few)
    pipeline_of("tokens", "made").save_pretrained(tmp_path / "pipeline")
    line = fails(capsys, "decompress", *arguments(tmp_path, f"stream={stream}", f"out={tmp_path / 'out'}"))
    assert "another model" in line


def test_names_without_a_suffix_are_restored(tmp_path):
    """`..png` has none, for it begins with dots."""
    pipe = saved(tmp_path, channels=1, prior="marginal")
    names = ["..png", ".png", "a/..png", ".b", "c.png.png"]
    data = compress(pipe, torch.ones(len(names), *pipe.tokenizer.image_shape), names=names, progress=False)
    (tmp_path / "a.smalti").write_bytes(data)
    decompress_verb(arguments(tmp_path, f"stream={tmp_path}/a.smalti", f"out={tmp_path}/out"))
    found = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert found == sorted(["..png.png", ".png.png", "a/..png.png", ".b.png", "c.png.png"])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.bmp", "a.bmp.png"], "'a.bmp' and 'a.bmp.png' would both come back as 'a.bmp.png'; rename one"),
        (["a.bmp", "a.bmp.png/b.png"], "name 'a.bmp.png': is a file and a folder"),
        (["a" * 251 + ".bmp"], f"'{'a' * 251}.bmp' would come back as a PNG file whose name is too long; rename it"),
    ],
)
def test_names_that_could_not_be_restored_are_refused_before_the_originals_are_gone(tmp_path, capsys, names, said):
    saved(tmp_path, channels=1, prior="marginal")
    for name in names:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "mine" / name)
    stream = tmp_path / "mine.smalti"
    line = fails(capsys, "compress", *arguments(tmp_path, f"images={tmp_path / 'mine'}", f"out={stream}"))
    assert line == f"error: images: {said}" and not stream.exists()


def test_a_disk_that_is_full_is_said_of_the_folder_and_not_of_the_stream(tmp_path, monkeypatch, capsys):
    pipe = saved(tmp_path, channels=1, prior="marginal")
    path, out = tmp_path / "a.smalti", tmp_path / "out"
    path.write_bytes(compress(pipe, torch.ones(3, *pipe.tokenizer.image_shape), progress=False))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of a write, which knows no name

    monkeypatch.setattr(Image.Image, "save", full)
    line = fails(capsys, "decompress", *arguments(tmp_path, f"stream={path}", f"out={out}"))
    assert line == f"error: out: {out} cannot be written (No space left on device)" and not out.exists()


def test_a_stream_that_is_cut_while_it_is_read_comes_back_all_the_same(tmp_path, monkeypatch):
    """A mapped file that is cut ends the process by SIGBUS."""
    pipe = saved(tmp_path, channels=1, prior="marginal")
    path = tmp_path / "a.smalti"
    path.write_bytes(compress(pipe, torch.ones(3, *pipe.tokenizer.image_shape), progress=False))
    write = decompress.write_folder

    def cut(*arguments):
        path.write_bytes(b"")
        return write(*arguments)

    monkeypatch.setattr(decompress, "write_folder", cut)
    decompress_verb(arguments(tmp_path, f"stream={path}", f"out={tmp_path}/out"))
    assert len(list((tmp_path / "out").iterdir())) == 3
