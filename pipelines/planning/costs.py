"""What a training step costs in memory and FLOPs, found on paper (`planning.paper`).

A model runs forward and backward as the loop runs it, autocast to bf16; a tokenizer's losses are in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from prior import Prior
from prior.objectives import Alignment
from tokenizer import Tokenizer
from tokenizer.losses import total_loss

from ..metrics.likelihood import rows_at_a_time
from ..metrics.perceptual import Net, Perceptual
from ..training.adversary import Adversary
from .paper import CUDAKernels, Ledger, address, on_meta, on_paper

Parts = Iterator[tuple[str, int]]

ALIGNED = 8
"""FLOPs of a step of objective=cca over those of a forward pass: forward and backward under two labels, and the frozen
copy's forward passes."""


@dataclass(frozen=True)
class Turn:
    """One player's turn on a micro-batch, in bytes beside weights and gradients: what is kept for the backward pass, by
    part; what else there is at the worst moment (`working`); and what the weights that autocast casts add to that."""

    parts: dict[str, int]
    working: int
    casts: int


@dataclass(frozen=True)
class Work:
    """The turns of a step on a GPU, and the FLOPs, forward and backward, of one image."""

    turns: list[Turn]
    flops: int


# Turns --------------------------------------------------------------------------------------------


def prior_turn(model: Prior, count: int, bf16: bool, frozen: Prior | None = None) -> Turn:
    """The turn of a prior on `count` images, as `train_prior` has it; with the copy `frozen`, that of objective=cca."""
    if frozen is not None:
        return aligned_turn(Alignment(model, frozen, beta=1.0, negatives=1.0), count, bf16)

    def parts(ledger: Ledger) -> Parts:
        tokens = torch.zeros(count, *model.grid.shape, dtype=torch.long)
        inputs = model.training_inputs(tokens, 0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model.forward_outputs(tokens, torch.zeros(count, dtype=torch.long), **inputs)
        yield "activations", ledger.now - outputs.untyped_storage().nbytes()
        yield "logits", outputs.untyped_storage().nbytes()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model.loss_from_outputs(outputs, tokens, **inputs)
        del outputs
        loss.backward()

    return take(parts, list(model.parameters()))


def aligned_turn(module: Alignment, count: int, bf16: bool) -> Turn:
    """The turn of a prior that is compared with a frozen copy of it, each under two labels of `count` images."""
    (model, frozen) = (module.prior, *module.frozen)

    def parts(ledger: Ledger) -> Parts:
        tokens, labels = torch.zeros(count, *model.grid.shape, dtype=torch.long), torch.zeros(count, dtype=torch.long)
        inputs = model.training_inputs(tokens, 0.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = module(tokens, labels, labels, inputs)
        yield "activations and logits", ledger.now
        loss.backward()

    return take(parts, [*model.parameters(), *frozen.parameters()])


@dataclass(frozen=True)
class Recipe:
    """What `train_tokenizer` trains, and with what."""

    tokenizer: Tokenizer
    weights: dict[str, float]
    adversary: Adversary | None = None
    perceptual: Perceptual | None = None
    perceptual_weight: float = 0.0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the tokenizer and of its critic."""
        critic = [] if self.adversary is None else self.adversary.critic.parameters()
        return [*self.tokenizer.parameters(), *critic]


def tokenizer_turn(recipe: Recipe, count: int, bf16: bool) -> Turn:
    """The turn of a tokenizer on `count` images, its critic being heard."""
    model, adversary = recipe.tokenizer, recipe.adversary

    def parts(ledger: Ledger) -> Parts:
        images, kept = torch.zeros(count, *model.image_shape), 0

        def grown() -> int:
            nonlocal kept
            before, kept = kept, ledger.now
            return kept - before

        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(images)
        loss, _ = total_loss(output, images, recipe.weights)
        yield "activations", grown()
        if recipe.perceptual is not None:
            loss = loss + recipe.perceptual_weight * recipe.perceptual(output.images, images)
            yield "perceptual network", grown()
        if adversary is not None:
            adversary.critic.requires_grad_(False)
            in_full = adversary.config.start + adversary.config.warmup + adversary.config.ramp
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss + adversary.tokenizer_term(output.images, loss, model.last_layer, in_full)[0]
            yield "critic", grown()
        loss.backward()

    return take(parts, recipe.parameters)


def critic_turn(recipe: Recipe, count: int, bf16: bool) -> Turn:
    """The turn of the critic on `count` images and as many reconstructions."""
    adversary = recipe.adversary
    assert adversary is not None
    adversary.critic.requires_grad_(True)

    def parts(ledger: Ledger) -> Parts:
        images = torch.zeros(count, *recipe.tokenizer.image_shape)
        reconstructions = torch.zeros_like(images)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = adversary.critic_term(adversary.critic, images, reconstructions)
        yield "activations", ledger.now
        loss.backward()

    return take(parts, list(adversary.critic.parameters()))


def perceptual_network(net: Net) -> Perceptual | None:
    """LPIPS on the meta device, with weights that mean nothing; None where torchmetrics is not installed."""
    if find_spec("torchmetrics") is None:
        return None
    return on_meta(lambda: Perceptual(net, "meta", pretrained=False))


def take(parts: Callable[[Ledger], Parts], weights: list[nn.Parameter]) -> Turn:
    """Run a turn, and read the ledger. Gradients are there from the start, as with several micro-batches."""
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    known = {address(t) for weight in weights for t in (weight, weight.grad) if t is not None}
    ledger = Ledger(known)
    with CUDAKernels(), ledger:
        kept = dict(parts(ledger))
    return Turn(kept, ledger.peak - sum(kept.values()), ledger.peak_with_casts - ledger.peak)


# A run's costs ------------------------------------------------------------------------------------


class Costs(NamedTuple):
    """The work of a step as it is and with its blocks checkpointed; and of an evaluation its bytes, and how many
    operations a pass launches."""

    work: Work
    checkpointed: Work
    evaluation: int
    launches: int


def costs_of(
    turns: Callable[[int], list[Turn]],
    evaluate: Callable[[], Any],
    model: nn.Module,
    *,
    beside: Sequence[nn.Module] = (),
    blocks: list[nn.Module],
    count: int,
) -> Costs:
    """The costs of training `model`, which is on the meta device as the modules `beside` it are. `turns` are those of a
    step on as many images as it is given, `count` a micro-batch. Without `blocks` to checkpoint, both works are one."""

    def work() -> Work:
        return Work(turns(count), flops_of(lambda: turns(1)))

    with on_paper(model, *beside):
        plain = again = work()
        evaluation, launches = evaluation_of(evaluate, model)
        if blocks:
            checkpoint_blocks(blocks)
            again = work()
    return Costs(plain, again, evaluation, launches)


def evaluation_of(run: Callable[[], Any], model: nn.Module) -> tuple[int, int]:
    """Bytes at the worst moment of an evaluation, `run`, beside the weights of `model`, without autocast, which would
    need less; and the number of its operations."""
    ledger = Ledger({address(tensor) for tensor in (*model.parameters(), *model.buffers())})
    model.eval()
    with torch.no_grad(), CUDAKernels(), ledger:
        run()
    model.train()
    return ledger.peak, ledger.launches


def likelihood_batch(model: Prior) -> None:
    """A batch of `metrics.likelihood.bits_per_token`; of a model that takes many passes for it, one pass."""
    count = rows_at_a_time(model.grid)
    rows = torch.zeros(count, *model.grid.shape, dtype=torch.long)
    model.likelihood_pass(rows, torch.zeros(count, dtype=torch.long) if model.num_classes else None)


def flops_of(turn: Callable[[], Any]) -> int:
    """FLOPs of all matrix products and convolutions in a turn, attention as two full ones however it is masked."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        counter = stack.enter_context(FlopCounterMode(display=False))
        turn()
    return int(counter.get_total_flops())


def checkpoint_blocks(blocks: list[nn.Module]) -> None:
    """Let each of `blocks` keep its input alone, and run again in the backward pass."""
    for block in blocks:
        # The backward pass does not know of a function mode around it.
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), CUDAKernels()),
        )
