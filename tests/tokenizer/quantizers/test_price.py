"""The price of codes: what a search minimises, how p and s are measured, and files with and without a rate."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from on_disk import FOLDER, images_for
from ranks import of_ranks
from small import make_tokenizer
from torch import Tensor

from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.train_tokenizer import TrainTokenizerConfig
from tokenizer import Tokenizer
from tokenizer.quantizers import Quantizer, price
from tokenizer.quantizers.codebook import rows_of
from tokenizer.quantizers.updates import updates_now

SIZES = {"codes": 32, "dim": 8}
SINGLE = {
    **{kind: {"kind": kind, **SIZES} for kind in ("ema", "vq", "simvq")},
    **{f"{kind} directions": {"kind": kind, **SIZES, "normalize": True} for kind in ("ema", "vq", "simvq")},
}
BOOK = {"kind": "ema", **SIZES, "revive_every": 1000}
NODES: dict[str, dict[str, Any]] = {
    **SINGLE,
    "rvq": {"kind": "rvq", "depth": 3, "book": BOOK},
    "shared": {"kind": "rvq", "depth": 3, "shared": True, "book": BOOK},
    "multiscale": {"kind": "multiscale", "scales": (1, 2, 4), "book": BOOK},
}
every_kind = pytest.mark.parametrize("kind", NODES)
every_single = pytest.mark.parametrize("kind", SINGLE)
STORED = [
    path.parent
    for path in sorted(FOLDER.rglob("config.json"))
    if Tokenizer.has(json.loads(path.read_text()).get("kind"))
    and (path.parent / "model.safetensors").exists()
    and path.parent.name != "rate"
]


def node_of(kind: str, rate: float) -> dict[str, Any]:
    """The configuration node of a quantizer with a rate, which belongs to the codebook."""
    node = NODES[kind]
    return {**node, "book": {**node["book"], "rate": rate}} if "book" in node else {**node, "rate": rate}


def priced(kind: str, rate: float = 0.5) -> Any:
    """A quantizer in training."""
    node = node_of(kind, rate)
    torch.manual_seed(0)
    return Quantizer.create(node.pop("kind"), **node).train()


def batch(step: int = 0, count: int = 16) -> Tensor:
    """Vectors `(count, 8, 4, 4)`, a function of the step."""
    return torch.randn(count, 8, 4, 4, generator=torch.Generator().manual_seed(step))


def with_prices(kind: str, rate: float = 0.5) -> Any:
    """A quantizer in eval mode that has started, with very different prices."""
    quantizer = priced(kind, rate)
    quantizer.quantize(batch())
    generator = torch.Generator().manual_seed(1)
    p = (3 * torch.randn(quantizer.price.frequencies.shape, generator=generator)).softmax(1)
    assert (p < 1 / 8 / 32).any() and (p > 1 / 8 / 32).any()
    quantizer.price.frequencies.copy_(p)
    quantizer.price.distance.fill_(1.5)
    return quantizer.eval()


def prices(quantizer: Any) -> Tensor:
    """rate * s * -ln p, `(levels, codes)`, with p at least an eighth of the mean."""
    found = quantizer.price
    return -found.rate * found.distance * found.frequencies.clamp(min=1 / (8 * 32)).log()


def apart(rows: Tensor, table: Tensor) -> Tensor:
    """Squared distances (rows, codes)."""
    return (rows[:, None].double() - table.detach().double()).square().sum(2)


def state(module: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def measure(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Take s from this many vectors of a batch."""
    for module in ("codebook", "rvq", "multiscale"):
        monkeypatch.setattr(f"tokenizer.quantizers.{module}.MEASURED", count)


# Files


