"""LPIPS: the value of torchmetrics, a gradient to the reconstruction alone, and where its weights come from.

The smallest backbone has random weights here, as its file in a folder of torch hub, and so is read as the real one is.
"""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from huggingface_hub import constants
from optional import Late, needs_torchmetrics
from torch import nn

from pipelines.config import UserError
from pipelines.metrics import perceptual
from pipelines.metrics.perceptual import WEIGHTS, Perceptual

lpips = Late("torchmetrics.functional.image.lpips")
pytestmark = needs_torchmetrics


@pytest.fixture(scope="module")
def squeeze_file(tmp_path_factory) -> Path:
    """Random weights of the smallest backbone, at a path that torch hub knows."""
    path = tmp_path_factory.mktemp("torch") / "hub" / "checkpoints" / WEIGHTS["squeeze"][0].rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


@pytest.fixture
def trusted(squeeze_file, monkeypatch) -> Path:
    """That file, counted as the right one."""
    monkeypatch.setenv("TORCH_HOME", str(squeeze_file.parents[2]))
    digest = hashlib.sha256(squeeze_file.read_bytes()).hexdigest()
    monkeypatch.setitem(WEIGHTS, "squeeze", (WEIGHTS["squeeze"][0], digest))
    return squeeze_file


@pytest.fixture
def empty(tmp_path, monkeypatch, squeeze_file) -> Path:
    """A folder of torch hub without the file, while the random one counts as right."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    digest = hashlib.sha256(squeeze_file.read_bytes()).hexdigest()
    monkeypatch.setitem(WEIGHTS, "squeeze", (WEIGHTS["squeeze"][0], digest))
    return tmp_path / "hub" / "checkpoints"


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# The distance


def test_the_value_is_that_of_torchmetrics(trusted):
    one, two = images(3, 3, 64, 72), images(3, 3, 64, 72, seed=1)
    expected = lpips.learned_perceptual_image_patch_similarity(one, two, net_type="squeeze")
    assert float(expected) > 1e-3
    assert float(Perceptual("squeeze")(one, two)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 1, 28, 28), (1, 3, 8, 20)])
def test_equal_images_are_at_no_distance_and_others_are(trusted, shape):
    distance, one = Perceptual("squeeze"), images(*shape)
    assert float(distance(one, one.clone())) == 0
    near, far = float(distance(one + 0.05 * images(*shape, seed=1), one)), float(distance(images(*shape, seed=2), one))
    assert 0 < near < far


def test_small_and_grey_images_are_enlarged_and_repeated(trusted):
    one, two = images(2, 1, 16, 32), images(2, 1, 16, 32, seed=1)
    large = [F.interpolate(x, (64, 128), mode="bilinear", align_corners=False).repeat(1, 3, 1, 1) for x in (one, two)]
    distance = Perceptual("squeeze")
    assert float(distance(one, two)) == pytest.approx(float(distance(*large)), rel=1e-5)
    assert float(distance(one, two)) != pytest.approx(float(distance(*(x.repeat(1, 3, 4, 4) for x in (one, two)))))


def test_the_gradient_reaches_the_reconstruction_alone(trusted):
    distance = Perceptual("squeeze")
    reconstruction, target = images(2, 1, 28, 28).requires_grad_(), images(2, 1, 28, 28, seed=1).requires_grad_()
    distance(reconstruction, target).backward()
    assert bool((reconstruction.grad.flatten(1).abs().sum(1) > 0).all()) and target.grad is None
    assert all(p.grad is None and not p.requires_grad for p in distance.net.parameters())
    with torch.no_grad():
        nearer = reconstruction - 0.1 * reconstruction.grad / reconstruction.grad.norm()
        assert distance(nearer, target) < distance(reconstruction, target)


def test_autocast_does_not_reach_it(trusted):
    distance, one, two = Perceptual("squeeze"), images(2, 3, 64, 64), images(2, 3, 64, 64, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = distance(one, two)
    assert inside.dtype == torch.float32 and torch.equal(inside, distance(one, two))
    assert distance(one.bfloat16(), two).dtype == torch.float32


def test_a_model_that_holds_it_does_not_know_its_weights(trusted):
    model = nn.Linear(2, 2)
    model.distance = Perceptual("squeeze")
    model.train()
    assert list(model.state_dict()) == ["weight", "bias"] and len(list(model.parameters())) == 2
    assert not any(module.training for module in model.distance.net.modules())


def test_building_it_draws_no_random_numbers(trusted):
    before = torch.get_rng_state()
    Perceptual("squeeze")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shapes", [((2, 2, 8, 8), (2, 2, 8, 8)), ((2, 3, 8, 8), (2, 1, 8, 8)), ((3, 8, 8),) * 2])
def test_other_shapes_are_refused(trusted, shapes):
    with pytest.raises(ValueError, match=r"two batches \(B, C, H, W\) of 1 or 3 channels"):
        Perceptual("squeeze")(*(torch.zeros(shape) for shape in shapes))


# Its weights


def one_line(found: pytest.ExceptionInfo[UserError]) -> str:
    message = str(found.value)
    assert "\n" not in message and message.startswith("perceptual: ")
    return message


def test_the_files_are_those_torchvision_asks_for():
    names = {"vgg": "VGG16", "alex": "AlexNet", "squeeze": "SqueezeNet1_1"}
    assert set(names) == set(WEIGHTS)
    for net, (url, digest) in WEIGHTS.items():
        assert getattr(torchvision.models, f"{names[net]}_Weights").DEFAULT.url == url
        assert url.endswith(f"-{digest[:8]}.pth") and len(digest) == 64


def test_offline_it_says_which_file_to_place_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *_, **__: pytest.fail("went to the network"))
    with pytest.raises(UserError) as found:
        Perceptual()
    place = f"place https://download.pytorch.org/models/vgg16-397923af.pth in {tmp_path / 'hub' / 'checkpoints'}"
    assert place in one_line(found) and "HF_HUB_OFFLINE" in str(found.value)
    assert not any(tmp_path.iterdir())


def test_a_damaged_file_is_never_opened(trusted, tmp_path, monkeypatch):
    """Nor is a whole one that is another: it would be unpickled."""
    content, path = trusted.read_bytes(), tmp_path / "hub" / "checkpoints" / trusted.name
    path.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    for damaged in (content[:1000], content[:5000] + b"\0" + content[5001:], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as found:
            Perceptual("squeeze")
        assert f"{path} is damaged" in one_line(found) and WEIGHTS["squeeze"][0] in str(found.value)
        assert path.read_bytes() == damaged


def test_without_torchmetrics_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    with pytest.raises(UserError) as found:
        Perceptual("squeeze")
    assert 'pip install "smalti[perceptual]"' in one_line(found)


def test_another_network_is_refused():
    with pytest.raises(UserError) as found:
        Perceptual("resnet")
    assert "one of vgg, alex, squeeze" in one_line(found)


# Fetching them


@pytest.fixture
def server(monkeypatch):
    """A server on this machine that answers with what is put into `.content`, or with an error if that is None."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            if httpd.content is None:
                self.send_error(403)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(httpd.content)))
            self.end_headers()
            self.wfile.write(httpd.content[: httpd.sent])

        def log_message(self, *_: object) -> None:
            """Quiet."""

    httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    httpd.content, httpd.sent = None, None
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def ask(port: int, monkeypatch) -> str:
    """The address of the smallest backbone, on this machine."""
    url = f"http://127.0.0.1:{port}/{WEIGHTS['squeeze'][0].rpartition('/')[2]}"
    monkeypatch.setitem(WEIGHTS, "squeeze", (url, WEIGHTS["squeeze"][1]))
    return url


