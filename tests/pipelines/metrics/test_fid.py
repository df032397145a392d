"""FID, Inception Score and reference files, compared with torch-fidelity."""

from __future__ import annotations

import hashlib
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from optional import needs_torch_fidelity
from PIL import Image

from pipelines.config import UserError
from pipelines.metrics import fid
from pipelines.metrics.fid import Inception, load_inception, read_moments
from pipelines.metrics.frechet import distance, moments
from pipelines.metrics.quality import fixed_permutation
from pipelines.metrics.samples import EvaluatedSamples
from pipelines.processes.group import ALONE
from tokenizer.spec import ImageSpec, to_float

pytestmark = needs_torch_fidelity
CPU = torch.device("cpu")


class Pictures:
    """Random images as a data set."""

    spec, labels = ImageSpec(3, 20, 20), None

    def __init__(self, count: int, seed: int, brightness: int = 256) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.pixels = torch.randint(0, brightness, (count, *self.spec.shape), dtype=torch.uint8, generator=draw)

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, rows: Any) -> torch.Tensor:
        return to_float(self.pixels[torch.as_tensor(rows)])


def of_pixels(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A network whose features are the means of quadrants."""
    assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3
    features = torch.nn.functional.adaptive_avg_pool2d(pixels.float(), 2).flatten(1)
    return features, features[:, :6] / 20


def darker(batch: torch.Tensor) -> torch.Tensor:
    """A reconstruction."""
    return batch * 0.8


@pytest.fixture
def images() -> Any:
    return SimpleNamespace(train=Pictures(50, 0), held_out=Pictures(40, 1, 200))


@pytest.mark.parametrize("reference", ["held_out", "train", "a file"])
def test_each_figure_compares_the_sets_in_its_protocol(images, reference):
    from torch_fidelity.metric_isc import isc_features_to_metric

    drawn = Pictures(60, 2)
    samples = EvaluatedSamples(lambda start, end: drawn.batch(range(start, end)), 60)
    published = moments(of_pixels(Pictures(500, 5).pixels)[0]) if reference == "a file" else None
    figures = Inception(of_pixels, CPU, reference, published).figures(images, darker, samples, ALONE)
    (rows, logits), real = of_pixels(drawn.pixels), moments(of_pixels(images.held_out.pixels)[0])
    rebuilt = of_pixels(((darker(images.held_out.batch(range(40))) + 1) * 127.5).round().to(torch.uint8))[0]
    assert figures["rfid"] == pytest.approx(distance(moments(rebuilt), real)) and figures["rfid"] > 1
    score = isc_features_to_metric(logits)
    assert figures["inception_score"] == pytest.approx(score["inception_score_mean"])
    assert figures["inception_score_deviation"] == pytest.approx(score["inception_score_std"])
    if reference == "held_out":  # as many on each side
        against, count, said = real, 40, "40 samples against 40 held-out images"
        known = images.train.pixels[fixed_permutation(50)[:40]]
        assert figures["train_fid"] == pytest.approx(distance(moments(of_pixels(known)[0]), against))
    else:
        against = published or moments(of_pixels(images.train.pixels)[0])
        count = 60
        said = f"60 samples against {'mu and sigma of a file' if published else 'all 50 training images'}"
        assert figures["held_out_fid"] == pytest.approx(distance(real, against)) and "train_fid" not in figures
    assert figures["fid"] == pytest.approx(distance(moments(rows[:count]), against))
    assert figures["fid_protocol"] == f"{said}; weights-inception-2015-12-05-6726825d.pth"


def test_equal_sets_are_at_distance_zero_and_grey_images_work(images):
    net = Inception(of_pixels, CPU)
    assert abs(distance(net.moments(images.train, ALONE), net.moments(images.train, ALONE, count=50))) < 1e-3
    assert net(torch.zeros(2, 1, 4, 4))[0].shape == (2, 12)


@pytest.mark.slow
def test_figures_are_torch_fidelitys_on_the_same_pictures(tmp_path, monkeypatch):
    """torch-fidelity reads folders of pictures; random weights, because the published ones are a download."""
    from torch_fidelity import calculate_metrics
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(random_weights(FeatureExtractorInceptionV3), weights)
    monkeypatch.setattr(fid, "SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
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
        save_cpu_ram=True,  # else images are read in subprocesses that stay
        feature_extractor_weights_path=str(weights),
    )
    net = load_inception(str(weights), "train", CPU)
    splits: Any = SimpleNamespace(train=sets["second"], held_out=sets["first"])
    samples = EvaluatedSamples(lambda start, end: sets["first"].batch(range(start, end)), 24)
    found = net.figures(splits, darker, samples, ALONE)
    assert found["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3) and found["fid"] > 1e-2
    assert found["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)


def random_weights(kind: type) -> dict[str, torch.Tensor]:
    """Random weights of the network that make features differ between images."""

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


# Files


@pytest.fixture
def few_features(monkeypatch):
    """Use fewer than 2048 features, whose decomposition takes seconds."""
    monkeypatch.setattr(fid, "FEATURES", 24)


def write_reference(path: Any, **arrays: Any) -> Any:
    """Write a file like ADM's, with some arrays replaced (None: left out)."""
    draw = np.random.default_rng(0)
    factor = draw.standard_normal((16, 24))
    right = {"mu": draw.standard_normal(24), "sigma": factor.T @ factor / 16, "mu_s": np.zeros(3)}
    np.savez(path, **{name: value for name, value in {**right, **arrays}.items() if value is not None})
    return path


SPOILED = [
    {"sigma": None},
    {"mu": np.zeros(64)},
    {"mu": np.array([{}] * 24, dtype=object)},
    {"mu": np.full(24, np.nan)},
]


def test_a_reference_is_read_as_moments_and_a_damaged_one_is_one_line_of_error(tmp_path, few_features):
    files = [write_reference(tmp_path / "spoiled.npz", **arrays).read_bytes() for arrays in SPOILED]
    whole = write_reference(tmp_path / "whole.npz").read_bytes()
    with np.load(tmp_path / "whole.npz") as arrays:
        found = read_moments(tmp_path / "whole.npz")
        assert (found.mean.numpy() == arrays["mu"]).all() and (found.covariance.numpy() == arrays["sigma"]).all()
    np.save(tmp_path / "array.npy", np.zeros(3))
    files += [b"no zip", whole[: len(whole) // 2], (tmp_path / "array.npy").read_bytes()]
    for content in files:
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"^reference: .*bad.npz[^\n]*$"):
            read_moments(tmp_path / "bad.npz")


def test_weights_and_reference_are_checked_on_loading(tmp_path, monkeypatch):
    """Distances under other weights are not FID, and the file would be unpickled."""
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"other")
    for given, key in (
        ((str(weights), "elsewhere.npz"), "reference"),
        ((None, "train"), "reference"),
        ((str(weights), "held_out"), "inception_weights"),
        ((str(tmp_path / "none.pth"), "held_out"), "inception_weights"),
    ):
        with pytest.raises(UserError, match=f"^{key}: .*$"):
            load_inception(*given, CPU)
    assert load_inception(None, "held_out", CPU) is None
    monkeypatch.setattr(fid, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        load_inception(str(weights), "held_out", CPU)
