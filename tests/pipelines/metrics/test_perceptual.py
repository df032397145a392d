"""LPIPS: the value of torchmetrics, with gradients to the reconstruction only.

The smallest backbone has random weights here, in torch hub's folder, so they are read like the real ones.
"""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from optional import Late, needs_torchmetrics
from torch import nn

from pipelines.config import UserError
from pipelines.metrics import perceptual
from pipelines.metrics.perceptual import Perceptual

lpips = Late("torchmetrics.functional.image.lpips")
pytestmark = needs_torchmetrics


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights of the smallest backbone, where torch hub looks for pretrained ones."""
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    path = tmp_path_factory.mktemp("torch") / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


@pytest.fixture
def distance(weights, monkeypatch) -> Perceptual:
    monkeypatch.setenv("TORCH_HOME", str(weights.parents[2]))
    return Perceptual("squeeze")


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_value_is_that_of_torchmetrics(distance):
    """Small images are enlarged first, and grey ones repeated."""
    one, two = images(3, 3, 64, 72), images(3, 3, 64, 72, seed=1)
    expected = lpips.learned_perceptual_image_patch_similarity(one, two, net_type="squeeze")
    assert float(expected) > 1e-3 and float(distance(one, two)) == pytest.approx(float(expected), rel=1e-5)
    one, two = images(2, 1, 16, 32), images(2, 1, 16, 32, seed=1)
    large = [F.interpolate(x, (64, 128), mode="bilinear", align_corners=False).repeat(1, 3, 1, 1) for x in (one, two)]
    assert float(distance(one, two)) == pytest.approx(float(distance(*large)), rel=1e-5)


def test_gradients_reach_only_the_reconstruction(distance):
    reconstruction, target = (images(2, 1, 28, 28, seed=seed).requires_grad_() for seed in (0, 1))
    distance(reconstruction, target).backward()
    assert bool((reconstruction.grad.flatten(1).abs().sum(1) > 0).all()) and target.grad is None
    assert all(p.grad is None and not p.requires_grad for p in distance.net.parameters())
    with torch.no_grad():
        nearer = reconstruction - 0.1 * reconstruction.grad / reconstruction.grad.norm()
        assert distance(nearer, target) < distance(reconstruction, target)


def test_autocast_has_no_effect(distance):
    one, two = images(2, 3, 64, 64), images(2, 3, 64, 64, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = distance(one, two)
    assert inside.dtype == torch.float32 and torch.equal(inside, distance(one, two))


def test_its_weights_are_not_those_of_a_model_that_holds_it(distance):
    model = nn.Linear(2, 2)
    model.distance = distance
    model.train()
    assert list(model.state_dict()) == ["weight", "bias"] and len(list(model.parameters())) == 2
    assert not any(module.training for module in model.distance.net.modules())
    before = torch.get_rng_state()
    Perceptual("squeeze")
    assert torch.equal(before, torch.get_rng_state())


def test_missing_weights_and_packages_are_one_line_of_error(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise URLError("no\nnetwork")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.OpenerDirector.open", refuse)
    with pytest.raises(UserError, match=rf"^loss.perceptual: .*'squeeze'.*{tmp_path}.*$"):
        Perceptual("squeeze")
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^loss.perceptual: .*smalti\[perceptual\]"):
        Perceptual()
