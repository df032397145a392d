"""RGBA pictures: `data.alpha` from the files to what each verb writes.

Covers: tokenizer/spec.py, tokenizer/pixels.py, pipelines/images/formats.py, pipelines/images/grids.py,
pipelines/generate.py, pipelines/compression/coding.py, pipelines/commands/train.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from command import fails
from PIL import Image
from small import make_tokenizer
from small_pipelines import make_pipeline, pixels_for

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.images import DataConfig
from pipelines.images.formats import decode_image
from tokenizer import Tokenizer
from tokenizer.files import ConfigError
from tokenizer.spec import ImageSpec, to_float

pytestmark = pytest.mark.usefixtures("one_process")
SPEC = ImageSpec(4, 8, 12, alpha=True)
RGBA = {"alpha": True}


def random_picture(seed=0, size=(8, 12)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 4), dtype=np.uint8)
    pixels[: size[0] // 2, :, 3] = 0  # transparent pixels, which have colours too
    return Image.fromarray(pixels)


def write_sprites(folder, count=12, size=(8, 12)):
    for kind in ("axe", "bow"):
        (folder / kind).mkdir(parents=True)
        for number in range(count // 2):
            random_picture(hash((kind, number)) % 1000, size).save(folder / kind / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return make_pipeline("pixels", channels=4, sizes={"levels": 256, **RGBA})


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("pipeline") / "sprites")
    return folder


def test_files_are_read_with_their_transparency():
    picture = random_picture()
    assert np.array_equal(decode_image(picture, SPEC), np.asarray(picture).transpose(2, 0, 1))
    opaque = decode_image(picture.convert("RGB"), SPEC)
    assert (opaque[3] == 255).all() and np.array_equal(opaque[:3], np.asarray(picture)[..., :3].transpose(2, 0, 1))
    deep = Image.fromarray(np.full((8, 12), 65535, np.uint16))
    assert (decode_image(deep, SPEC) == 255).all()
    grey = Image.merge("LA", [Image.new("L", (12, 8), 90), Image.new("L", (12, 8), 30)])
    assert [*decode_image(grey, SPEC)[:, 0, 0]] == [90, 90, 90, 30]
    indexed = Image.new("P", (12, 8), 1)
    indexed.putpalette([9, 9, 9, 200, 100, 50])
    indexed.info["transparency"] = 1
    assert [*decode_image(indexed, SPEC)[:, 0, 0]] == [200, 100, 50, 0]


def test_hidden_colours_do_not_bleed_when_an_image_is_resized():
    pixels = np.zeros((32, 48, 4), np.uint8)
    pixels[..., 0], pixels[:, :24] = 255, (0, 0, 200, 255)  # blue beside transparent red
    small = decode_image(Image.fromarray(pixels), SPEC)
    assert (small[0][small[3] > 0] <= 1).all()


def test_pictures_show_rgba_images_on_white_and_pil_images_keep_transparency():
    image = torch.tensor([200, 100, 0, 51], dtype=torch.uint8)[:, None, None].expand(SPEC.shape)
    assert [*SPEC.picture(to_float(image))[0, 0]] == [244, 224, 204]  # a fifth of the colour
    (picture,) = SPEC.from_unit(to_float(image)[None], "pil")
    assert picture.mode == "RGBA" and picture.getpixel((0, 0)) == (200, 100, 0, 51)
    assert SPEC.describe() == "8 x 12 RGBA images"


def test_four_channels_without_alpha_are_no_picture_and_files_do_not_mention_it(tmp_path):
    plain, found = make_tokenizer("vqvae", (8, 12), 4), make_tokenizer("vqvae", (8, 12), 4, **RGBA)
    assert not plain.spec.is_picture and found.spec.is_picture and "alpha" not in plain.config.to_dict()
    found.save_pretrained(tmp_path / "t")
    assert Tokenizer.from_pretrained(tmp_path / "t").spec.alpha
    with pytest.raises(ValueError, match="alpha: the pipeline takes 8 x 12 RGBA images; set data.alpha=true"):
        found.spec.require(plain.spec, "pipeline")


def test_alpha_is_for_8_bit_images_of_four_channels():
    deep, shown = {"channels": 4, "dtype": "uint16", "range": (0, 9)}, {"channels": 4, "show": (0, 1, 2)}
    for wrong in ({"channels": 3}, deep, shown):
        with pytest.raises(ValueError, match="alpha: is for 8-bit images with channels=4"):
            DataConfig(source="digits", alpha=True, **wrong)
    with pytest.raises(ValueError, match="alpha: is for images, not for the frames of clips"):
        DataConfig(source="digits", alpha=True, channels=4, frames=4)
    with pytest.raises(ConfigError, match="takes 8-bit images with 1 or 3 channels, or RGBA pictures"):
        make_tokenizer("pixels", (8, 12), 4)
    with pytest.raises(ConfigError, match="discretized_logistic takes 8-bit images with 1 or 3 channels"):
        make_tokenizer("vqvae", (8, 12), 4, likelihood={"kind": "discretized_logistic"}, **RGBA)


@pytest.mark.parametrize("kind", ["pixels", "palette"])
def test_tokens_of_pixels_keep_opacity(kind):
    tokenizer = make_tokenizer(kind, (8, 12), 4, **RGBA, **({"levels": 256} if kind == "pixels" else {"colors": 90}))
    images = to_float(torch.from_numpy(decode_image(random_picture(), SPEC).copy()))[None]
    if kind == "palette":
        tokenizer.initialize(images)
    off = (tokenizer.decode(tokenizer.encode(images)) - images).abs()
    assert float(off.max()) < (1e-6 if kind == "pixels" else 0.5)


def test_grids_of_any_output_type_are_the_same(pipe):
    out = pipe(3, seed=1, progress=False)
    again = pipe(3, seed=1, output_type="pt", progress=False)
    assert out.images[0].mode == "RGBA"
    assert np.array_equal(np.asarray(out.grid(3)), np.asarray(again.grid(3)))
    assert np.asarray(out.grid(3)).shape[-1] == 3


def test_generate_writes_files_with_transparency(saved, pipe, tmp_path):
    known = pipe(4, labels="cat", seed=0, output_type="np", progress=False).images
    same = [f"pipeline={saved}", "num_images=4", "labels=cat", "seed=0"]
    main(["generate", *same, f"out={tmp_path}/images"])
    found = [Image.open(path) for path in sorted((tmp_path / "images").glob("*.png"))]
    assert all(image.mode == "RGBA" for image in found)
    assert np.array_equal(np.stack([np.asarray(image) for image in found]), known)
    main(["generate", *same, f"out={tmp_path}/all.npz"])
    assert np.array_equal(np.load(tmp_path / "all.npz")["arr_0"], known)
    main(["generate", *same, f"out={tmp_path}/sheet.png"])
    assert Image.open(tmp_path / "sheet.png").mode == "RGB"


def test_lossless_streams_restore_rgba_files(saved, pipe, tmp_path, capsys):
    folder = write_sprites(tmp_path / "sprites", 4)
    main(["compress", f"pipeline={saved}", f"images={folder}", f"out={tmp_path}/s.smalti"])
    main(["decompress", f"pipeline={saved}", f"stream={tmp_path}/s.smalti", f"out={tmp_path}/again"])
    paths = sorted(folder.rglob("*.png"))
    restored = sorted((tmp_path / "again").rglob("*.png"))
    assert len(restored) == 4
    for path, other in zip(paths, restored, strict=True):
        assert Image.open(other).mode == "RGBA"
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(other)))
    random_picture().convert("RGB").save(tmp_path / "opaque.png")
    opaque = [f"images={tmp_path}/opaque.png", f"out={tmp_path}/opaque.smalti", "lossless=true"]
    line = fails(capsys, "compress", f"pipeline={saved}", *opaque)
    assert "lossless compression needs images of mode RGBA here, this one is RGB" in line


def test_complete_draws_rgba_images_on_white(saved, tmp_path):
    random_picture().save(tmp_path / "one.png")
    images = f"images={tmp_path}/one.png"
    main(["complete", f"pipeline={saved}", images, "mask=bottom", "draws=1", f"out={tmp_path}/done.png"])
    sheet = np.asarray(Image.open(tmp_path / "done.png"))
    assert sheet.shape[-1] == 3 and (sheet[4:10, 4:10] == 255).all()  # the original's upper half is transparent


def test_images_of_four_channels_have_a_likelihood(pipe):
    images = pipe.to_images(pixels_for(pipe, 2))
    found = pipe.log_prob(images)
    assert found.shape == (2,) and bool((found < 0).all())
    assert torch.equal(pipe.decode_batch(pipe.encode_batch(images), progress=False), images)


def test_the_folder_is_read_again(saved, pipe):
    assert ImagePipeline.from_pretrained(saved).spec == pipe.spec == SPEC
