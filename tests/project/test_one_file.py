"""docs/one_file.py stands alone and is short, its formulas hold, and it runs from the digits to its pictures."""

from __future__ import annotations

import ast
import itertools
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from optional import needs_digits
from PIL import Image

FILE = Path(__file__).parents[2] / "docs" / "one_file.py"
MOST_LINES = 300


@pytest.fixture(scope="module")
def one_file() -> ModuleType:
    spec = spec_from_file_location("one_file", FILE)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short_and_imports_torch_alone() -> None:
    text = FILE.read_text(encoding="utf-8")
    found = set()
    for node in ast.walk(ast.parse(text)):
        found |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        found |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    assert {name.split(".")[0] for name in found} <= {*sys.stdlib_module_names, "torch", "torchvision"}
    assert len(text.splitlines()) <= MOST_LINES


def test_the_gpt_sees_earlier_tokens_only(one_file: ModuleType) -> None:
    torch.manual_seed(0)
    model, classes = one_file.GPT().eval(), torch.tensor([3])
    tokens = torch.randint(128, (1, 49))
    logits = model(tokens[:, :-1], classes)
    for changed in (0, 17, 47):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % 128
        moved = (model(other[:, :-1], classes) - logits).abs().amax(-1)[0]
        assert (moved[: changed + 1] < 1e-5).all() and (moved[changed + 1 :] > 1e-4).all()
    assert (model(tokens[:, :-1], classes + 1) - logits).abs().amax(-1).min() > 1e-4, "all tokens depend on the class"


def test_its_probabilities_sum_to_one_and_samples_follow_them(
    one_file: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all grids of 3 tokens of 3 ids; guidance 1 samples p(x | class)."""
    monkeypatch.setattr(one_file, "N", 3)
    monkeypatch.setattr(one_file, "V", 3)
    torch.manual_seed(0)
    model = one_file.GPT(dim=16, depth=1, heads=2).eval()
    grids = torch.tensor(list(itertools.product(range(3), repeat=3)))
    probs = (-model.nats(grids, torch.full((27,), 4)).detach().sum(1)).exp()
    assert float(probs.sum()) == pytest.approx(1, abs=1e-5)
    drawn = model.sample(torch.full((20_000,), 4), guidance=1.0)
    counts = (drawn @ torch.tensor([9, 3, 1])).bincount(minlength=27)
    chi_squared = float(((counts - 20_000 * probs) ** 2 / (20_000 * probs)).sum())
    assert chi_squared < 60, "99.99 % of values with 26 degrees of freedom are below"


def test_the_tokenizer_decodes_what_it_encodes_and_its_losses_move_what_they_name(one_file: ModuleType) -> None:
    torch.manual_seed(0)
    model, images = one_file.VQVAE(), torch.rand(4, 1, 28, 28) * 2 - 1
    loss, tokens = model.loss(images)
    assert tokens.shape == (4, 49) and torch.equal(tokens, model.encode(images))
    z = model.encoder(images).flatten(2).mT
    distances = ((z[:, :, None] - model.codebook.weight) ** 2).sum(-1)
    assert torch.equal(tokens, distances.argmin(-1))
    e = model.codebook(tokens).mT.unflatten(2, (7, 7))
    gap = F.mse_loss(e, model.encoder(images))
    expected = F.mse_loss(model.decode(tokens), images) + 1.25 * gap
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    used = torch.zeros(128, dtype=torch.bool).index_fill(0, tokens.flatten(), True)
    moved = model.codebook.weight.grad.abs().sum(1) > 0
    assert torch.equal(moved, used), "codes that were chosen move, by the codebook loss"
    assert model.encoder[0].weight.grad.abs().sum() > 0, "the straight-through estimator"


@needs_digits
def test_it_runs_and_writes_its_pictures(
    one_file: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(FILE), "--steps", "3", "--out", "new/pictures"])
    images, labels = one_file.load_digits()
    monkeypatch.setattr(one_file, "load_digits", lambda: (images[:4064], labels[:4064]))  # 64 held-out images
    one_file.main()
    printed, warned = capsys.readouterr()
    assert not warned
    assert "log2(128) = 7.000 bits per token" in printed
    (bits,) = re.findall(r"held out ([\d.]+) bits", printed)
    (decibels,) = re.findall(r"PSNR ([\d.]+)", printed)
    assert 5 < float(bits) < 12 and 3 < float(decibels) < 20
    sizes = {"reconstructions": (302, 62), "samples": (302, 242)}  # of 2 and 8 rows of 10, with margins of 2 pixels
    for name, size in sizes.items():
        with Image.open(tmp_path / "new" / "pictures" / f"{name}.png") as picture:
            assert picture.size == size and picture.format == "PNG"
