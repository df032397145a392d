"""FID, Inception Score and reference files: as torch-fidelity computes them, and nothing is read that is not wanted.

Covers: pipelines/metrics/fid.py.
"""

from __future__ import annotations

import io
import os
import zipfile
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from optional import needs_torch_fidelity
from PIL import Image

from pipelines.config import UserError
from pipelines.images import to_float
from pipelines.metrics import inception as module
from pipelines.metrics.fid import Ruler, make_ruler
from pipelines.metrics.frechet import distance, moments
from pipelines.metrics.inception import Inception, inception_score, load_inception, read_reference
from pipelines.metrics.quality import shuffled
from pipelines.metrics.samples import Samples
from pipelines.processes.group import ALONE


class Pictures:
    """Random images as a data set."""

    image_shape, labels = (3, 20, 20), None

    def __init__(self, count: int, seed: int, brightness: int = 256) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.pixels = torch.randint(0, brightness, (count, *self.image_shape), dtype=torch.uint8, generator=draw)

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, rows: Any) -> torch.Tensor:
        return to_float(self.pixels[torch.as_tensor(rows)])


def of_pixels(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A net that sees the means of corners."""
    assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3
    features = torch.nn.functional.adaptive_avg_pool2d(pixels.float(), 2).flatten(1)
    return features, features[:, :6] / 20


CPU = torch.device("cpu")
NET = Inception(of_pixels, CPU)


def features_of(pictures: Pictures) -> torch.Tensor:
    return of_pixels(pictures.pixels)[0]


@pytest.fixture
def images() -> Any:
    return SimpleNamespace(train=Pictures(50, 0), held_out=Pictures(40, 1, 200))


def darker(batch: torch.Tensor) -> torch.Tensor:
    """What a tokenizer may make of images."""
    return batch * 0.8


# Figures


@pytest.mark.parametrize("reference", ["held_out", "train", "a file"])
def test_figures_are_of_the_images_that_they_name(images, reference):
    drawn = Pictures(60, 2)
    samples = Samples(lambda start, end: drawn.batch(range(start, end)), 60)
    published = moments(features_of(Pictures(500, 5))) if reference == "a file" else None
    figures = Ruler(NET, reference, published).figures(images, darker, samples)
    real, rows = moments(features_of(images.held_out)), features_of(drawn)
    rebuilt = of_pixels(((darker(images.held_out.batch(range(40))) + 1) * 127.5).round().to(torch.uint8))[0]
    assert figures["rfid"] == pytest.approx(distance(moments(rebuilt), real)) and figures["rfid"] > 1
    scores = figures["inception_score"], figures["inception_score_deviation"]
    assert scores == inception_score(of_pixels(drawn.pixels)[1])
    told = figures["fid_protocol"]
    if reference == "held_out":  # as many on each side
        against, count, said = moments(features_of(images.held_out)), 40, "40 samples against 40 held-out images; "
        known = images.train.pixels[shuffled(50)[:40]]
        assert figures["train_fid"] == pytest.approx(distance(moments(of_pixels(known)[0]), against))
    else:
        against = published or moments(features_of(images.train))
        what = "mu and sigma of a file" if published else "all 50 training images"
        count, said = 60, f"60 samples against {what}; "
        assert figures["held_out_fid"] == pytest.approx(distance(real, against)) and "train_fid" not in figures
    assert figures["fid"] == pytest.approx(distance(moments(rows[:count]), against))
    for text in (told, figures["rfid_protocol"], figures["inception_score_protocol"]):
        assert text.endswith(
            "8-bit images of 20 x 20, resized to 299 x 299 as TensorFlow 1 does; "
            "weights-inception-2015-12-05-6726825d.pth"
        )
    assert told.startswith(said) and figures["rfid_protocol"].startswith("40 held-out images and their recon")
    assert figures["inception_score_protocol"].startswith("60 samples in 10 parts")


@pytest.mark.parametrize("count", [0, 9])
def test_few_samples_leave_the_figure_of_reconstructions(images, count):
    drawn = Pictures(9, 2)
    samples = Samples(lambda start, end: drawn.batch(range(start, end)), count) if count else None
    assert set(Ruler(NET).figures(images, darker, samples)) == {"rfid", "rfid_protocol"}


def test_grey_images_are_seen_as_colours():
    seen, _ = NET(torch.zeros(2, 1, 4, 4))
    assert seen.shape == (2, 12)


@needs_torch_fidelity
@pytest.mark.parametrize("count", [10, 64, 107])
def test_inception_score_is_torch_fidelitys(count):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * torch.randn(count, 50, generator=torch.Generator().manual_seed(count))
    expected = isc_features_to_metric(logits)
    found = inception_score(logits)
    assert found == pytest.approx((expected["inception_score_mean"], expected["inception_score_std"]), rel=1e-9)
    assert 1 <= found[0] < 50


def test_inception_score_knows_one_class_from_many():
    sure = 50 * torch.eye(20).repeat(100, 1)
    assert inception_score(sure)[0] == pytest.approx(20, rel=0.05)
    assert inception_score(sure[:1].expand(100, -1)) == (pytest.approx(1), pytest.approx(0))


# The very network


@pytest.mark.slow
@needs_torch_fidelity
def test_figures_are_torch_fidelitys_on_the_same_pictures(tmp_path, monkeypatch):
    """By its own command for folders of pictures, with random weights, as nobody has to have the right ones."""
    from torch_fidelity import calculate_metrics
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    made = random_weights(FeatureExtractorInceptionV3)
    torch.save(made, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    monkeypatch.setattr(module, "SHA256", module.hashlib.sha256(content).hexdigest())
    sets = {"first": Pictures(24, 0), "second": Pictures(24, 1, 180)}
    for name, pictures in sets.items():
        (tmp_path / name).mkdir()
        for number, image in enumerate(pictures.pixels):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{number:02}.png")
    theirs = calculate_metrics(
        input1=str(tmp_path / "first"),
        input2=str(tmp_path / "second"),
        fid=True,
        isc=True,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,  # else images are read in processes, and torch looks after these for good
        feature_extractor_weights_path=str(tmp_path / "weights.pth"),
    )
    net = load_inception(str(tmp_path / "weights.pth"), CPU)
    logits: dict[int, torch.Tensor] = {}
    second, first = (
        net.moments([0, 12], lambda part, p=sets[name]: p.batch(range(part, part + 12)), ALONE, logits)
        for name in ("second", "first")  # whose logits stay
    )
    found = distance(first, second)
    score = inception_score(torch.cat([logits[0], logits[12]]))
    print(theirs, found, score)
    assert found == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3) and found > 1e-2
    assert score == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-4)


def random_weights(kind: type) -> dict[str, torch.Tensor]:
    """Of the network, so that features differ from image to image."""

    class Bare(kind):  # type: ignore[misc, valid-type]
        def load_state_dict(self, state: Any) -> None:
            pass

    file = io.BytesIO()
    torch.save({}, file)
    net = Bare("bare", ["2048"], io.BytesIO(file.getvalue()))
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=0.2)
    return net.state_dict()


# Reference files


FEATURES = 24


@pytest.fixture
def few_features(monkeypatch):
    """2048 take seconds to decompose."""
    monkeypatch.setattr(module, "ARRAYS", {"mu.npy": (FEATURES,), "sigma.npy": (FEATURES, FEATURES)})


def test_a_reference_has_2048_features():
    assert module.ARRAYS == {"mu.npy": (2048,), "sigma.npy": (2048, 2048)}


def write_reference(path: Any, **arrays: Any) -> Any:
    """A file like ADM's, with `arrays` in place of the right ones (None: left out)."""
    draw = np.random.default_rng(0)
    factor = draw.standard_normal((16, FEATURES))
    right = {"mu": draw.standard_normal(FEATURES), "sigma": factor.T @ factor / 16, "mu_s": np.zeros(3)}
    np.savez(path, **{name: value for name, value in {**right, **arrays}.items() if value is not None})
    return path


def test_a_reference_is_its_moments(tmp_path, few_features):
    path = write_reference(tmp_path / "adm.npz")
    found, digest = read_reference(path)
    with np.load(path) as arrays:
        np.testing.assert_array_equal(found.mean.numpy(), arrays["mu"])
        np.testing.assert_allclose((found.factor.t() @ found.factor).numpy(), arrays["sigma"], atol=1e-9)
        single = {name: np.asfortranarray(arrays[name].astype(np.float32)) for name in ("mu", "sigma")}
    assert len(digest) == 8
    again, other = read_reference(write_reference(tmp_path / "single.npz", **single))
    assert other != digest
    torch.testing.assert_close(again.mean, found.mean, rtol=1e-6, atol=1e-6)


UNPICKLED = "unpickled"  # a folder where the test runs


class Loud:
    """What says so when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (UNPICKLED,)


ARRAY = np.zeros((FEATURES, FEATURES))
SPOILED = {
    "no sigma": ({"sigma": None}, "there is no sigma in it"),
    "other features": ({"mu": np.zeros(64)}, r"mu.npy has shape \(64,\) and type float64, 24 of float64 or"),
    "whole numbers": ({"mu": np.zeros(FEATURES, np.int64)}, "and type int64, 24 of float64"),
    "objects": ({"mu": np.array([Loud()] * FEATURES, dtype=object)}, "and type object, 24 of float64|bytes"),
    "not a number": ({"mu": np.full(FEATURES, np.nan)}, "holds numbers that are not finite"),
    "not symmetric": ({"sigma": ARRAY + np.triu(np.ones_like(ARRAY))}, "sigma is not symmetric"),
    "negative": ({"sigma": -np.eye(FEATURES)}, "sigma has negative variances"),
    "a bomb": ({"sigma": np.zeros((9 * FEATURES, FEATURES))}, "sigma.npy has 41,600 bytes, 5,632 at most"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_file_that_is_no_reference_is_refused_in_a_line(tmp_path, few_features, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    arrays, message = SPOILED[what]
    path = write_reference(tmp_path / "spoiled.npz", **arrays)
    with pytest.raises(UserError, match=rf"^reference: .*spoiled.npz.*({message}).*$"):
        read_reference(path)
    assert not os.path.exists(UNPICKLED)


def test_damaged_bytes_are_refused_in_a_line(tmp_path, few_features):
    """Cut anywhere, or with any byte turned: refused, or still finite moments."""
    small = tmp_path / "stored.npz"
    content = bytearray(write_reference(tmp_path / "whole.npz", sigma=np.eye(FEATURES, dtype=np.float32)).read_bytes())
    draw, refused = np.random.default_rng(1), 0
    for place in [*draw.integers(0, 400, 30), *draw.integers(len(content) - 400, len(content), 30)]:
        broken = bytearray(content)
        broken[place] ^= int(draw.integers(1, 256))
        small.write_bytes(broken if place % 2 else broken[:place])
        try:
            assert bool(read_reference(small)[0].mean.isfinite().all())
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"reference: {small}") and "\n" not in str(error)
    assert refused > 40


def test_an_array_that_says_it_is_long_and_is_not(tmp_path, few_features):
    """The header asks for all of it, and less follows; nothing is made up."""
    path = write_reference(tmp_path / "whole.npz", sigma=None)
    short = tmp_path / "short.npz"
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(short, "w") as file:
        file.writestr("mu.npy", whole.read("mu.npy")[:-8])
        file.writestr("sigma.npy", b"")
    with pytest.raises(UserError, match="mu.npy is cut off"):
        read_reference(short)


@pytest.mark.parametrize("kind", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_an_array_that_numpy_did_not_write_is_refused(tmp_path, kind):
    with zipfile.ZipFile(tmp_path / "odd.npz", "w", kind) as file:
        file.writestr("mu.npy", b"anything")
    with pytest.raises(UserError, match="mu.npy is compressed as numpy never does"):
        read_reference(tmp_path / "odd.npz")


def test_what_is_asked_for_is_checked_before_the_work(tmp_path):
    with pytest.raises(UserError, match=r"^reference: 'elsewhere.npz' is neither held_out, train nor a file$"):
        make_ruler("weights.pth", "elsewhere.npz", CPU)
    with pytest.raises(UserError, match=r"^reference: it is what FID is taken against, which needs inception_weights"):
        make_ruler(None, "train", CPU)
    with pytest.raises(UserError, match=r"^reference: .*weights.pth cannot be read: File is not a zip file$"):
        (tmp_path / "weights.pth").write_bytes(b"no zip")
        make_ruler("weights.pth", str(tmp_path / "weights.pth"), CPU)
    assert make_ruler(None, "held_out", CPU) is None
