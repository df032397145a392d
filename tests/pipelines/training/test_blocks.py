"""Repeated blocks: how they are found, checkpointed and compiled."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from launch import GPT, losses, tensors, train_prior
from small import PRIORS, draw_tokens, logits_of, make_prior, make_tokenizer
from tiny_task import assert_same_run
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch.utils.checkpoint import checkpoint as recompute

from pipelines.config import UserError
from pipelines.processes.group import ALONE
from pipelines.train_prior import TrainPriorConfig
from pipelines.training import blocks, trainer
from pipelines.training.blocks import checkpoint_blocks, compile_blocks, prepare_blocks, repeated_blocks
from pipelines.training.schedule import TrainConfig
from prior import Prior
from tokenizer.critic import PatchCritic

BLOCKS = {
    "blocks": 2,
    "causal_conv": 4,
    "gated_pixelcnn": 3,
    "gpt": 2,
    "masked": 2,
    "next_scale": 2,
    "pixelcnn": 2,
    "pixelcnn_pp": 5,
    "pixelsnail": 2,
    "made": 0,
    "marginal": 0,
}
DROPOUT = {"blocks", "causal_conv", "gpt", "masked", "next_scale", "pixelcnn_pp", "pixelsnail"}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "vqvae": {"blocks": (2,), "quantizer": {"kind": "rvq", "depth": 2, "book": {"kind": "vq", "codes": 16, "dim": 8}}},
    "vit": {"depth": 2},
    "titok": {"depth": 2, "keep": None},
    "vqgan": {"blocks": 2, "encoder_attention": (1,)},
}
MODELS = [*(name for name, count in BLOCKS.items() if count), *TOKENIZERS]


def model_of(name: str) -> nn.Module:
    """Make a small model, with dropout if it supports that."""
    torch.manual_seed(0)
    if name in TOKENIZERS:
        return make_tokenizer(name, **TOKENIZERS[name]).train()
    return make_prior(name, **({"dropout": 0.3} if name in DROPOUT else {})).train()


def step(model: Any) -> dict[str, torch.Tensor]:
    """Return the loss, gradients and buffers of a training step."""
    torch.manual_seed(5)
    if isinstance(model, Prior):
        tokens, labels = draw_tokens(model, 6), torch.randint(3, (6,))
        inputs = model.training_inputs(tokens, 0.1)
        loss = model.loss_from_outputs(logits_of(model, tokens, labels, **inputs), tokens, **inputs)
    else:
        images = torch.rand(3, 3, 12, 8) * 2 - 1
        output = model(images)
        loss = (output.images - images).square().mean() + sum(output.losses.values())
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients, **dict(model.named_buffers())}


def names_of(model: nn.Module) -> list[str]:
    """The names of a model's blocks."""
    blocks = repeated_blocks(model)
    return [name for name, module in model.named_modules() if module in blocks]


# Finding


def test_priors_and_both_halves_of_tokenizers_have_blocks():
    assert {name: len(repeated_blocks(make_prior(name))) for name in PRIORS} == BLOCKS
    assert names_of(make_prior("gpt", depth=3)) == ["layers.0", "layers.1", "layers.2"]
    assert names_of(make_prior("pixelsnail")) == ["layers.0", "layers.1"]  # not their inner blocks
    for name, count in (("vqvae", 2), ("vit", 2), ("titok", 2), ("vqgan", 4)):
        found = Counter(block.partition(".")[0] for block in names_of(model_of(name)))
        assert found == {"encoder": count, "decoder": count}  # not the codebooks


def test_modules_that_keep_statistics_are_no_blocks():
    """A recomputed forward pass would count twice."""

    def block(norm: nn.Module) -> nn.Module:
        layers = nn.Module()
        layers.norm, layers.conv = norm, nn.Conv2d(4, 4, 1)
        return layers

    assert names_of(nn.ModuleList([block(nn.BatchNorm2d(4)), block(nn.GroupNorm(2, 4))])) == ["1"]
    assert names_of(PatchCritic(3, 8, 3, "batch")) == []


