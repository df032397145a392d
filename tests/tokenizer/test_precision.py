"""Ids, likelihoods and samples are computed in full float32, whatever torch's settings, which are restored."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small import (
    PRIORS,
    QUANTIZERS,
    TOKENIZERS,
    draw_tokens,
    generators,
    latents,
    make_prior,
    make_quantizer,
    make_tokenizer,
    train_on,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tokenizer.likelihoods import Likelihood
from tokenizer.precision import full_float32

ROOT = Path(__file__).parents[2]
BACKENDS = torch.backends
HOLDERS = {
    "all": BACKENDS,
    "cuda": BACKENDS.cudnn,
    "cuda matmul": BACKENDS.cuda.matmul,
    "cudnn conv": BACKENDS.cudnn.conv,
    "mkldnn matmul": BACKENDS.mkldnn.matmul,
    "mkldnn conv": BACKENDS.mkldnn.conv,
}
PRODUCTS = ("mm", "conv", "linear", "matmul", "attention", "cdist", "einsum")  # in the names of operations

every_prior = pytest.mark.parametrize("name", PRIORS)


@pytest.fixture
def lowered() -> Iterator[None]:
    """Torch may round all float32 products: to TF32 on a GPU, to bfloat16 on a CPU."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


class ProductSettings(TorchDispatchMode):
    """Records the settings at each product: precision, autocast, and cuDNN's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: set[str] = set()
        self.autocast: set[bool] = set()
        self.cudnn: set[bool] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in func.__name__ for word in PRODUCTS):
            self.rounded |= {holder.fp32_precision for holder in HOLDERS.values()}
            self.autocast.add(torch.is_autocast_enabled("cpu"))
            self.cudnn.add(torch.backends.cuda.cudnn_sdp_enabled())
        return func(*args, **(kwargs or {}))


def seen_in(call: Callable[[], Any]) -> ProductSettings:
    """The settings at the products of a call under autocast, which does not change them."""
    before = precisions()
    with ProductSettings() as seen, torch.autocast("cpu", torch.bfloat16):
        call()
    assert precisions() == before and BACKENDS.cuda.cudnn_sdp_enabled()
    return seen


def precisions() -> dict[str, str]:
    return {name: holder.fp32_precision for name, holder in HOLDERS.items()}


def image_models() -> Iterator[Any]:
    """Every tokenizer with every likelihood that it takes."""
    for name in TOKENIZERS:
        takes = "likelihood" in type(make_tokenizer(name).config).model_fields
        for kind in (None, *(Likelihood.available() if takes else ())):
            config = {} if kind is None else {"likelihood": {"kind": kind}}
            yield pytest.param(name, config, id=f"{name}-{kind}" if kind else name)


# Where it holds


@pytest.mark.sparse
@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize(("name", "config"), image_models())
def test_tokenizers_are_precise(name, config):
    """In ids, images and likelihoods; training uses the user's settings."""
    model = make_tokenizer(name, **config).eval()
    images = torch.rand(3, *model.image_shape) * 2 - 1

    def use():
        tokens = model.encode(images)
        model.decode(tokens)
        if model.has_likelihood:
            model.pixel_log_prob(images, tokens)
            model.value_log_probs(tokens, torch.zeros_like(images, dtype=torch.long), 1)

    assert seen_in(use).rounded <= {"ieee"}
    if list(model.parameters()):
        assert {"bf16", "tf32"} <= seen_in(lambda: model(images)).rounded


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_are_precise_in_training(name):
    model = make_quantizer(name).train()
    seen = seen_in(lambda: [train_on(model, latents(model, 4, 3, 2)) for _ in range(3)])
    assert seen.rounded <= {"ieee"} and seen.autocast <= {False}


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_lookups_are_precise(name):
    model = make_quantizer(name, **({"book": {"kind": "simvq", "codes": 32, "dim": 8}} if name == "rvq" else {})).eval()
    z_q, tokens, _ = model.quantize(latents(model, 4, 3, 2))
    found = []
    seen = seen_in(lambda: found.append(model.lookup(tokens)))
    assert seen.rounded <= {"ieee"} and seen.autocast <= {False} and torch.equal(found[0], z_q)