@pytest.mark.parametrize("folder", STORED, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_without_a_rate_nothing_is_stored(folder):
    """`test_on_disk` compares the fingerprints of these files with those of earlier versions."""
    tokenizer = Tokenizer.from_pretrained(folder)
    assert "rate" not in re.findall(r"\w+", json.dumps(tokenizer.config.to_dict()))
    assert not [name for name in tokenizer.state_dict() if "price" in name]


@every_kind
def test_a_rate_and_prices_are_saved(tmp_path, kind):
    nodes = [node_of(kind, rate) for rate in (0.3, 0.0)]
    tokenizer, plain = (make_tokenizer("vqvae", (8, 8), 1, factor=2, quantizer=node) for node in nodes)
    assert json.dumps(tokenizer.config.to_dict()).count('"rate": 0.3') == 1
    assert '"rate"' not in json.dumps(plain.config.to_dict())
    assert {*tokenizer.state_dict()} - {*plain.state_dict()} == {
        f"quantizer.price.{name}" for name in ("started", "frequencies", "distance")
    }
    tokenizer.train()(images_for(tokenizer) / 127.5 - 1)
    tokenizer.quantizer.price.distance.fill_(20.0)
    with torch.no_grad():
        tokenizer.quantizer.price.frequencies[:, ::2] *= 0.2
    tokenizer.eval().save_pretrained(tmp_path)
    again, images = Tokenizer.from_pretrained(tmp_path), images_for(tokenizer, 8) / 127.5 - 1
    assert again.fingerprint() == tokenizer.fingerprint() and again.config == tokenizer.config
    assert torch.equal(again.encode(images), tokenizer.encode(images))
    again.quantizer.price.distance.zero_()
    assert not torch.equal(again.encode(images), tokenizer.encode(images))


# The search


@every_single
def test_ids_minimise_distance_and_price(kind):
    quantizer = with_prices(kind)
    z = batch(5)
    rows = F.normalize(rows_of(z), dim=1) if quantizer.config.normalize else rows_of(z)
    costs = apart(rows, quantizer.table()) + prices(quantizer)
    ids = costs.argmin(1)
    assert (ids != apart(rows, quantizer.table()).argmin(1)).any()
    assert torch.equal(quantizer.encode(z).flatten(), ids)
    assert torch.equal(quantizer.quantize(z).tokens.flatten(), ids)
    assert quantizer.cost(z) == pytest.approx(float(costs.amin(1).mean()), rel=1e-5)


@every_single
def test_a_higher_rate_never_takes_more_bits_or_less_distance(kind):
    quantizer, z = with_prices(kind), batch(5, 64)
    nats = -quantizer.price.frequencies[0].clamp(min=1 / (8 * 32)).log()
    rates, found = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0), []
    for rate in rates:
        quantizer.price.rate = rate
        ids = quantizer.encode(z)
        error = (quantizer.comparable(z) - quantizer.lookup(ids).detach()).square().sum(1).mean()
        found.append((float(nats[ids].mean()), float(error)))
    for (more, near), (less, far) in itertools.pairwise(found):
        assert less <= more + 1e-6 and far >= near - 1e-6
    assert found[-1][0] < 0.5 * found[0][0]
    for rate, (bits, error) in zip(rates, found, strict=True):
        least = min(other + rate * 1.5 * nat for nat, other in found)
        assert error + rate * 1.5 * bits == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("kind", ["rvq", "shared"])
def test_each_level_pays_the_same_price_for_a_nat(kind):
    quantizer = with_prices(kind)
    z = batch(5)
    left, found = rows_of(z), []
    for table, costs in zip(quantizer.tables(), prices(quantizer), strict=True):
        found.append((apart(left, table) + costs).argmin(1))
        left = left - table.detach()[found[-1]]
    ids = quantizer.encode(z)
    assert torch.equal(ids, torch.cat([part.view(16, 4, 4) for part in found], 1))
    assert torch.equal(quantizer.quantize(z).tokens, ids)
    paid = sum(costs[part].sum() for costs, part in zip(prices(quantizer), found, strict=True))
    assert quantizer.cost(z) == pytest.approx(float(left.square().sum() + paid) / 256, rel=1e-5)


