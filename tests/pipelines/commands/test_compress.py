"""`smalti compress` and `smalti decompress`: a folder comes back with its names; mistakes write nothing.

Covers: pipelines/commands/decompress.py.
"""

import numpy as np
import pytest
import torch
from command import fails
from givens.coded import images_of, pipeline_of
from PIL import Image

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


def files_in(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_comes_back_with_its_names(tmp_path, capsys, channels):
    saved(tmp_path, channels=channels, prior="marginal")
    stream, out = tmp_path / "all.smalti", tmp_path / "out"
    compress_verb(arguments(tmp_path, f"images={tmp_path / 'images'}", f"out={stream}", "lossless=true"))
    assert "9 images" in capsys.readouterr().out
    decompress_verb(arguments(tmp_path, f"stream={stream}", f"out={out}", "batch_size=2"))
    given, found = files_in(tmp_path / "images"), files_in(out)
    assert set(found) == {name if name.endswith(".png") else f"{name}.png" for name in given}
    for name, path in given.items():
        again = found[name if name.endswith(".png") else f"{name}.png"]
        assert (np.asarray(Image.open(path)) == np.asarray(Image.open(again))).all()


def test_one_file_of_another_size_is_resized_if_asked(tmp_path, capsys):
    pipe = saved(tmp_path, channels=1, prior="marginal")
    Image.new("L", (20, 10), 7).save(tmp_path / "wide.png")
    argv = arguments(tmp_path, f"images={tmp_path}/wide.png", f"out={tmp_path}/a.smalti", "lossless=true")
    assert "resize=true" in fails(capsys, "compress", *argv)
    compress_verb([*argv, "resize=true"])
    assert "1 image," in capsys.readouterr().out
    decompress_verb(arguments(tmp_path, f"stream={tmp_path}/a.smalti", f"out={tmp_path}/a"))
    assert set(files_in(tmp_path / "a")) == {"wide.png"}
    assert (np.asarray(Image.open(tmp_path / "a/wide.png")) == np.full((8, 8), 7)).all()
    (tmp_path / "b.smalti").write_bytes(compress(pipe, torch.ones(2, *pipe.tokenizer.image_shape), progress=False))
    decompress_verb(arguments(tmp_path, f"stream={tmp_path}/b.smalti", f"out={tmp_path}/b"))
    assert set(files_in(tmp_path / "b")) == {"00000000.png", "00000001.png"}, "images without names are numbered"


def test_what_cannot_be_compressed_is_an_error_and_leaves_nothing(tmp_path, capsys):
    saved(tmp_path, "tokens")
    folder, stream, other = (tmp_path / name for name in ("images", "all.smalti", "images/other.png"))

    def refused(*more):
        line = fails(capsys, "compress", *arguments(tmp_path, f"images={folder}", f"out={stream}", *more))
        assert not stream.exists() and not [path for path in tmp_path.iterdir() if "smalti" in path.name]
        return line

    assert "likelihood" in refused("lossless=true")
    other.write_bytes(b"no image")
    assert "other.png" in refused()
    Image.new("L", (8, 8)).save(other)
    Image.new("L", (8, 8)).save(other.with_name("other.png.bmp"))
    Image.new("L", (8, 8)).save(other.with_name("other.png.bmp.png"))
    assert "other.png.bmp" in refused(), "its name could not be restored"


def test_what_cannot_be_decompressed_is_an_error_and_leaves_nothing(tmp_path, capsys):
    pipe = saved(tmp_path, "tokens")
    stream, out = tmp_path / "all.smalti", tmp_path / "out"
    data = compress(pipe, pipe.to_images(images_of(pipe)), progress=False)

    def refused(wrong):
        stream.write_bytes(wrong)
        line = fails(capsys, "decompress", *arguments(tmp_path, f"stream={stream}", f"out={out}"))
        assert not out.exists() and not list(tmp_path.glob(".*"))
        return line

    assert f"stream: {stream}: " in refused(data[:-9])
    pipeline_of("tokens", "made").save_pretrained(tmp_path / "pipeline")
    assert "another pipeline" in refused(data)