def test_a_missing_file_is_fetched_once(empty, server, squeeze_file, monkeypatch, capsys):
    server.content = squeeze_file.read_bytes()
    url = ask(server.server_port, monkeypatch)
    one, two = images(1, 3, 64, 64), images(1, 3, 64, 64, seed=1)
    assert float(Perceptual("squeeze")(one, two)) > 0
    assert url in capsys.readouterr().err and [path.name for path in empty.iterdir()] == [squeeze_file.name]
    server.content = None
    Perceptual("squeeze")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("answer", "reason"), [("refusal", "the server says 403"), ("half", "not that file"), ("another", "not that file")]
)
def test_what_does_not_come_whole_is_not_kept(empty, server, squeeze_file, monkeypatch, answer, reason):
    server.content = {"refusal": None, "half": squeeze_file.read_bytes(), "another": b"<html>"}[answer]
    server.sent = 10_000 if answer == "half" else None
    url = ask(server.server_port, monkeypatch)
    with pytest.raises(UserError) as found:
        Perceptual("squeeze")
    assert reason in one_line(found) and f"place {url} in {empty}" in str(found.value)
    assert not list(empty.iterdir())


def test_a_server_that_does_not_answer_is_not_waited_for(empty, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(perceptual, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ask(silent.getsockname()[1], monkeypatch)
        began = time.monotonic()
        with pytest.raises(UserError) as found:
            Perceptual("squeeze")
    assert time.monotonic() - began < 3 and "timed out" in one_line(found)
    assert socket.getdefaulttimeout() is None and not list(empty.iterdir())


def test_a_folder_that_can_not_be_made(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *_, **__: pytest.fail("went to the network"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError) as found:
        Perceptual("squeeze")
    assert "squeezenet1_1-b8a52dc0.pth is missing and could not be fetched" in one_line(found)
