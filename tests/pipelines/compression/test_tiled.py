"""Streams of images that are larger than the pipeline's: they come back at their own sizes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from command import fails
from givens.coded import pipeline_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_pipelines import make_conditioned

from pipelines.commands.compress import main as compress_verb
from pipelines.commands.decompress import main as decompress_verb
from pipelines.compression.container import DamagedStream, StreamError, pack_section, read_stream, write_stream

pytest.importorskip("constriction")
LOSSLESS = pipeline_of("bytes", "marginal", channels=3)
LOSSY = pipeline_of("tokens", "marginal")
AGE = {"age": {"kind": "number", "mean": [0.0], "std": [1.0], "low": [-9.0], "high": [9.0]}}
PLACED = {"where": {"kind": "vector", "size": 2, "scale": 0.5, "encoder": "place"}}


def noise(channels, *sizes):
    return [torch.randint(0, 256, (channels, *size), dtype=torch.uint8) for size in sizes]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(8, 30), st.integers(8, 30)), min_size=1, max_size=4))
def test_images_of_any_size_come_back(sizes):
    images = noise(3, *sizes)
    stream = LOSSLESS.compress(images, lossless=True, tile=True, progress=False)
    for image, found in zip(images, LOSSLESS.decompress(stream, output_type="np", progress=False), strict=True):
        assert (found == image.movedim(0, -1).numpy()).all()


def test_the_tokens_are_those_of_tiles_side_by_side():
    (image,) = noise(1, (8, 20))
    (found,) = LOSSY.decompress(LOSSY.compress([image], tile=True, progress=False), output_type="pt", progress=False)
    parts = LOSSY.reconstruct(torch.stack([image[..., at : at + 8] for at in (0, 8, 12)]), output_type="pt")
    torch.testing.assert_close(found, torch.cat([parts[0], parts[1][..., :4], parts[2]], 2))


def test_an_rgb_image_alone_is_lossless_with_a_likelihood():
    pipe = pipeline_of("pixels given tokens", channels=3)
    (image,) = noise(3, (8, 8))
    for tile in (False, True):
        stream = pipe.compress(image[None], lossless=True, tile=tile, progress=False)
        assert (pipe.decompress(stream, output_type="np", progress=False)[0] == image.movedim(0, -1).numpy()).all()


def test_tiles_have_the_condition_of_their_image_and_their_own_place():
    torch.manual_seed(0)
    pipe = make_conditioned(columns={**AGE, **PLACED}, outline=False)
    images = [Image.fromarray(image[0].numpy()) for image in noise(1, (8, 30), (20, 12))]
    stream = pipe.compress(images, tile=True, condition={"age": [-2.0, 3.0]}, progress=False)
    found = pipe.decompress(stream, condition={"age": [-2.0, 3.0]}, progress=False)
    assert [image.size for image in found] == [(30, 8), (12, 20)]
    with pytest.raises(StreamError, match="another condition"):
        pipe.decompress(stream, condition={"age": 3.0})
    with pytest.raises(ValueError, match="where: is the place of each tile"):
        pipe.compress(images, tile=True, condition={"where": [0.5, 0.5]})


def changed(data, **fields):
    header, chunks = read_stream(data)
    forged = header._replace(**fields)
    write_stream(file := io.BytesIO(), forged, chunks)
    return file.getvalue()


def test_damage_is_one_error():
    data = LOSSY.compress(noise(1, (9, 12)), tile=True, progress=False)
    header, _ = read_stream(data)
    assert data[7] == 3 and header.sizes == ((9, 12),) and header.images == 1 and header.num_coded == 4
    for at in range(len(data)):
        for wrong in (data[:at], data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]):
            with pytest.raises(StreamError):
                LOSSY.decompress(wrong)
    sizes = data.index(pack_section(np.array([9, 12], "<u2").tobytes()))
    for forged in ((7, 12), (9, 0), (65535, 8), (16384, 16384), (9, 12, 9, 12), ()):
        wrong = data[:sizes] + pack_section(np.array(forged, "<u2").tobytes()) + data[sizes + 12 :]
        with pytest.raises(DamagedStream) as caught:
            LOSSY.decompress(wrong)
        assert "\n" not in str(caught.value)
    for image in ((1, 4, 8), (3, 8, 8)):
        with pytest.raises(DamagedStream, match="another size"):
            LOSSY.decompress(changed(data, image=image, sizes=((8, 8),)))
    fields = data[12:28] + bytes(6) + data[34:49]
    with pytest.raises(DamagedStream, match="no pixels"):
        read_stream(data[:8] + pack_section(fields) + data[53:])
    with pytest.raises(StreamError):  # more tiles than are there
        LOSSY.decompress(changed(data, sizes=((9, 17),)), progress=False)
    with pytest.raises(StreamError, match="limit is 0"):
        LOSSY.decompress(data, max_images=0)


def test_the_verbs(tmp_path, capsys):
    LOSSLESS.save_pretrained(tmp_path / "pipeline")
    images = noise(3, (8, 8), (9, 30), (20, 11))
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.movedim(0, -1).numpy()).save(tmp_path / "images" / f"{number}.png")
    argv = [f"pipeline={tmp_path}/pipeline", "device=cpu"]
    own = [*argv, "lossless=true", f"images={tmp_path}/images", f"out={tmp_path}/a.smalti"]
    assert "tile=true" in fails(capsys, "compress", *own)
    assert "tile: keeps the size" in fails(capsys, "compress", *own, "tile=true", "resize=true")
    compress_verb([*own, "tile=true"])
    assert "3 images" in capsys.readouterr().out
    decompress_verb([*argv, f"stream={tmp_path}/a.smalti", f"out={tmp_path}/again"])
    for number, image in enumerate(images):
        assert (np.asarray(Image.open(tmp_path / "again" / f"{number}.png")) == image.movedim(0, -1).numpy()).all()
    Image.new("RGB", (7, 9)).save(tmp_path / "images" / "small.png")
    assert "smaller than a tile" in fails(capsys, "compress", *own, "tile=true", "overwrite=true")


def test_each_tile_has_its_class():
    """Without labels; columns are those of its image."""
    torch.manual_seed(0)
    pipe = make_conditioned(columns={**AGE, **PLACED}, outline=False)
    with torch.no_grad():
        pipe.prior.class_embedding.weight.mul_(100)
        pipe.prior.head.weight.mul_(20)
    images, age = noise(1, (8, 30), (20, 12)), {"condition": {"age": [-2.0, 3.0]}}
    stream = pipe.compress(images, tile=True, progress=False, **age)
    assert read_stream(stream)[1][0].classes
    found = pipe.decompress(stream, output_type="pt", progress=False, batch_size=2, **age)
    plain = pipe.compress(images, tile=True, progress=False, condition={**age["condition"], "label": None})
    assert not read_stream(plain)[1][0].classes and len(stream) < len(plain)
    again = pipe.decompress(plain, output_type="pt", progress=False, batch_size=2, **age)
    assert all(map(torch.equal, found, again))