# Checkpointing


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_changes_no_bit(name):
    """Of losses, gradients and buffers, even with dropout; nor does it rename weights."""
    model = model_of(name)
    expected, other = step(copy.deepcopy(model)), copy.deepcopy(model)
    checkpoint_blocks(repeated_blocks(other))
    assert list(other.state_dict()) == list(model.state_dict())
    found = step(other)
    assert list(found) == list(expected)
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
    if name in DROPOUT:
        assert not torch.equal(step(copy.deepcopy(model).eval())["loss"], expected["loss"])


def test_a_checkpointed_run_is_the_same_run(tmp_path, monkeypatch, tokens):
    monkeypatch.setattr(blocks, "checkpoint", counted := Mock(side_effect=recompute))
    more = {"model": {**GPT, "dropout": 0.2}, "train__steps": 3}
    plain = train_prior(tmp_path / "plain", tokens, **more)
    assert not counted.called
    checkpointed = train_prior(tmp_path / "checkpointed", tokens, train__checkpointing=True, **more)
    assert counted.call_count == 3 * 2  # steps x blocks
    assert_same_run(checkpointed, plain)


@pytest.mark.parametrize("name", ["checkpointing", "compile"])
def test_a_model_without_blocks_is_refused(tmp_path, name):
    made = make_prior("made")
    with pytest.raises(UserError, match=f"^train.{name}"):
        prepare_blocks([made], TrainConfig(**{name: True}))
    prepare_blocks([made], TrainConfig())


# Compiling


@pytest.mark.parametrize(("device", "refused"), [("cuda", True), ("cpu", False)])
def test_compiling_for_a_gpu_needs_a_c_compiler(device, refused, monkeypatch):
    monkeypatch.setattr(trainer, "compiler_problem", lambda: "there is no C compiler")
    accelerator = SimpleNamespace(num_processes=1, device=torch.device(device), mixed_precision="no")
    config = TrainPriorConfig(out="x", tokens="x", train={"compile": True, "steps": 1})
    with pytest.raises(UserError, match=r"^train\.compile: there is no C compiler") if refused else nullcontext():
        trainer.require_valid(config, accelerator, ALONE)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_equals_an_eager_one_up_to_rounding(tmp_path, tokens, compiler, monkeypatch, backend):
    """inductor takes most of a minute; the other backend compiles the same graphs."""
    monkeypatch.setattr(blocks, "compile_blocks", partial(compile_blocks, backend=backend))
    eager = train_prior(tmp_path / "eager", tokens, train__steps=3)
    torch._dynamo.reset()
    counters.clear()
    compiled = train_prior(tmp_path / "compiled", tokens, train__steps=3, train__compile=True)
    assert counters["stats"]["unique_graphs"] >= 1
    for name in ("loss", "gradient_norm", "held_out/bits_per_token"):
        assert losses(compiled, name) == pytest.approx(losses(eager, name), rel=1e-4)
    found, expected = (tensors(run / "pipeline") for run in (compiled, eager))
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "gated_pixelcnn", "vit", "titok", "vqgan"])
def test_a_compiled_model_computes_the_same(name, compiler):
    """Up to rounding and the numbers that dropout draws; also if it is checkpointed."""
    model = model_of(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    expected, other = step(copy.deepcopy(model)), copy.deepcopy(model)
    torch._dynamo.reset()
    parts, counted = repeated_blocks(other), Mock(side_effect=compile_fx)
    compile_blocks(parts, backend=lambda graph, inputs: counted(graph, inputs))
    checkpoint_blocks(parts)
    assert list(other.state_dict()) == list(model.state_dict())
    found = step(other)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert 0 < counted.call_count <= len(parts) - (name in ("gpt", "vit"))  # equal blocks share code
