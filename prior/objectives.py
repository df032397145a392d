"""Training objectives: modules that compute a loss from a batch, for any prior."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .columns import LABEL
from .given import Given

LARGE = 1 << 25  # number of logits from which `SomeAtATime` is used, to avoid copies
AT_ONCE = 1 << 24  # number of float32 logits that it holds at a time, about


class Likelihood(nn.Module):
    """A prior and its loss in one module, for DDP and autocast to wrap: accelerate casts a module's outputs to float32,
    and logits are the largest tensor of a step. Unlike `Prior.loss` it does no checks, which would sync with the
    GPU."""

    def __init__(self, prior: Any) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, tokens: Tensor, given: Given, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of `tokens` `(B, *grid.shape)`, a scalar in nats per token, and scalars to log:
        `bits_per_token`, if the loss is a likelihood (`Prior.loss_is_likelihood`). inputs: `Prior.training_inputs`."""
        outputs = self.prior.forward_outputs(tokens, self.prior.encode_given(given), **inputs)
        loss = self.prior.loss_from_outputs(outputs, tokens, **inputs)
        return loss, {"bits_per_token": loss.detach() / math.log(2)} if self.prior.loss_is_likelihood else {}


def mean_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean of `token_nats`, a scalar; `tokens` are `(B, ...)`."""
    if logits.numel() < LARGE:
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    return token_nats(logits, tokens).mean()


def token_nats(logits: Tensor, tokens: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return -log p of tokens, float32 `(B, N)`. label_smoothing: the target's share spread over all ids."""
    ids = tokens.flatten(1)
    if logits.numel() < LARGE:
        by_id = logits.float().transpose(1, 2)
        return F.cross_entropy(by_id, ids, reduction="none", label_smoothing=label_smoothing)
    return SomeAtATime.apply(logits.flatten(0, 1), ids.flatten(), label_smoothing).view_as(ids)


