"""Guidance that is trained into a conditional prior, so that sampling does without it.

Condition Contrastive Alignment (CCA, Chen et al. 2024, arXiv:2410.09347). Fine-tuning makes an image likelier under its
own label c than under a wrong one c', both compared with a frozen copy of the prior:

    -log sigma(beta log p(x | c) / p_ref(x | c)) - lambda log sigma(-beta log p(x | c') / p_ref(x | c'))

Its optimum is p_ref(x | c) (p(x | c) / q(x | c))^(1 / beta) / lambda^(1 / beta), where q(x | c) are the images that c
is a wrong label of. In the paper wrong labels are drawn from all, q is p(x), and the optimum is what guidance of scale
1 + 1 / beta aims at, in the full model and not token by token. Here they are never the image's own, so that q is
p(x | not c), for classes of one size: of many classes nearly the same, of few stronger. A short run with a small rate
stops on the way there. Images without their label take part in the first term alone, which only makes them likelier.

Neither prior drops anything out: what an image gains would be the loss by dropout, for the most part.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Alignment(nn.Module):
    """A prior and its loss in one call. The frozen `reference` is no part of the module: it is not trained, averaged,
    saved or sent between processes, and stays in eval mode. negatives: lambda."""

    def __init__(self, prior: Any, reference: Any, beta: float, negatives: float) -> None:
        super().__init__()
        self.prior, self.beta, self.negatives = without_dropout(prior), beta, negatives
        self.frozen = (reference.eval().requires_grad_(False),)  # a tuple, which torch does not look into

    def forward(
        self, tokens: Tensor, labels: Tensor, others: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of `tokens` `(B, *grid.shape)`, a scalar, and what to log of it.

        labels: `(B,)`, the null class where dropped; others: `(B,)`, a label that each image does not have. inputs:
        `Prior.training_inputs`, so that the prior and its reference walk alike. Logged: `cca`, the loss of the paper;
        `margin`, by how many nats more the own label has gained than the other; `above`, the share of images of which
        it has; `bits_per_token`. The first and the last are means over images; the others over those with their label,
        so that their mean over parts of a batch is a little another one.
        """
        labelled = (labels != self.prior.num_classes).float()
        nats = image_nats(self.prior, tokens, labels, inputs)
        own = self.reference_nats(tokens, labels, inputs) - nats
        other = self.reference_nats(tokens, others, inputs) - image_nats(self.prior, tokens, others, inputs)
        loss = alignment_loss(own, other, labelled, self.beta, self.negatives)
        with torch.no_grad():
            count, gap = labelled.sum().clamp(min=1), own - other
            terms = {
                "cca": loss.detach(),
                "margin": (gap * labelled).sum() / count,
                "above": ((gap > 0) * labelled).sum() / count,
                "bits_per_token": nats.mean() / (len(self.prior.grid) * math.log(2)),
            }
        return loss / max(self.negatives, 1.0), terms  # so that a large lambda is no large learning rate

    @torch.no_grad()
    def reference_nats(self, tokens: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
        """`image_nats` of the frozen prior."""
        return image_nats(self.frozen[0], tokens, labels, inputs)


def without_dropout(prior: Any) -> Any:
    """`prior`, which from now on trains without it."""
    for module in prior.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return prior


def image_nats(prior: Any, tokens: Tensor, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
    """-log p(tokens | labels) of an exact prior, float32 `(B,)`, along the orders that `inputs` name."""
    outputs = prior.put_out(tokens, labels, **inputs)
    return prior.readout.nats(outputs, prior.ids_of(tokens)).flatten(1).sum(1)


def alignment_loss(own: Tensor, other: Tensor, labelled: Tensor, beta: float, negatives: float) -> Tensor:
    """The mean of the paper's loss (eq. 12) over images, a scalar. own, other: log p / p_ref under the own label and
    under the other, `(B,)` nats; labelled: 0 where an image is without its label, which has no negative, else 1."""
    wrong = negatives * labelled * F.logsigmoid(-beta * other)
    return -(F.logsigmoid(beta * own) + wrong).mean()


def alignment_problem(prior: Any) -> str | None:
    """Why this prior cannot be aligned, if it cannot: its log p has to be exact, in one pass, and have a label."""
    if not prior.exact or prior.likelihood_passes > 1:
        passes = f"in {prior.likelihood_passes} passes" if prior.exact else "as an estimate of a bound"
        return f"needs a prior whose log p is exact in one pass, and {prior.name!r} has it {passes}"
    return None if prior.num_classes > 1 else f"needs labels of two classes or more (got {prior.num_classes})"
