"""A depth head against unfolded rows, on grids of several ids at a position: equal parameters, equal time, one thread.

    pip install -e ".[dev]"
    python -m benchmarks.priors.levels tokens=runs/rvq_tokens                      # a token dataset
    python -m benchmarks.priors.levels tokens=runs/rvq_tokens minutes=0.1 seeds=1  # does it run?

`unfolded`: each id is a position of its own, level below level. `depth`: a position is one, and a head draws its ids.
`gpt` walks in raster order; `blocks` draws the diagonals of positions at once (unfolded: in raster order of rows, for
what is a diagonal of the taller grid is no set of distant positions). Both learn for `minutes` of processor time, the
share of time that is done setting the learning rate. Bits of an image: on the dataset's validation and test rows, at
most `rows` of each. Memory: most bytes of tensors in a step of 32 images, beside weights and gradients. Sampling: FLOPs
of an image, and seconds of 32 on one thread. Mean and half the range over seeds.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.support.fitting import bits_of_images, fitted, spread
from benchmarks.support.options import read_options
from benchmarks.support.tables import table_head, table_row

BATCH = 32
SIZES = {"depth": 4, "heads": 4, "dropout": 0.05}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt, unfolded": ("gpt", {"dim": 64}),
    "gpt, depth": ("gpt", {"dim": 56, "head": {"kind": "depth", "dim": 56, "layers": 2}}),
    "blocks, unfolded": ("blocks", {"dim": 64}),
    "blocks, depth": ("blocks", {"dim": 56, "order": "diagonal", "head": {"kind": "depth", "dim": 56, "layers": 2}}),
}


def costs(model: Any) -> tuple[float, float, float]:
    """Megabytes of a step; millions of FLOPs of an image's sample (attention on a processor left out, in which the
    counter does not see it); seconds of 32 samples."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from pipelines.commands.plan import peak_bytes

    tokens = torch.zeros(BATCH, *model.grid.shape, dtype=torch.long)
    model.train().loss(tokens).backward()  # then its gradients are there
    peak = peak_bytes(model.device, lambda: model.loss(tokens).backward())
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model.sample(1)
    start = time.process_time()
    model.sample(BATCH, generator=torch.Generator().manual_seed(0))
    return peak / 1e6, counter.get_total_flops() / 1e6, time.process_time() - start


def main() -> None:
    options = read_options(__doc__, {"tokens": str, "minutes": 3.0, "seeds": 2, "lr": 3e-3, "rows": 2000})
    import torch

    from pipelines.tokens import load_tokens

    torch.set_num_threads(1)
    data = load_tokens(options.tokens)
    grid = data.grid
    print(f"{grid.ids_per_position} ids of {grid.vocab_size} at {len(grid.positions)} positions, {options}\n")
    head = ("prior", "parameters", "steps/s", "validation, bits", "test, bits", "MB a step", "MFLOP", "32 samples, s")
    print(table_head(*head))
    for name, (kind, config) in CASES.items():
        runs = [
            fitted(kind, {**SIZES, **config}, data, BATCH, options.minutes, options.lr, seed)
            for seed in range(options.seeds)
        ]
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
