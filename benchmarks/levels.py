"""A depth head against unfolded rows, on grids of several ids at a position: equal parameters, equal time, one thread.

    pip install -e ".[dev]"
    python benchmarks/levels.py tokens=runs/rvq_tokens                      # a token dataset
    python benchmarks/levels.py tokens=runs/rvq_tokens minutes=0.1 seeds=1  # does it run?

`unfolded`: each id is a position of its own, level below level. `depth`: a position is one, and a head draws its ids.
`gpt` walks in raster order; `blocks` draws the diagonals of positions at once (unfolded: in raster order of rows, for
what is a diagonal of the taller grid is no set of distant positions). Both learn for `minutes` of processor time, the
share of time that is done setting the learning rate. Bits of an image: on the dataset's validation and test rows, at
most `rows` of each. Memory: what a step of 32 images keeps for its backward pass, counted as `smalti plan` does.
Sampling: FLOPs of an image, and seconds of 32 on one thread. Mean and half the range over seeds.
"""

from __future__ import annotations

import math
import time
from typing import Any

from support.options import read_options
from support.tables import table_head, table_row

BATCH = 32
SIZES = {"depth": 4, "heads": 4, "dropout": 0.05}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt, unfolded": ("gpt", {"dim": 64}),
    "gpt, depth": ("gpt", {"dim": 56, "head": {"kind": "depth", "dim": 56, "layers": 2}}),
    "blocks, unfolded": ("blocks", {"dim": 64}),
    "blocks, depth": ("blocks", {"dim": 56, "order": "diagonal", "head": {"kind": "depth", "dim": 56, "layers": 2}}),
}


def bits_of_images(model: Any, split: Any, rows: int) -> float:
    """The mean of -log2 p of whole images."""
    import torch

    total, count = 0.0, min(rows, len(split))
    with torch.inference_mode():
        for start in range(0, count, BATCH):
            tokens = split.rows(slice(start, min(start + BATCH, count)))
            total -= float(model.log_prob(tokens).double().sum()) / math.log(2)
    return total / count


def fitted(kind: str, config: dict[str, Any], data: Any, minutes: float, lr: float, seed: int) -> tuple[Any, int]:
    """A prior after so many minutes of processor time, the average of its weights, and the number of steps."""
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from prior import Prior

    torch.manual_seed(seed)
    generator, train = torch.Generator().manual_seed(seed), data.splits["train"]
    model = Prior.create(kind, grid=data.grid, **{**SIZES, **config})
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.02)
    begin, steps, done = time.process_time(), 0, 0.0
    while done < 1:
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (steps + 1) / 50) * 0.5 * (1 + math.cos(math.pi * done))
        tokens = train.rows(torch.randint(len(train), (BATCH,), generator=generator).numpy())
        inputs = model.training_inputs(tokens, done)
        loss = model.loss(model.put_out(tokens, **inputs), tokens, **inputs)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        steps, done = steps + 1, (time.process_time() - begin) / (60 * minutes)
    return averaged.module.eval(), steps


def costs(model: Any) -> tuple[float, float, float]:
    """Megabytes kept of a step; millions of FLOPs of an image's sample (attention on a processor left out, in which the
    counter does not see it); seconds of 32 samples."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pipelines.planning.costs import prior_turn

    turn = prior_turn(model.train(), BATCH, bf16=False)
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model.sample(1)
    start = time.process_time()
    model.sample(BATCH, generator=torch.Generator().manual_seed(0))
    return turn.parts["activations"] / 1e6, counter.get_total_flops() / 1e6, time.process_time() - start


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and half the range."""
    return f"{sum(values) / len(values):.{digits}f} +- {(max(values) - min(values)) / 2:.{digits}f}"


def main() -> None:
    options = read_options(__doc__, {"tokens": str, "minutes": 3.0, "seeds": 2, "lr": 3e-3, "rows": 2000})
    import torch

    from pipelines.tokens import load_tokens

    torch.set_num_threads(1)
    data = load_tokens(options.tokens)
    print(f"{data.grid.together} ids of {data.grid.vocab_size} at {len(data.grid.positions)} positions, {options}\n")
    head = ("prior", "parameters", "steps/s", "validation, bits", "test, bits", "MB a step", "MFLOP", "32 samples, s")
    print(table_head(*head))
    for name, (kind, config) in CASES.items():
        runs = [fitted(kind, config, data, options.minutes, options.lr, seed) for seed in range(options.seeds)]
        speed = [steps / (60 * options.minutes) for _, steps in runs]
        judged = [
            [bits_of_images(model, data.splits[split], options.rows) for model, _ in runs]
            for split in ("validation", "test")
        ]
        memory, operations, seconds = costs(runs[0][0])
        count = sum(parameter.numel() for parameter in runs[0][0].parameters())
        cells = [
            f"{count:,}",
            spread(speed),
            *map(spread, judged),
            f"{memory:.0f}",
            f"{operations:.0f}",
            f"{seconds:.2f}",
        ]
        print(table_row([name, *cells]), flush=True)


if __name__ == "__main__":
    main()
