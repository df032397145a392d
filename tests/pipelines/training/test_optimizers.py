"""Muon: torch's own step on matrices, kernels as matrices, and nothing where a step is skipped."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from launch import assert_equal_tensors, exact, losses, tensors, train_prior
from small import PRIORS, QUANTIZERS, TOKENIZERS, make_prior, make_quantizer, make_tokenizer
from torch import nn
from torch.optim import AdamW

from pipelines.training import loop as training
from pipelines.training.checkpoints.optimizers import pack_optimizer
from pipelines.training.optimizers import (
    LEAST,
    Muon,
    alike,
    decaying_weights,
    hidden_matrices,
    make_optimizer,
    newton_schulz,
    rows_and_columns,
)
from pipelines.training.schedule import TrainConfig
from pipelines.training.step import set_learning_rate
from prior.layers import CausalConv2d

pytestmark = pytest.mark.usefixtures("one_process")
CONFIG = TrainConfig(optimizer="muon", lr=1e-2, muon_lr=0.05, weight_decay=0.1)
WIDE = {"vqvae": {"quantizer": {"kind": "ema", "codes": 32, "dim": 16}}, "klvae": {"latent": 8}}
SHAPES = [(32, 16), (16, 64), (32, 16), (24, 24), (16, 64), (32, 16)]


def weights_of(shapes: list[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    """Parameters of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def move(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], steps: int = 5, sick: int = -1) -> None:
    """Steps along made gradients, one of them not a number, and skipped as `step_if` does it."""
    for step in range(steps):
        for number, weight in enumerate(weights):
            generator = torch.Generator().manual_seed(100 * step + number)
            weight.grad = torch.randn(weight.shape, generator=generator) * 10.0 ** (step - 2)
            if step == sick:
                weight.grad[0, 0] = math.nan
        optimizer.found_inf = torch.full((), float(step == sick))  # type: ignore[attr-defined]
        optimizer.step()


@pytest.mark.parametrize("bf16", [False, True])
def test_on_matrices_it_takes_the_step_of_torch(bf16):
    """Which is in bfloat16: so is what is between the two, where ours is not."""
    ours, theirs = weights_of(SHAPES), weights_of(SHAPES)
    start = weights_of(SHAPES)
    move(make_optimizer(ours, set(ours), set(), CONFIG, (0.9, 0.95), bf16), ours)
    move(torch.optim.Muon(theirs, lr=0.05, weight_decay=0.0), theirs)
    for found, expected, before in zip(ours, theirs, start, strict=True):
        moved = (expected - before).norm()
        assert (found - expected).norm() < (1e-6 if bf16 else 0.02) * moved and moved > 0.1


