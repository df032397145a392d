"""Gumbel-softmax codes (Jang et al. 2017; Ramesh et al. 2021, the dVAE of DALL-E): while it trains, the id is drawn.

A linear map gives each vector logits over codes. In training the id is drawn from their softmax, as the largest of
logits plus Gumbel noise, and gradients take the softmax of that sum, at a temperature that falls, for what was drawn;
otherwise the id is the largest logit. `kl` keeps the drawing alive. The network is that of Esser et al. 2021
(taming-transformers, GumbelVQ), its start is not: with random weights, ids of a small encoder's vectors soon were few.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..config import ModelConfig
from .base import Quantized, Quantizer
from .choice import How, choose
from .codebook import first_rows, kmeans, map_of, nearest, rows_of, world_size
from .steps import Stepped, Taken


class GumbelConfig(ModelConfig):
    """How codes are drawn."""

    codes: int = Field(512, ge=2, le=1 << 18, description="size of the codebook")
    dim: int = Field(64, ge=1, le=4096, description="width of a code")
    hard: bool = Field(
        True, description="train the decoder on the code that is drawn; false: on the softmax's mean of codes"
    )
    temperature: float = Field(1.0, gt=0, description="of the softmax that gradients take, at first")
    final_temperature: float = Field(1 / 16, gt=0, description="the same at last (DALL-E: 1/16)")
    anneal_steps: int = Field(2000, ge=0, description="training steps from the one to the other, along a cosine")
    kl: float = Field(5e-4, ge=0, description="weight of KL(p(code | z), uniform) in nats per vector")
    kmeans_iterations: int = Field(
        10, ge=0, description="k-means steps over the first batch, from which logits and codes start"
    )
    seed: int = Field(0, ge=0, description="chooses the first codes")


class Gumbel(Stepped, Quantizer, name="gumbel"):
    """Logits `proj(z)` over codes, of which code k is row k of `embed`."""

    Config = GumbelConfig

    def __init__(self, config: GumbelConfig) -> None:
        super().__init__(config)
        self.vocab_size, self.dim = config.codes, config.dim
        self.proj, self.embed = nn.Linear(config.dim, config.codes), nn.Embedding(config.codes, config.dim)
        self.micro_batches = 0  # of this step so far

    @property
    def loss_weights(self) -> dict[str, float]:
        """As configured."""
        return {"kl": self.config.kl}

    def temperature_at(self, step: int) -> float:
        """From `temperature` at step 0 to `final_temperature` at `anneal_steps` and after."""
        first, last, steps = self.config.temperature, self.config.final_temperature, self.config.anneal_steps
        share = min(1.0, step / steps) if steps else 1.0
        return last + (first - last) * (1 + math.cos(math.pi * share)) / 2

    @torch.no_grad()
    def finish_step(self, taken: Taken = True) -> None:
        """Count the step, which the temperature follows."""
        if self.micro_batches and taken is not False:
            self.count_step(taken)
        self.micro_batches = 0

    def matters(self, step: int) -> bool:
        """Until the temperature is the last one; and once more, as the step before may have been skipped."""
        return step <= self.config.anneal_steps + 1

    def lookup_checked(self, tokens: Tensor) -> Tensor:
        """The codes `(B, dim, *spatial)` of `tokens` `(B, *spatial)`."""
        return self.embed(tokens).movedim(-1, 1)

    def _quantize(self, z: Tensor) -> Quantized:
        """In training, each call takes one number from torch's global generator on the CPU, of which noise is a
        function."""
        rows, seed = rows_of(z), None
        if self.training:
            if self.micro_batches == 0:
                self.find_step()
                if self.step == 0:
                    self.start(rows.detach())
            self.micro_batches += 1
            seed = int(torch.randint(1 << 62, (), device="cpu"))
        how = How(self.temperature_at(self.step), hard=self.config.hard or not self.training, seed=seed)
        values, tokens, entropy, _ = choose(rows, self.proj.weight, self.proj.bias, self.embed.weight, how)
        kl = (math.log(self.vocab_size) - entropy).clamp(min=0)
        return Quantized(map_of(values, z), tokens.reshape(z.shape[0], *z.shape[2:]), {"kl": kl})

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Codes are the centres c of k-means over rows of all ranks, and p(code | z) that of a mixture of equal spheres
        around them: logits -|z - c|^2 / (2 s), with s the mean square of z - c per channel. (|z|^2 does not matter to a
        softmax, so this is linear in z.) Random weights stay where there are fewer rows than codes."""
        sample = first_rows(rows, 32 * self.vocab_size, self.config.seed)
        if len(sample) < self.vocab_size or not bool(torch.isfinite(sample).all()):  # alike on all ranks
            return
        centres = kmeans(sample, self.vocab_size, self.config.kmeans_iterations)
        spread = F.mse_loss(sample, centres[nearest(sample, centres)])
        spread = spread.clamp(min=0.01 * sample.var(0).mean()).clamp(min=1e-6)  # of hardly more rows than codes
        self.embed.weight.copy_(centres)
        self.proj.weight.copy_(centres / spread)
        self.proj.bias.copy_(-centres.square().sum(1) / (2 * spread))
        if world_size() > 1:
            for parameter in self.parameters():
                dist.broadcast(parameter.data, 0)