class SomeAtATime(torch.autograd.Function):
    """Cross-entropy of logits `(rows, V)` and ids `(rows,)`, float32 `(rows,)`, without copies of all logits.

    The plain implementation stores a float32 copy of the logits and their log-softmax for the backward pass, and
    creates gradients of the same size: 537 MB each for 32 images of 256 tokens with a vocabulary of 16,384. This one
    stores only the original logits; it casts and normalises a few rows at a time, once more in the backward pass, and
    returns gradients in the logits' type. (Hsu et al. 2024, "Liger Kernel", do so in one kernel.)"""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, smoothing: float) -> Tensor:
        ctx.save_for_backward(logits, ids)
        ctx.smoothing = smoothing
        rows = max(1, AT_ONCE // logits.shape[1])
        parts = zip(logits.split(rows), ids.split(rows), strict=True)
        nats = [F.cross_entropy(part.float(), at, reduction="none", label_smoothing=smoothing) for part, at in parts]
        return torch.cat(nats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the logits, in their type: softmax minus target."""
        logits, ids = ctx.saved_tensors
        found, smoothing, rows = torch.empty_like(logits), ctx.smoothing, max(1, AT_ONCE // logits.shape[1])
        every = [tensor.split(rows) for tensor in (logits, ids[:, None], grad[:, None], found)]
        for part, at, by, place in zip(*every, strict=True):
            shares = part.softmax(-1, dtype=torch.float32)
            if smoothing:
                shares.sub_(smoothing / logits.shape[1])
            shares.scatter_(1, at, shares.gather(1, at) - (1 - smoothing))
            place.copy_(shares.mul_(by))
        return found, None, None


class Alignment(nn.Module):
    """Condition Contrastive Alignment (CCA, Chen et al. 2024, arXiv:2410.09347): guidance trained into a prior.

    Fine-tuning makes an image more likely under its own label c than under a wrong label c', both relative to a frozen
    copy of the prior:

        -log sigma(beta log p(x | c) / p_ref(x | c)) - lambda log sigma(-beta log p(x | c') / p_ref(x | c'))

    Its optimum is p_ref(x | c) (p(x | c) / q(x | c))^(1 / beta) / lambda^(1 / beta), where q(x | c) is the distribution
    of images with wrong label c. In the paper, wrong labels are drawn from all classes, so q is p(x), and the optimum
    is the target of guidance with scale 1 + 1 / beta, for whole images rather than token by token. Here a wrong label
    is never the image's own, so q is p(x | not c) for classes of equal size: nearly the same for many classes, and a
    stronger effect for few. Images with dropped labels contribute only to the first term. Neither prior uses dropout,
    whose noise would dominate the change in likelihood.

    The frozen `reference` is not a submodule, so it is not trained, averaged, saved or synchronised, and stays in eval
    mode. beta: as above; negatives: lambda."""

    def __init__(self, prior: Any, reference: Any, beta: float, negatives: float) -> None:
        super().__init__()
        self.prior, self.beta, self.negatives = without_dropout(prior), beta, negatives
        self.frozen = (reference.eval().requires_grad_(False),)  # a tuple hides it from torch

    def forward(
        self, tokens: Tensor, given: Given, others: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of `tokens` `(B, *grid.shape)`, a scalar, and scalars to log.

        others: `(B,)`, a wrong label for each image, used where its own is not dropped. inputs:
        `Prior.training_inputs`, the same for all terms. Logged: `cca`, the loss of the
        paper; `margin`, the log-likelihood gain of the image's own label over that of the wrong label, in nats;
        `above`, the share of images with a positive margin; `bits_per_token`. `margin` and `above` are averaged over
        labelled images, the others over all images."""
        labelled, wrong = (given.raw(LABEL, tokens.device) >= 0).float(), given.with_rows(label=others)
        nats = image_nats(self.prior, tokens, given, inputs)
        own = self.reference_nats(tokens, given, inputs) - nats
        other = self.reference_nats(tokens, wrong, inputs) - image_nats(self.prior, tokens, wrong, inputs)
        loss = alignment_loss(own, other, labelled, self.beta, self.negatives)
        with torch.no_grad():
            count, gap = labelled.sum().clamp(min=1), own - other
            terms = {
                "cca": loss.detach(),
                "margin": (gap * labelled).sum() / count,
                "above": ((gap > 0) * labelled).sum() / count,
                "bits_per_token": nats.mean() / (len(self.prior.grid) * math.log(2)),
            }
        return loss / max(self.negatives, 1.0), terms  # a large lambda does not increase the effective learning rate

    @torch.no_grad()
    def reference_nats(self, tokens: Tensor, given: Given, inputs: dict[str, Any]) -> Tensor:
        return image_nats(self.frozen[0], tokens, given, inputs)


def without_dropout(prior: Any) -> Any:
    """Disable dropout in `prior` permanently, and return it."""
    for module in prior.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return prior


def image_nats(prior: Any, tokens: Tensor, given: Given, inputs: dict[str, Any]) -> Tensor:
    """Return -log p(tokens | given) of an exact prior, float32 `(B,)`, in the orders that `inputs` hold."""
    outputs = prior.forward_outputs(tokens, prior.encode_given(given), **inputs)
    return prior.output_head.nats(outputs, prior.position_ids(tokens)).flatten(1).sum(1)


def alignment_loss(own: Tensor, other: Tensor, labelled: Tensor, beta: float, negatives: float) -> Tensor:
    """Return the mean of the paper's loss (eq. 12) over images. own, other: log p / p_ref under the image's own and the
    wrong label, `(B,)` nats; labelled: 1, or 0 for images with dropped labels, which have no negative term."""
    wrong = negatives * labelled * F.logsigmoid(-beta * other)
    return -(F.logsigmoid(beta * own) + wrong).mean()


def alignment_problem(prior: Any) -> str | None:
    """Return why this prior cannot be aligned, or None. It needs labels and an exact log p from one pass."""
    if not prior.exact or prior.likelihood_passes > 1:
        reason = f"takes {prior.likelihood_passes} passes" if prior.exact else "is an estimate of a bound"
        return f"needs a prior whose log p is exact in one pass, but that of {prior.name!r} {reason}"
    return None if prior.num_classes > 1 else f"needs labels of two classes or more (got {prior.num_classes})"