def test_what_comes_out_is_nearly_orthogonal():
    """At any scale, but for directions in which there is nothing."""
    for shape in ((40, 24), (24, 40)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for scale in (1e-4, 1.0, 1e6):
            values = torch.linalg.svdvals(newton_schulz(scale * matrix[None])[0])
            assert values.min() > 0.6 and values.max() < 1.25
    assert torch.equal(newton_schulz(torch.zeros(2, 16, 20)), torch.zeros(2, 16, 20))
    left, values, right = torch.linalg.svd(torch.randn(20, 30, dtype=torch.float64), full_matrices=False)
    found = left.T @ newton_schulz((left * values) @ right[None])[0] @ right.T
    assert torch.allclose(found, torch.diag(found.diag()), atol=1e-12), "the directions stay"


def test_a_kernel_is_the_matrix_of_its_outputs():
    kernel, matrix = weights_of([(16, 8, 3, 3)]), weights_of([(16, 72)])
    with torch.no_grad():
        matrix[0].copy_(kernel[0].flatten(1))
    optimizers = [make_optimizer(one, set(one), set(), CONFIG, (0.9, 0.95)) for one in (kernel, matrix)]
    for step in range(3):
        gradient = torch.randn(16, 72, generator=torch.Generator().manual_seed(step))
        kernel[0].grad, matrix[0].grad = gradient.view(16, 8, 3, 3), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(kernel[0].flatten(1), matrix[0])


def test_each_moves_as_if_it_were_alone():
    """Whatever is computed together, and in whatever order."""
    together, apart, turned = weights_of(SHAPES), weights_of(SHAPES), weights_of(SHAPES)
    move(make_optimizer(together, set(together), set(), CONFIG, (0.9, 0.95)), together)
    optimizers = [make_optimizer([one], {one}, set(), CONFIG, (0.9, 0.95)) for one in apart]
    reverse = make_optimizer(turned[::-1], set(turned), set(), CONFIG, (0.9, 0.95))
    for step in range(5):
        for number in range(len(SHAPES)):
            gradient = torch.randn(SHAPES[number], generator=torch.Generator().manual_seed(100 * step + number))
            apart[number].grad, turned[number].grad = (gradient * 10.0 ** (step - 2) for _ in range(2))
        for optimizer in (*optimizers, reverse):
            optimizer.step()
    for one, other, third in zip(together, apart, turned, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
        torch.testing.assert_close(third, one, rtol=0, atol=1e-5)


def test_large_matrices_are_computed_a_few_at_a_time(monkeypatch):
    """Of one shape each time, and all that have a gradient, once."""
    weights = weights_of([(16, 32)] * 5 + [(32, 16)] * 2 + [(16, 4, 8)] + [(16, 16)])
    for weight in weights[:-1]:
        weight.grad = torch.ones_like(weight)
    monkeypatch.setattr("pipelines.training.optimizers.MOST", 3 * 512)
    found = list(alike(weights))
    assert [[rows_and_columns(weight) for weight in several] for several in found] == [
        [(16, 32)] * 3,
        [(16, 32)] * 3,
        [(32, 16)] * 2,
    ]
    assert {id(weight) for several in found for weight in several} == {id(weight) for weight in weights[:-1]}


def test_a_skipped_step_changes_nothing():
    """Neither weights nor momenta, whatever the gradients are; nor does a first one, which only makes the state."""
    for sick in (0, 2):
        skipped, without = weights_of(SHAPES), weights_of(SHAPES)
        skipping, plain = (make_optimizer(w, set(w), set(), CONFIG, (0.9, 0.95)) for w in (skipped, without))
        move(skipping, skipped, steps=3, sick=sick)
        for step in {0, 1, 2} - {sick}:
            for number, weight in enumerate(without):
                generator = torch.Generator().manual_seed(100 * step + number)
                weight.grad = torch.randn(weight.shape, generator=generator) * 10.0 ** (step - 2)
            plain.step()
        assert all(torch.equal(one, other) for one, other in zip(skipped, without, strict=True))
        assert_equal_tensors(pack_optimizer(skipping)[0], pack_optimizer(plain)[0])


class Everything(nn.Module):
    """A layer of each sort."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(32, 16), nn.Conv2d(4, 16, 3)
        self.causal = CausalConv2d(16, 16, (-1, 0), (-1, 1))
        self.narrow, self.few = nn.Linear(32, 8), nn.Conv2d(1, 16, 3)
        self.embedding, self.positions = nn.Embedding(32, 16), nn.Parameter(torch.zeros(32, 32))
        self.head, self.norm = nn.Linear(16, 512), nn.LayerNorm(16)
        self.quantizer = nn.ModuleList([nn.Linear(32, 32)])


def test_what_moves_by_muon():
    model = Everything()
    assert hidden_matrices(model) == {model.linear.weight, model.conv.weight, model.causal.weight}
    assert min(rows_and_columns(model.few.weight)) == 9 < LEAST


@pytest.mark.parametrize("name", [*PRIORS, *TOKENIZERS])
def test_of_every_model_tables_and_codebooks_are_left_to_adamw(name):
    more = {"dim": 32} if "pixelcnn" in name else {}
    model = make_prior(name, (16, 16), 32, **more) if name in PRIORS else make_tokenizer(name)
    named = dict(model.named_parameters())
    muon = {key for key, parameter in named.items() if parameter in hidden_matrices(model)}
    tables = {
        key for key in named if re.search(r"embedding|label|(^|[._])row\.|positions|^table|head\.|quantizer\.", key)
    }
    assert not muon & tables and (muon or name in ("made", "marginal", "palette", "pixels"))
    large = {key for key, parameter in named.items() if min(rows_and_columns(parameter)) >= LEAST}
    assert large - muon <= tables | {"input", "output", "hidden.0"}, "what MADE has are masked parameters, not layers"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_last_layers_that_are_called_heads_are_left_to_adamw(name):
    """Of encoder and decoder, whatever their size; kinds whose last layers have no name of their own have no head."""
    model = make_tokenizer(name)
    heads = {key for key, _ in model.named_parameters() if "head" in key.split(".")}
    assert not heads & {key for key, weight in model.named_parameters() if weight in hidden_matrices(model)}
    if name in ("vit", "titok", "vqgan", "maskgit", "magvit2", "cosmos", "emu3"):
        assert {key.partition(".")[0] for key in heads} == {"encoder", "decoder"}
    else:
        assert not heads


@pytest.mark.parametrize("kind", ["vqvae", "klvae"])
def test_a_large_last_layer_without_that_name_moves_by_muon(kind):
    """As other matrices do."""
    model = make_tokenizer(kind, image_size=(16, 16), channels=1, **WIDE[kind])
    *_, last = [weight for key, weight in model.named_parameters() if key.startswith("encoder") and weight.ndim > 1]
    assert min(rows_and_columns(last)) >= LEAST and last in hidden_matrices(model)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_of_a_quantizer_nothing_moves_by_muon(name):
    model = nn.ModuleDict({"quantizer": make_quantizer(name)})
    assert not hidden_matrices(model)


def test_what_is_left_is_adamws():
    """With its decay; a model without matrices has AdamW alone."""
    model = Everything()
    optimizer = make_optimizer(
        list(model.parameters()), hidden_matrices(model), decaying_weights(model), CONFIG, (0.9, 0.99)
    )
    assert isinstance(optimizer, Muon) and [len(group["params"]) for group in optimizer.param_groups] == [6, 9, 3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.99)}
    for parameters, config in ((list(nn.Linear(8, 8).parameters()), CONFIG), (list(model.parameters()), TrainConfig())):
        assert (
            type(make_optimizer(parameters, hidden_matrices(model), decaying_weights(model), config, (0.9, 0.95)))
            is AdamW
        )
    plain = Everything()
    plain.load_state_dict(model.state_dict())
    theirs = AdamW(plain.norm.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for module in (model, plain):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    theirs.step()
    assert torch.equal(model.norm.weight, plain.norm.weight)
    assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())


VECTORS = re.compile(r"gain$|start_embedding$|query_embedding$|bias|(^|[._])row\.weight$|(^|\.)norm")
"""Of priors, what is a vector: whatever its shape, or however many of them a table holds."""
MORE = {
    "made": {"embedding": 3, "direct": True},
    "gated_pixelcnn": {"row_embedding": True},
    "pixelcnn": {"row_embedding": True},
    "pixelcnn_pp": {"row_embedding": True},
}


def decayed(model: nn.Module, config: TrainConfig) -> set[str]:
    """The names of what decays."""
    optimizer = make_optimizer(
        list(model.parameters()), hidden_matrices(model), decaying_weights(model), config, (0.9, 0.95)
    )
    some = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in some}


@pytest.mark.parametrize("name", PRIORS)
def test_vectors_and_biases_of_a_prior_do_not_decay(name):
    """Whatever their shape, also where there is one for each row, position or class; matrices and tables do."""
    model = make_prior(name, (4, 4), 8, **MORE.get(name, {}))
    found = decayed(model, TrainConfig())
    assert not {key for key in found if VECTORS.search(key)}
    tables = {
        key for key in dict(model.named_parameters()) if re.search(r"(token|class|axis)_embedding|head\.weight", key)
    }
    matrices = {key for key, weight in model.named_parameters() if weight in hidden_matrices(model)}
    assert found >= tables | matrices and found
    assert found - matrices == decayed(model, CONFIG), "Muon's have none"


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("gpt", "layers.0.gain"),
        ("gpt", "start_embedding"),
        ("blocks", "query_embedding"),
        ("made", "head_bias"),
        ("made", "biases.0.own"),
        ("gated_pixelcnn", "layers.0.vertical_row.weight"),
        ("pixelcnn_pp", "above_row.weight"),
    ],
)
def test_a_vector_of_two_dimensions_does_not_decay(kind, key):
    """Nor do biases of which there is a table. The names are those of the models."""
    model = make_prior(kind, (4, 4), 8, **MORE.get(kind, {}))
    assert dict(model.named_parameters())[key].ndim == 2
    assert key not in decayed(model, TrainConfig())


def test_a_matrix_has_one_moment():
    model = nn.Linear(32, 16)
    optimizer = make_optimizer(
        list(model.parameters()), hidden_matrices(model), decaying_weights(model), CONFIG, (0.9, 0.95)
    )
    model(torch.ones(1, 32)).sum().backward()
    optimizer.step()
    assert set(optimizer.state[model.weight]) == {"momentum"}
    assert set(optimizer.state[model.bias]) == {"step", "exp_avg", "exp_avg_sq"}


# Runs


def test_the_rate_of_muon_follows_that_of_adamw():
    """Warm-up, cosine, and all; also that of a player with a rate of its own."""
    model = Everything()
    optimizer = make_optimizer(
        list(model.parameters()), hidden_matrices(model), decaying_weights(model), CONFIG, (0.9, 0.95)
    )
    for lr in (1e-2, 4e-3, 1e-6):
        set_learning_rate(optimizer, lr)
        rates = [group["lr"] * group.get("factor", 1.0) for group in optimizer.param_groups]
        assert rates == pytest.approx([lr, lr, 5 * lr])  # 0.05 for 0.01


def test_a_run_goes_on_to_the_bit(tmp_path, tokens, monkeypatch):
    """With accumulation."""
    more = {"train__optimizer": "muon", "train__accumulate": 2, "train__save_every": 4}
    whole = train_prior(tmp_path / "whole", tokens, **more)
    take_step = training.take_step

    def interrupted(run, *rest):
        if run.step == 7:
            raise KeyboardInterrupt
        take_step(run, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "take_step", interrupted)
        train_prior(tmp_path / "resumed", tokens, **more)
    resumed = train_prior(tmp_path / "resumed", tokens, **more)
    assert exact(resumed) == exact(whole)
    assert_equal_tensors(tensors(resumed), tensors(whole))
    assert any(key.endswith(".momentum") for key in tensors(whole / "state"))
    document = json.loads(next((whole / "state").glob("step-*/optimizer-model.json")).read_text())
    decaying = document["parameters"][: document["groups"][0]]
    assert document["param_groups"][0]["weight_decay"] == 0.02 and not any("[2, 1]" in shape for shape in decaying)
    assert losses(whole)[-1] < losses(whole)[0]
