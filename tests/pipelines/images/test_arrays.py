"""Images of many channels and more than 8 bits: reading, range, pictures, and a run of all stages."""

from __future__ import annotations

import io
import tarfile

import datasets
import numpy as np
import pytest
import torch
from command import fails
from givens.images import png_of
from hypothesis import given
from hypothesis import strategies as st
from optional import Late
from PIL import Image

from pipelines import ImagePipeline, evaluate, generate, train_prior, train_tokenizer
from pipelines.__main__ import main
from pipelines.config import UserError
from pipelines.images import DataConfig, load_images
from pipelines.images.formats import try_decode
from pipelines.images.pictures import to_images
from tokenizer import Tokenizer
from tokenizer.files import ConfigError
from tokenizer.spec import ImageSpec, to_uint8

tifffile = Late("tifffile")
DEEP = {"dtype": "uint16", "low": 0.0, "high": 65535.0}


def blobs(count, seed=0, channels=6, side=16):
    """Smooth uint16 images (count, side, side, channels) between 100 and 5,000."""
    noise = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, (side, side), mode="bicubic").sigmoid()
    smooth = smooth * torch.linspace(1, 0.3, channels)[:, None, None]
    return (100 + 4900 * smooth).round().movedim(1, -1).numpy().astype(np.uint16)


def write_arrays(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(arrays):
        np.save(folder / f"{number:03d}.npy", array)
    return folder


def tiff(pages):
    file = io.BytesIO()
    first, *rest = map(Image.fromarray, pages)
    first.save(file, "TIFF", save_all=True, append_images=rest)
    return file.getvalue()


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


# Range


@given(
    st.sampled_from(["uint8", "uint16"]),
    st.integers(0, 2**16 - 2),
    st.integers(1, 2**16),
    st.integers(0, 2**32),
)
def test_whole_numbers_come_back_exactly(dtype, low, width, seed):
    most = int(np.iinfo(dtype).max)
    low %= most
    spec = ImageSpec(2, 3, 5, dtype=dtype, low=low, high=min(low + width, most))
    array = np.random.default_rng(seed).integers(low, spec.high + 1, (3, 5, 2)).astype(dtype)
    unit = spec.to_unit(np.moveaxis(array, -1, 0))
    assert unit.dtype == torch.float32 and unit.abs().max() <= 1
    found = spec.from_unit(unit, "np")
    assert found.dtype == array.dtype and np.array_equal(found, array)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(0, 2**32))
def test_floats_come_back_up_to_rounding(low, width, seed):
    spec = ImageSpec(2, 3, 5, dtype="float32", low=low, high=low + width)
    array = np.random.default_rng(seed).uniform(low, low + width, (3, 5, 2)).astype(np.float32)
    rounding = np.finfo(np.float32).eps * (width + abs(low))
    found = spec.from_unit(spec.to_unit(np.moveaxis(array, -1, 0)), "np")
    assert np.abs(found - array.clip(low, low + width)).max() <= rounding


@pytest.mark.parametrize("values", [("uint16", 0.0, 65535.0), ("float32", -3.0, 5.0)])
def test_arrays_come_back_through_to_images(values):
    spec = ImageSpec(6, 7, 5, 1, *values)
    array = np.random.default_rng(0).uniform(spec.low, spec.high, (4, 7, 5, 6)).astype(spec.dtype)
    images = to_images(array, spec)
    assert images.shape == (4, 6, 7, 5) and images.dtype == torch.float32 and float(images.abs().max()) <= 1
    found = spec.from_unit(images, "np")
    assert found.dtype == array.dtype and np.allclose(found, array, rtol=0, atol=1e-6 if spec.dtype[0] == "f" else 0)
    assert torch.equal(to_images(list(array), spec), images)
    assert torch.equal(to_images(images, spec), images)


# Files


def spec_of(dtype, *shape):
    return ImageSpec(*shape) if dtype == "uint8" else ImageSpec(*shape, dtype=dtype, low=0.0, high=250.0)


