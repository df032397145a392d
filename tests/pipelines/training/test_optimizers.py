"""AdamW and Muon: their steps, and which weights each updates."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from small import PRIORS, TOKENIZERS, make_prior, make_tokenizer
from torch import Tensor, nn
from torch.optim import AdamW

from pipelines.training import optimizers
from pipelines.training.optimizers import (
    MIN_MATRIX_SIDE,
    Muon,
    decaying_weights,
    hidden_matrices,
    make_optimizer,
    shape_as_matrix,
)
from pipelines.training.schedule import TrainConfig
from prior.layers import CausalConv2d
from tokenizer.layers import FusedLinear

CONFIG = TrainConfig(optimizer="muon", lr=1e-2, muon_lr=0.05, weight_decay=0.1)
BETAS = (0.9, 0.95)
SHAPES = [(32, 16), (16, 64), (32, 16), (24, 24), (16, 64), (32, 16)]


def weights_of(shapes: list[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    """Make random parameters."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def muon(weights: list[nn.Parameter], parts: int = 1, bf16: bool = False) -> AdamW:
    """Make a Muon optimizer of all weights."""
    return make_optimizer(weights, dict.fromkeys(weights, parts), set(), CONFIG, BETAS, bf16)


def gradient(step: int, number: int, shape: torch.Size) -> Tensor:
    """A gradient that depends on the step and the weight's number; its scale changes every step."""
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(shape, generator=generator) * 10.0 ** (step - 2)


def move(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
    """Take five steps along such gradients."""
    for step in range(5):
        for number, weight in enumerate(weights):
            weight.grad = gradient(step, number, weight.shape)
        optimizer.step()


def all_of(model: nn.Module, config: TrainConfig = CONFIG, betas: tuple[float, float] = BETAS) -> AdamW:
    """Make the optimizer of a whole model."""
    return make_optimizer(list(model.parameters()), hidden_matrices(model), decaying_weights(model), config, betas)


# The step


@pytest.mark.parametrize(("bf16", "max_numbers"), [(False, 1 << 26), (True, 1 << 26), (True, 1)])
def test_a_step_of_muon_equals_that_of_torch(monkeypatch, bf16, max_numbers):
    """However many matrices are orthogonalized at once. In float32 they differ by rounding: torch orthogonalizes in
    bfloat16."""
    monkeypatch.setattr(optimizers, "MAX_NUMBERS", max_numbers)
    ours, theirs, start = weights_of(SHAPES), weights_of(SHAPES), weights_of(SHAPES)
    move(muon(ours, bf16=bf16), ours)
    move(torch.optim.Muon(theirs, lr=0.05, weight_decay=0.0), theirs)
    for found, expected, before in zip(ours, theirs, start, strict=True):
        moved = (expected - before).norm()
        assert (found - expected).norm() < (1e-6 if bf16 else 0.02) * moved and moved > 0.1
    assert torch.equal(optimizers.newton_schulz(torch.zeros(2, 16, 20)), torch.zeros(2, 16, 20)), "0 / 0"


def test_a_kernel_is_updated_as_a_matrix_of_its_outputs():
    kernel, matrix = weights_of([(16, 8, 3, 3)]), weights_of([(16, 72)])
    with torch.no_grad():
        matrix[0].copy_(kernel[0].flatten(1))
    both = [muon(one) for one in (kernel, matrix)]
    for step in range(3):
        matrix[0].grad = gradient(step, 0, matrix[0].shape)
        kernel[0].grad = matrix[0].grad.view(16, 8, 3, 3).clone()
        for optimizer in both:
            optimizer.step()
    assert torch.equal(kernel[0].flatten(1), matrix[0])


@pytest.mark.parametrize(("rows", "columns", "parts"), [(16, 16, 3), (24, 16, 2), (16, 40, 2)])
def test_parts_of_a_fused_layer_are_updated_separately(rows, columns, parts):
    separate = weights_of([(rows, columns)] * parts)
    fused = nn.Parameter(torch.cat([part.detach() for part in separate]))
    start, by_part, together = fused.detach().clone(), muon(separate), muon([fused], parts)
    for step in range(4):
        gradients = [gradient(step, number, part.shape) * (1 + number) for number, part in enumerate(separate)]
        for part, each in zip(separate, gradients, strict=True):
            part.grad = each
        fused.grad = torch.cat(gradients)
        by_part.step(), together.step()
    expected = torch.cat([part.detach() for part in separate])
    assert (fused - expected).norm() < 1e-5 * (expected - start).norm()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("gpt", {"qkv": 3, "gate_up": 2}),
        ("blocks", {"kv": 2, "gate_up": 2}),
        ("next_scale", {"qkv": 3, "gate_up": 2, "modulate": 6}),
        ("vit", {"qkv": 3}),
    ],
)
def test_fused_layers_of_models_declare_their_parts(name, parts):
    more = {"adaln": True} if name == "next_scale" else {}
    model = make_tokenizer(name) if name in TOKENIZERS else make_prior(name, **more)
    layers = {key.rsplit(".", 1)[-1]: layer for key, layer in model.named_modules() if isinstance(layer, FusedLinear)}
    assert {key: layer.parts for key, layer in layers.items()} == parts