def test_prices_of_scales_are_those_of_the_error_of_the_whole_map():
    """At 1x1 and at the full size, where a code changes the error of the map by a formula, against that error."""
    quantizer: Any = Quantizer.create("multiscale", scales=(1, 4), book={**BOOK, "rate": 0.5}).train()
    quantizer.quantize(batch())
    quantizer.price.frequencies.copy_((3 * torch.randn(2, 32)).softmax(1))
    quantizer.price.distance.fill_(1.5)
    quantizer.squares.copy_(torch.tensor([0.3, 2.0]))
    quantizer.eval()
    z = batch(5) + 0.5
    table, sigma, (coarse, fine) = quantizer.book.table(), quantizer.squares.sqrt(), prices(quantizer)
    left = rows_of(z) - quantizer.mean
    each = apart(left, sigma[0] * table)
    first = (each.view(16, 16, 32).sum(1) + coarse).argmin(1)
    left = left - (sigma[0] * table)[first].repeat_interleave(16, 0)
    second = (apart(left, sigma[1] * table) + fine).argmin(1)
    ids = quantizer.encode(z)
    assert torch.equal(ids, torch.cat([first[:, None], second.view(16, 16)], 1)) and len(first.unique()) > 2
    left = left - (sigma[1] * table)[second]
    cost = (left.square().sum() + coarse[first].sum() + fine[second].sum()) / 256
    assert quantizer.cost(z) == pytest.approx(float(cost), rel=1e-4)


def test_a_scale_between_pays_by_its_area():
    quantizer = with_prices("multiscale")
    z, total = batch(5), quantizer.mean[:, None, None]
    found = []
    for k, area in enumerate((1, 4, 16)):
        rest = rows_of(quantizer.resize.down(z - total, k))
        codes = quantizer.book.table() * quantizer.sigma()[k]
        ids = (16 / area * apart(rest, codes) + prices(quantizer)[k]).argmin(1)
        found.append(ids.view(16, -1))
        side = math.isqrt(area)
        total = total + quantizer.resize.up(codes[ids].view(16, side, side, 8).movedim(-1, 1), k)
    assert torch.equal(quantizer.encode(z), torch.cat(found, 1))
    assert torch.equal(quantizer.quantize(z).tokens, torch.cat(found, 1))


# s


@every_kind
def test_the_first_batches_have_no_price(monkeypatch, kind):
    monkeypatch.setattr(price, "WARM_UP", 3)
    quantizer, plain = priced(kind, 5.0), priced(kind, 0.0)
    for step in range(6):
        ids, nearest = (each.quantize(batch(step)).tokens for each in (quantizer, plain))
        assert torch.equal(ids, nearest) == (step < 4), step
        assert (quantizer.price.distance == 0) == (step < 3)


@pytest.mark.parametrize("kind", ["simvq", "simvq directions"])
def test_s_is_the_mean_distance_to_the_nearest_code_at_any_rate(monkeypatch, kind):
    monkeypatch.setattr(price, "WARM_UP", 3)
    found = [priced(kind, rate) for rate in (0.1, 10.0)]
    for quantizer in found:  # whose codes stay, without an optimizer
        for _ in range(30):
            quantizer.quantize(batch())
        rows = quantizer.comparable(rows_of(batch()))
        expected = apart(rows, quantizer.table()).amin(1).mean()
        assert float(quantizer.price.distance) == pytest.approx(float(expected), rel=1e-4)
    assert found[0].encode(batch()).unique().numel() > 4 * found[1].encode(batch()).unique().numel()


@pytest.mark.parametrize("kind", ["ema", "rvq", "multiscale"])
def test_s_does_not_run_away(kind):
    """At a rate at which nearly all vectors take one code of the last level: unused codes stay where they were, and s
    is that of the nearest ones."""
    low, high = priced(kind, 0.1), priced(kind, 10.0)
    for step in range(price.WARM_UP + 200):
        for quantizer in (low, high):
            assert (quantizer.price.distance == 0) == (step <= price.WARM_UP)
            quantizer.quantize(batch(0, 4))
    assert 0 < low.price.distance < high.price.distance < 4 * low.price.distance
    assert low.price.frequencies[-1].max() < 0.5 < 0.9 < high.price.frequencies[-1].max()


# p


@every_kind
def test_p_is_the_running_share_of_ids(monkeypatch, kind):
    monkeypatch.setattr(price, "WARM_UP", 2)
    quantizer = priced(kind)
    expected = torch.full_like(quantizer.price.frequencies, 1 / 32)
    scales = [1, 4, 16] if kind == "multiscale" else [16] * len(expected)
    for step in range(6):
        tokens = quantizer.quantize(batch(step)).tokens.flatten(1)
        for row, ids in zip(expected, tokens.split(scales, 1), strict=True):
            row.lerp_(torch.bincount(ids.flatten(), minlength=32) / ids.numel(), 0.02)
    torch.testing.assert_close(quantizer.price.frequencies, expected)
    torch.testing.assert_close(expected.sum(1), torch.ones(len(expected)))