@pytest.mark.parametrize("kind", ["npy", "npz", "first", "tiff"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_every_format_gives_the_same_values(kind, dtype):
    array = (blobs(1)[0] / 25).astype(dtype)
    spec = spec_of(dtype, 6, 16, 16)
    first = np.ascontiguousarray(array.transpose(2, 0, 1))
    data = {"npy": npy(array), "npz": npz(a=array, b=array[:2]), "first": npy(first), "tiff": tiff(first)}[kind]
    found = try_decode(data, spec)
    assert not isinstance(found, str), found
    expected = first if spec.is_bytes else spec.scale(first)
    assert found.dtype == expected.dtype and np.array_equal(found, expected)


def deep_png(array):
    """A PNG of 16-bit values (H, W, C), which Pillow cannot write."""
    height, width, channels = array.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    return png_of(width, height, lines, bits=16, colours={1: 0, 2: 4, 3: 2, 4: 6}[channels])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_colours_of_16_bits_keep_them(channels, tmp_path):
    array = np.random.default_rng(channels).integers(0, 65536, (9, channels + 2, channels)).astype(np.uint16)
    data = deep_png(array)
    spec = ImageSpec(channels, 9, channels + 2, **DEEP)
    assert np.array_equal(spec.from_unit(torch.from_numpy(try_decode(data, spec)), "np"), array)
    assert isinstance(try_decode(data[:70], spec), str)
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(data)
    shape = {"channels": channels, "image_size": 9}
    assert values_of(load_images(data_of(tmp_path, **shape)).train) == ("uint16", array.min(), array.max())
    if channels in (1, 3):
        assert load_images(data_of(tmp_path, dtype="uint8", **shape)).train.spec.is_bytes


def test_a_tiff_whose_codec_is_missing_names_the_extra(tmp_path, monkeypatch):
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((8, 8, 3), np.uint16), photometric="rgb", compression="zlib")
    data = file.getvalue()
    for number in range(12):
        (tmp_path / f"{number}.tif").write_bytes(data)

    def asarray(page):
        raise ValueError(f"{page.compression!r} requires the 'imagecodecs' package")  # the words of tifffile

    monkeypatch.setattr(tifffile.TiffPage, "asarray", asarray)
    line = try_decode(data, ImageSpec(3, 8, 8, **DEEP))
    assert line.endswith('pip install "smalti[tiff]"')
    with pytest.raises(UserError, match=r"data.dtype: .*smalti\[tiff\].*data.dtype=uint8 reads 8 bits"):
        load_images(data_of(tmp_path, channels=3, image_size=8))


# Data sets


def values_of(images):
    return images.spec.dtype, images.spec.low, images.spec.high


def data_of(folder, **more):
    return DataConfig(**{"source": str(folder), "channels": 6, "image_size": 16, **more})


def test_range_is_measured_on_training_images(tmp_path, capsys):
    arrays = blobs(40)
    images = load_images(data_of(write_arrays(tmp_path / "a", arrays)))
    rows = images.train.origin[1]
    low, high = int(arrays[rows].min()), int(arrays[rows].max())
    assert values_of(images.train) == values_of(images.held_out) == ("uint16", low, high)
    assert f"uint16 from {low} to {high}" in capsys.readouterr().err
    batch = images.train.batch([0, 1])
    assert torch.equal(batch, images.train.spec.to_unit(arrays[rows[:2]]).movedim(-1, 1))
    lazy = load_images(data_of(tmp_path / "a", cache_mb=0))
    assert torch.equal(lazy.train.batch([0, 1]), batch)


def test_a_range_that_clips_is_reported(tmp_path, capsys):
    folder = write_arrays(tmp_path / "a", blobs(20))
    load_images(data_of(folder, range=(0, 10_000)))
    assert "warning" not in capsys.readouterr().err
    load_images(data_of(folder, range=(0, 2000)))
    assert "data.range=0,2000 clips" in (printed := capsys.readouterr().err) and ".npy" in printed


def test_bad_arrays_are_named(tmp_path):
    arrays = list(blobs(20).astype(np.float32))
    arrays[3][0, 0, 0] = np.inf
    with pytest.raises(UserError, match="003.npy: 1 of 1,536 values are NaN or infinite"):
        load_images(data_of(write_arrays(tmp_path / "a", arrays)))
    with pytest.raises(UserError, match="data.range: .* cannot be measured.*npy: shape .16, 16, 6.; data.channels=5"):
        load_images(data_of(tmp_path / "a", channels=5))
    with pytest.raises(UserError, match="all are 0"):
        load_images(data_of(write_arrays(tmp_path / "b", np.zeros((20, 16, 16, 6), np.uint16))))


@pytest.mark.parametrize("kind", ["bytes", "array", "lists", "tar"])
def test_tables_hold_arrays(kind, tmp_path):
    arrays, more = blobs(20), {}
    if kind == "tar":
        more = {"image_column": "npy"}
        with tarfile.open(tmp_path / "train.tar", "w") as file:
            for number, array in enumerate(arrays):
                member = tarfile.TarInfo(f"{number:03d}.npy")
                member.size = len(npy(array))
                file.addfile(member, io.BytesIO(npy(array)))
    else:
        column = {
            "bytes": datasets.Value("binary"),
            "array": datasets.Array3D((16, 16, 6), "uint16"),
            "lists": datasets.List(datasets.List(datasets.List(datasets.Value("uint16")))),
        }[kind]
        cells = [npy(array) for array in arrays] if kind == "bytes" else list(arrays)
        table = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": column}))
        table.to_parquet(tmp_path / "train.parquet")
    images = load_images(data_of(tmp_path, **more))
    rows = images.train.origin[1]
    assert values_of(images.train) == ("uint16", arrays[rows].min(), arrays[rows].max())
    expected = images.train.spec.to_unit(arrays[rows]).movedim(-1, 1)
    assert torch.equal(images.train.pixels(range(len(rows))), expected)
    with pytest.raises(UserError, match="data.streaming"):
        load_images(data_of(tmp_path, streaming=True, **more))


def test_tokenizers_that_take_8_bits_say_so():
    for kind in ("pixels", "palette", "maskgit", "magvit2", "cosmos"):
        with pytest.raises(ConfigError, match="takes 8-bit images with 1 or 3 channels"):
            Tokenizer.find(kind).Config(image_size=32, channels=6)
    with pytest.raises(ConfigError, match="likelihood discretized_logistic takes 8-bit"):
        Tokenizer.find("vqvae").Config(image_size=32, channels=6, likelihood="discretized_logistic")


# All stages


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of 6-channel uint16 arrays, and the runs of all stages on it."""
    root = tmp_path_factory.mktemp("arrays")
    write_arrays(root / "images", blobs(200))
    common = ["train.batch_size=16", "train.mixed_precision=no"]
    data = [f"data.source={root / 'images'}", "data.channels=6", "data.image_size=16", "data.show=5,2,0"]
    sizes = ["model.kind=vqvae", "model.widths=[16]", "model.blocks=[1]", "model.quantizer.codes=32"]
    train_tokenizer.main([f"out={root / 'tok'}", *data, *sizes, *common, "train.steps=150", "data.augment.flip=true"])
    main(["encode", f"tokenizer={root / 'tok'}", f"out={root / 'tokens'}"])
    gpt = ["model.kind=gpt", "model.dim=32", "model.depth=1", "model.heads=2"]
    train_prior.main([f"out={root / 'prior'}", f"tokens={root / 'tokens'}", *gpt, *common, "train.steps=5"])
    return root


def test_all_stages_use_the_measured_range(run):
    pipe, arrays = ImagePipeline.from_pretrained(run / "prior"), blobs(200)
    assert pipe.spec.dtype == "uint16" and pipe.spec.shape == (6, 16, 16)
    assert arrays.min() <= pipe.spec.low < pipe.spec.high <= arrays.max()
    found = pipe.reconstruct(arrays, output_type="np")
    assert found.dtype == np.uint16 and found.shape == arrays.shape
    error = np.abs(found.astype(float) - arrays).mean()
    assert error < 0.8 * np.abs(arrays - arrays.mean((0, 1, 2))).mean()  # better than the mean colour
    tokens = pipe.encode(arrays)
    assert torch.equal(pipe.encode(pipe.to_images(arrays)), tokens)
    assert np.array_equal(pipe.decode(tokens, output_type="np"), found)
    assert pipe.log_prob(arrays).shape == pipe.anomaly_score(arrays, method="nll").shape == (200,)
    assert pipe.embed(arrays[:4]).shape[0] == 4


def test_pictures_show_the_chosen_channels(run):
    pipe = ImagePipeline.from_pretrained(run / "prior")
    images = pipe(2, seed=0, output_type="pt").images
    pictures = pipe(2, seed=0).images
    expected = to_uint8(images[:, [5, 2, 0]]).movedim(1, -1).numpy()
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), expected)
    floats = pipe(2, seed=0, output_type="pt").grid(show=(5, 2, 0))
    assert np.array_equal(np.asarray(pipe(2, seed=0).grid()), np.asarray(floats))
    preview = next((run / "tok" / "previews").glob("reconstructions-*.png"))
    assert Image.open(preview).mode == "RGB"


def test_generate_writes_the_declared_type(run):
    out = generate.main([f"pipeline={run / 'prior'}", "num_images=3", f"out={run / 'samples.npz'}"])
    found = np.load(run / "samples.npz")["arr_0"]
    expected = ImagePipeline.from_pretrained(run / "prior")(3, seed=0, output_type="np").images
    assert found.dtype == np.uint16 and np.array_equal(found, expected), out
    generate.main([f"pipeline={run / 'prior'}", "num_images=3", f"out={run / 'samples'}"])
    assert np.array_equal(np.load(run / "samples" / "00002.npy"), expected[2])
    generate.main([f"pipeline={run / 'prior'}", "num_images=3", f"out={run / 'grid.png'}"])
    assert Image.open(run / "grid.png").mode == "RGB"


def test_evaluation_and_detection_run(run):
    pipeline = f"pipeline={run / 'prior'}"
    figures = evaluate.main([pipeline, "num_images=16", "feature_steps=0", f"out={run / 'evaluation'}"])
    pipe, arrays = ImagePipeline.from_pretrained(run / "prior"), blobs(200)
    data = load_images(data_of(run / "images", range=(pipe.spec.low, pipe.spec.high)))
    arrays = arrays[data.held_out.origin[1]]
    error = pipe.reconstruct(arrays, output_type="np").astype(float) - arrays
    span = pipe.spec.high - pipe.spec.low
    clipped = arrays.clip(pipe.spec.low, pipe.spec.high) - arrays
    assert np.abs(clipped).max() <= 0.02 * span  # held-out values may lie beyond the measured range
    by_hand = 10 * np.log10(span**2 / np.square(error - clipped).mean((1, 2, 3)))
    assert figures["psnr"] == pytest.approx(by_hand.mean(), abs=0.02)
    assert figures["l1"] * span / 2 == pytest.approx(np.abs(error - clipped).mean(), rel=0.01)
    assert (run / "evaluation" / "reconstructions.png").exists()
    main(["calibrate", f"{pipeline}/pipeline", "false_alarms=0.3"])
    write_arrays(run / "other", blobs(4, seed=9))
    main(["detect", pipeline, f"images={run / 'other'}", f"out={run / 'found'}", "method=nll"])
    assert len((run / "found" / "scores.csv").read_text().splitlines()) == 5


def test_verbs_for_pictures_say_so(run, capsys):
    pipeline = f"pipeline={run / 'prior'}"
    line = fails(capsys, "compress", pipeline, f"images={run / 'images'}", f"out={run / 'x.smalti'}")
    assert "takes 8-bit images" in line
    line = fails(capsys, "evaluate", pipeline, "inception_weights=x", f"out={run / 'y'}")
    assert "Inception takes images with 1 or 3 channels (these have 6)" in line