# Which weights


class Everything(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.fused = nn.Linear(32, 16), nn.Conv2d(4, 16, 3), FusedLinear(16, 16, parts=2)
        self.causal = CausalConv2d(16, 16, (-1, 0), (-1, 1))
        self.narrow, self.few = nn.Linear(32, 8), nn.Conv2d(1, 16, 3)
        self.embedding, self.positions = nn.Embedding(32, 16), nn.Parameter(torch.zeros(32, 32))
        self.head, self.norm = nn.Linear(16, 512), nn.LayerNorm(16)
        self.quantizer = nn.ModuleList([nn.Linear(32, 32)])


@pytest.mark.parametrize("name", [*PRIORS, *TOKENIZERS])
def test_tables_heads_and_codebooks_of_every_model_are_left_to_adamw(name):
    more = {"dim": 32} if "pixelcnn" in name else {}
    model = make_prior(name, (16, 16), 32, **more) if name in PRIORS else make_tokenizer(name)
    named, matrices = dict(model.named_parameters()), hidden_matrices(model)
    moved = {key for key, parameter in named.items() if parameter in matrices}
    tables = {
        key for key in named if re.search(r"embedding|label|(^|[._])row\.|positions|^table|head\.|quantizer\.", key)
    }
    assert not moved & tables and (moved or name in ("made", "marginal", "palette", "pixels"))
    large = {key for key, parameter in named.items() if min(shape_as_matrix(parameter)) >= MIN_MATRIX_SIDE}
    parts = {key for key, layer in model.named_modules() if isinstance(layer, FusedLinear)}
    rest = {key for key in large - moved if key.removesuffix(".weight") not in parts}
    assert rest <= tables | {"input", "output", "hidden.0"}  # MADE has masked parameters instead of layers


def test_muon_updates_large_hidden_matrices_and_adamw_the_rest():
    """A model without matrices has a plain AdamW."""
    model = Everything()
    optimizer = all_of(model, betas=(0.9, 0.99))
    assert isinstance(optimizer, Muon) and min(shape_as_matrix(model.few.weight)) == 9 < MIN_MATRIX_SIDE
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, rest, matrices, fused = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.99)}
    assert matrices == {"linear.weight", "conv.weight", "causal.weight"} and fused == {"fused.weight"}
    tables = {"embedding.weight", "positions", "head.weight", "quantizer.0.weight"}
    assert decaying == tables | {"narrow.weight", "few.weight"}
    assert rest == set(names.values()) - decaying - matrices - fused
    assert all("bias" in name or "norm" in name for name in rest)
    assert type(all_of(nn.Linear(8, 8))) is AdamW and type(all_of(model, TrainConfig())) is AdamW
    norm, before = copy.deepcopy(model.norm), {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in (*model.parameters(), *norm.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    AdamW(norm.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0).step()
    torch.testing.assert_close(model.norm.weight, norm.weight)
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


VECTORS = re.compile(r"gain$|start_embedding$|query_embedding$|bias|(^|[._])row\.weight$|(^|\.)norm")
"""Names of vectors in priors, of whatever shape, and of tables of vectors."""
MORE = {
    "made": {"embedding": 3, "direct": True},
    "gated_pixelcnn": {"row_embedding": True},
    "pixelcnn": {"row_embedding": True},
    "pixelcnn_pp": {"row_embedding": True},
}


def decayed(model: nn.Module, config: TrainConfig) -> set[str]:
    """The names of the weights that decay."""
    some = {p for group in all_of(model, config).param_groups if group["weight_decay"] for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if parameter in some}


@pytest.mark.parametrize("name", PRIORS)
def test_matrices_and_tables_of_a_prior_decay_and_vectors_and_biases_do_not(name):
    model = make_prior(name, (4, 4), 8, **MORE.get(name, {}))
    found = decayed(model, TrainConfig())
    assert not {key for key in found if VECTORS.search(key)}
    tables = {
        key for key in dict(model.named_parameters()) if re.search(r"(token|class|axis)_embedding|head\.weight", key)
    }
    matrices = {key for key, weight in model.named_parameters() if weight in hidden_matrices(model)}
    assert found >= tables | matrices and found
    assert found - matrices == decayed(model, CONFIG), "Muon has no weight decay"


# Runs


def test_the_rate_of_muon_follows_the_schedule_of_adamw():
    """It is five times as high, for peaks of 0.05 and 0.01, at any point of the schedule."""
    moved, share = {}, 0.4
    for lr in (1e-2, 1e-2 * share):
        layer = nn.Linear(16, 16)
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
        optimizer = all_of(layer)
        for group in optimizer.param_groups:
            group["lr"] = lr
        layer.weight.grad, layer.bias.grad = torch.eye(16), torch.ones(16)
        optimizer.step()
        moved[lr] = float(layer.weight.detach().diag().mean()), float(layer.bias.detach().mean())
    for before, after in zip(*moved.values(), strict=True):
        assert after == pytest.approx(share * before, rel=1e-4)
    weight, bias = moved[1e-2]
    assert bias == pytest.approx(-1e-2, rel=1e-4) and 0.7 * 0.05 < -weight < 1.2 * 0.05
