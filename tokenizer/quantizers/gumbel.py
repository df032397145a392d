"""Gumbel-softmax (Jang et al. 2017; Ramesh et al. 2021, the dVAE of DALL-E): ids are sampled in training.

A linear map gives each vector logits over codes. In training the id is the argmax of logits plus Gumbel noise, and
gradients pass through the softmax of that sum at an annealed temperature; in eval mode the id is the argmax of the
logits. `kl` keeps the distribution from collapsing. The layers are those of GumbelVQ (taming-transformers, Esser et al.
2021). The initialization differs, because with random weights a small encoder soon used few ids.
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
from .choice import ChoiceOptions, choose
from .codebook import first_rows, kmeans, map_of, nearest_codes, rows_of
from .updates import SelfUpdating, world_size


class GumbelConfig(ModelConfig):
    codes: int = Field(512, ge=2, le=1 << 18, description="size of the codebook")
    dim: int = Field(64, ge=1, le=4096, description="width of a code")
    hard: bool = Field(True, description="decode the sampled code in training; false: the softmax's mean of codes")
    temperature: float = Field(1.0, gt=0, description="initial temperature of the softmax that passes gradients")
    final_temperature: float = Field(1 / 16, gt=0, description="final temperature (DALL-E: 1/16)")
    anneal_steps: int = Field(2000, ge=0, description="training batches over which a cosine anneals the temperature")
    kl: float = Field(5e-4, ge=0, description="weight of KL(p(code | z), uniform) in nats per vector")
    kmeans_iterations: int = Field(10, ge=0, description="k-means steps on the first batch that set logits and codes")
    seed: int = Field(0, ge=0, description="seed of the initial codes")


class Gumbel(SelfUpdating, Quantizer, name="gumbel"):
    """Logits over codes are `proj(z)`; code k is row k of `embed`."""

    Config = GumbelConfig

    def __init__(self, config: GumbelConfig) -> None:
        super().__init__(config)
        self.vocab_size, self.dim = config.codes, config.dim
        self.proj, self.embed = nn.Linear(config.dim, config.codes), nn.Embedding(config.codes, config.dim)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"kl": self.config.kl}

    def temperature_at(self, step: int) -> float:
        """Anneal along a cosine from `temperature` at step 0 to `final_temperature` from `anneal_steps` on."""
        first, last, steps = self.config.temperature, self.config.final_temperature, self.config.anneal_steps
        share = min(1.0, step / steps) if steps else 1.0
        return last + (first - last) * (1 + math.cos(math.pi * share)) / 2

    def lookup_checked(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens).movedim(-1, 1)

    def _quantize(self, z: Tensor) -> Quantized:
        """Quantize; in training, draw the noise's seed from torch's global CPU generator."""
        rows, options = rows_of(z), ChoiceOptions()
        if self.training:
            if self.may_record(rows.detach()):
                self.record()
            seed = int(torch.randint(1 << 62, (), device="cpu"))
            options = ChoiceOptions(self.temperature_at(self.step), hard=self.config.hard, seed=seed)
        values, tokens, entropy, _ = choose(rows, self.proj.weight, self.proj.bias, self.embed.weight, options)
        kl = (math.log(self.vocab_size) - entropy).clamp(min=0)
        return Quantized(map_of(values, z), tokens.reshape(z.shape[0], *z.shape[2:]), {"kl": kl})

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Set codes to the k-means centres c of the rows of all ranks, and p(code | z) to the posterior of a mixture of
        equal isotropic Gaussians around them: logits -|z - c|^2 / (2 s), with s the mean square of z - c per channel.
        (|z|^2 cancels in the softmax, so the logits are linear in z.) With fewer rows than codes, keep the random
        weights."""
        sample = first_rows(rows, 32 * self.vocab_size, self.config.seed)
        if len(sample) < self.vocab_size:
            return
        centres = kmeans(sample, self.vocab_size, self.config.kmeans_iterations)
        spread = F.mse_loss(sample, centres[nearest_codes(sample, centres)])
        # The spread is near 0 if rows hardly outnumber codes.
        spread = spread.clamp(min=0.01 * sample.var(0).mean()).clamp(min=1e-6)
        self.embed.weight.copy_(centres)
        self.proj.weight.copy_(centres / spread)
        self.proj.bias.copy_(-centres.square().sum(1) / (2 * spread))
        if world_size() > 1:
            for parameter in self.parameters():
                dist.broadcast(parameter.data, 0)
