"""Priors after so many minutes of processor time, and how many bits they need: for benchmarks that compare them."""

from __future__ import annotations

import math
import time
from typing import Any

AT_ONCE = 64  # images of an evaluation


def bits_of_images(model: Any, split: Any, rows: int) -> float:
    """The mean of -log2 p of whole images."""
    import torch

    total, count = 0.0, min(rows, len(split))
    with torch.inference_mode():
        for start in range(0, count, AT_ONCE):
            tokens = split.rows(slice(start, min(start + AT_ONCE, count)))
            total -= float(model.log_prob(tokens).double().sum()) / math.log(2)
    return total / count


def fitted(
    kind: str, config: dict[str, Any], data: Any, batch: int, minutes: float, lr: float, seed: int
) -> tuple[Any, int]:
    """A prior after so many minutes of processor time, the average of its weights, and the number of steps."""
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from prior import Prior

    torch.manual_seed(seed)
    generator, train = torch.Generator().manual_seed(seed), data.splits["train"]
    model = Prior.create(kind, grid=data.grid, **config)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.02)
    begin, steps, done = time.process_time(), 0, 0.0
    while done < 1:
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (steps + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))
        tokens = train.rows(torch.randint(len(train), (batch,), generator=generator).numpy())
        inputs = model.training_inputs(tokens, done)
        loss = model.loss_from_outputs(model.forward_outputs(tokens, **inputs), tokens, **inputs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        steps, done = steps + 1, (time.process_time() - begin) / (60 * minutes)
    return averaged.module.eval(), steps


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and half the range."""
    return f"{sum(values) / len(values):.{digits}f} +- {(max(values) - min(values)) / 2:.{digits}f}"
