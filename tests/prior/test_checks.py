"""The checks that a prior from outside of the package can be held to: no false alarm, and each broken promise found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small import SMALL, grid_of
from torch import Tensor, nn

from prior import Prior
from prior.checks import NotCausalError, check_prior, example_columns, is_built_in, require_causal, with_random_weights
from prior.condition_encoder import ConditionEmbedding, Encoded
from prior.config import PriorConfig
from prior.given import Given
from tokenizer import TokenGrid


def make_broken(fault: str, shape: tuple[int, ...] = (2, 3)) -> Prior:
    """A prior with one fault; it registers no name."""

    class Broken(Prior):
        Config = PriorConfig
        name = "broken"

        def __init__(self, config: PriorConfig) -> None:
            super().__init__(config)
            self.table = nn.Parameter(torch.zeros(config.num_classes + 1, len(config.grid), config.grid.vocab_size))
            self.seen = nn.Parameter(torch.zeros(config.grid.vocab_size, config.grid.vocab_size))
            self.extra = {"scale": 1.0}

        def forward(self, tokens: Tensor, encoded: Encoded | None = None, *_: Any, **__: Any) -> Tensor:
            null = self.num_classes if fault != "null class" else 0
            rows = torch.full((len(tokens),), null) if encoded is None else encoded.labels
            logits = self.table[rows]
            if fault == "peeks":
                logits = logits + self.seen[tokens.flatten(1)]
            if fault == "sees the next":
                logits = logits + self.seen[tokens.flatten(1)].roll(-1, 1)
            if fault == "sees all":
                logits = logits + self.seen[tokens.flatten(1)].mean(1, keepdim=True)
            if fault == "batch":
                logits = logits + self.seen[tokens.flatten(1)].mean((0, 1)) * (len(tokens) > 1) * self.seen.sum()
            return logits * self.extra["scale"]

    if fault == "unnormalised":
        Broken.log_prob = lambda self, tokens, *a, **k: 0.5 * Prior.log_prob(self, tokens, *a, **k)  # type: ignore
    if fault == "state outside of weights":
        config_init = Broken.__init__

        def init(self: Any, config: PriorConfig) -> None:
            config_init(self, config)
            self.extra["scale"] = float(torch.rand(()))

        Broken.__init__ = init  # type: ignore
    return Broken(PriorConfig(grid=TokenGrid(shape, 3), num_classes=2))


@pytest.mark.parametrize("name", ["gpt", "blocks", "made", "next_scale", "pixelcnn"])
def test_priors_of_the_package_keep_every_promise(name: str) -> None:
    shape, ids = ((2, 2), 3) if name == "next_scale" else ((2, 3), 3)
    prior = Prior.create(name, grid=grid_of(name, shape, ids), num_classes=2, **SMALL.get(name, {}))
    found = dict(check_prior(prior))
    assert is_built_in(prior) and len(found) == 8 and set(found.values()) == {None}, found


@pytest.mark.parametrize(
    ("fault", "promise"),
    [
        ("peeks", "logits see earlier blocks only"),
        ("sees the next", "logits see earlier blocks only"),
        ("sees all", "logits see earlier blocks only"),
        ("batch", "an image does not depend on its batch"),
        ("null class", "no label is the null class"),
        ("unnormalised", "probabilities sum to one"),
        ("unnormalised", "samples follow log_prob"),
        ("state outside of weights", "configuration and weights are the whole model"),
    ],
)
def test_a_broken_promise_is_found(fault: str, promise: str) -> None:
    assert dict(check_prior(make_broken(fault)))[promise]


def test_priors_from_outside_without_a_fault_keep_every_promise() -> None:
    for prior, count in ((make_broken("none"), 8), (make_conditioned_outsider("none"), 9)):
        found = dict(check_prior(prior))
        assert len(found) == count and not any(found.values()), found


def test_an_attribute_that_hides_a_method_is_the_only_problem() -> None:
    prior = make_broken("none")
    prior.start = nn.Embedding(2, 2)  # type: ignore[assignment]
    assert [str(problem).count("start") for _, problem in check_prior(prior)] == [2]


@pytest.mark.parametrize("fault", ["peeks", "sees the next", "sees all"])
def test_an_output_layer_of_zeros_hides_nothing(fault: str) -> None:
    """On a large grid too, where only some of the tokens are changed."""
    prior = make_broken(fault, (12, 12))
    tokens, given = torch.randint(3, (12, 12)), Given(prior.columns, {"label": torch.tensor([1])}, 1)
    require_causal(prior, tokens)  # what it sees is multiplied by zero
    with pytest.raises(NotCausalError, match="broken"):
        require_causal(with_random_weights(prior), tokens, given)
    require_causal(with_random_weights(make_broken("none", (12, 12))), tokens, given)


class Conditioned(PriorConfig):
    """Settings of a prior from outside that takes columns."""

    takes_conditions = True


def make_conditioned_outsider(fault: str) -> Prior:
    """A prior from outside, conditioned on a number and a grid, with one fault; it registers no name."""

    class Outsider(Prior):
        Config = Conditioned
        name = "outsider"

        def __init__(self, config: Conditioned) -> None:
            super().__init__(config)
            self.embedding = ConditionEmbedding(config, len(config.grid) * config.grid.vocab_size)

        def outputs(self, tokens: Tensor, encoded: Encoded) -> Tensor:
            vector = encoded.vector
            assert vector is not None
            if fault == "ignores":
                encoded = replace(encoded, vector=torch.zeros_like(vector))
            if fault == "batch":
                encoded = replace(encoded, vector=vector.mean(0, keepdim=True).expand_as(vector))
            return self.embedding(encoded).unflatten(1, (len(self.grid), -1))

        def start(self, encoded: Encoded, order: Any = None, *, cache: bool = True) -> Any:
            if fault == "cache":
                encoded = encoded[torch.zeros(len(encoded), dtype=torch.long)]
            return super().start(encoded, order, cache=cache)

    grid = TokenGrid((2, 3), 2)
    return Outsider(Conditioned(grid=grid, num_classes=2, conditions=example_columns(grid)))


@pytest.mark.parametrize(
    ("fault", "promise"),
    [
        ("ignores", "columns matter, and missing ones are null"),
        ("batch", "an image does not depend on its batch"),
        ("cache", "cached steps equal forward"),
    ],
)
def test_a_broken_promise_about_conditions_is_found(fault: str, promise: str) -> None:
    assert dict(check_prior(make_conditioned_outsider(fault)))[promise]