@every_kind
def test_prices_change_in_training_only_and_by_finite_batches_only(monkeypatch, kind):
    monkeypatch.setattr(price, "WARM_UP", 2)
    measure(monkeypatch, 64)  # fewer than the vectors of a batch
    quantizer = priced(kind)
    for step in range(5):
        quantizer.quantize(batch(step))
    before = state(quantizer.price)
    with torch.no_grad():
        quantizer.quantize(batch(7))
    quantizer.eval().quantize(batch(7))
    quantizer.encode(batch(7))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.price.state_dict().items())
    for place, value in itertools.product((0, 9, -1), (math.nan, math.inf)):
        z = batch(8)
        z[place, 0, 2, 2] = value
        quantizer.train().quantize(z)
        for name in ("frequencies", "distance"):
            assert torch.equal(getattr(quantizer.price, name), before[name]), (place, value)
    quantizer.quantize(batch(9))
    for name in ("frequencies", "distance"):
        assert not torch.equal(getattr(quantizer.price, name), before[name])


@every_kind
def test_two_ranks_have_the_prices_of_one(monkeypatch, kind):
    """Also if s is measured on a part of a batch."""
    monkeypatch.setattr(price, "WARM_UP", 2)
    measure(monkeypatch, 128)
    alone, seen = priced(kind), []
    alone.quantize(batch())
    pair = [copy.deepcopy(alone) for _ in range(2)]
    for step in range(1, 5):
        z = batch(step)
        alone.quantize(z)

        def work(rank: int, z: Tensor = z) -> None:
            assert updates_now(pair[rank])
            seen.append(rank)
            pair[rank].quantize(z[8 * rank :][:8])

        of_ranks(2, work)
        one, two = (state(each.price) for each in pair)
        for name, value in alone.price.state_dict().items():
            assert torch.equal(one[name], two[name])
            torch.testing.assert_close(one[name], value, rtol=1e-3, atol=1e-6)
    assert sorted(seen) == [0] * 4 + [1] * 4 and alone.price.distance > 0


# Lloyd steps


@pytest.mark.parametrize("kind", ["ema", "vq", "ema directions", "rvq"])
def test_the_cost_never_rises_over_a_lloyd_step_and_p_becomes_the_shares(kind):
    quantizer, z = with_prices(kind, 0.2), batch(3, 64)
    costs = [quantizer.cost(z)]
    for _ in range(6):
        ids = quantizer.encode(z)
        quantizer.lloyd_step(z.split(24))
        costs.append(quantizer.cost(z))
        expected = torch.bincount(ids.flatten() if kind != "rvq" else ids[:, :4].flatten(), minlength=32) / (64 * 16)
        torch.testing.assert_close(quantizer.price.frequencies[0], expected)
    assert costs == sorted(costs, reverse=True) and costs[-1] < 0.95 * costs[0]


# Mistakes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("{kind: ema, rate: -1}", r"rate: should be greater than or equal to 0 \(got -1\)"),
        ("{kind: vq, rate: .nan}", r"rate: should be a finite number \(got NaN\)"),
        ("{kind: simvq, rate: much}", r"rate: expected a number \(got 'much'\)"),
        ("{kind: fsq, rate: 1}", "rate: unknown key; must be one of levels"),
        ("{kind: lfq, rate: 1}", "rate: unknown key; must be one of bits, levels, .*"),
        ("{kind: bsq, rate: 1}", "rate: unknown key; must be one of bits, levels, .*"),
        ("{kind: ibq, rate: 1}", "rate: unknown key; must be one of codes, dim, .*"),
        ("{kind: gumbel, rate: 1}", "rate: unknown key; must be one of codes, dim, .*"),
        ("{kind: rvq, rate: 1}", "rate: unknown key; must be one of depth, shared, book"),
        ("{kind: multiscale, book: {kind: fsq, rate: 1}}", r"book\.rate: unknown key; must be one of levels"),
    ],
)
def test_a_mistake_is_told_in_a_line(setting, message):
    with pytest.raises(UserError, match=rf"^model\.quantizer\.{message}$"):
        parse(TrainTokenizerConfig, ["out=run", f"model.quantizer={setting}"], verb="train_tokenizer", description=None)