@pytest.mark.usefixtures("lowered")
@every_prior
def test_likelihoods_and_features_are_precise(name):
    model = make_prior(name)
    tokens = draw_tokens(model, 2)
    assert seen_in(lambda: model.log_prob(tokens)).rounded <= {"ieee"}
    if model.feature_layers:
        assert seen_in(lambda: model.features(tokens)).rounded == {"ieee"}
        assert {"bf16", "tf32"} <= seen_in(lambda: model(tokens)).rounded


@pytest.mark.sparse
@pytest.mark.usefixtures("lowered")
@every_prior
@pytest.mark.parametrize("path", [{}, {"cache": False}, {"parallel": True}], ids=str)
def test_samples_are_precise(name, path):
    """Without autocast and TF32, and without cuDNN's attention, which would plan for every number of keys."""
    model = make_prior(name)
    seen = seen_in(lambda: model.sample(4, generator=generators(4), **path))
    assert seen.rounded <= {"ieee"} and seen.autocast <= {False} and seen.cudnn <= {False}
    assert seen.rounded or not model.feature_layers


@every_prior
def test_autocast_changes_no_sample(name):
    model = make_prior(name)
    expected = model.sample(4, generator=generators(4))
    with torch.autocast("cpu", torch.bfloat16):
        for path in ({}, {"cache": False}, {"parallel": True}):
            assert torch.equal(model.sample(4, generator=generators(4), **path), expected)


@pytest.mark.parametrize("kind", Likelihood.available())
def test_the_mean_image_is_precise_under_autocast(kind):
    member = Likelihood.find(kind)
    likelihood = member(member.Config(), channels=3)
    parameters = torch.randn(2, likelihood.num_parameters, 4, 4) * 5
    expected = likelihood.mean(parameters)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(likelihood.mean(parameters), expected)


# Likelihoods in float64


@every_prior
@torch.no_grad()
def test_a_likelihood_is_as_precise_as_the_weights(name):
    """At least float32."""
    model = make_prior(name)
    tokens = draw_tokens(model, 2)
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float32,) * 2):
        assert model.to(dtype).token_log_probs(tokens).dtype == expected


# Settings of torch

SETTINGS: dict[str, Callable[[], Any]] = {
    "nothing": int,
    "TF32 for all": partial(setattr, BACKENDS, "fp32_precision", "tf32"),
    "bfloat16 on the CPU": partial(setattr, BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    "medium, by the older API": partial(torch.set_float32_matmul_precision, "medium"),
    "no TF32 in convolutions, by the older API": partial(setattr, BACKENDS.cudnn, "allow_tf32", False),
}


def precisions_around(change: Callable[[], Any], use: Callable[[], Any]) -> list[dict[str, str]]:
    """The precisions before and after `use`, and then when the holders from which others inherit change."""
    change()
    found = [precisions()]
    use()
    found.append(precisions())
    for holder, value in itertools.product((BACKENDS, BACKENDS.cudnn), ("ieee", "tf32", "none")):
        holder.fp32_precision = value
        found.append(precisions())
    return found


def use_and_fail() -> None:
    """A context inside another, which ends with an error."""
    with pytest.raises(ZeroDivisionError), full_float32(), full_float32():
        assert set(precisions().values()).isdisjoint({"tf32", "bf16"})
        raise ZeroDivisionError


def in_child(run: Callable[[], Any]) -> Any:
    """What `run` returns in a forked process, since some settings cannot be undone."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(writer, json.dumps(run()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        found = file.read()
    os.waitpid(child, 0)
    return json.loads(found)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_either_api_are_restored_with_what_inherits_from_them(name):
    untouched, used = (in_child(partial(precisions_around, SETTINGS[name], use)) for use in (int, use_and_fail))
    assert used[0] == used[1] and used == untouched
