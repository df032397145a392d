"""The EMA quantizer, forward and backward, against the bare arithmetic and against vector-quantize-pytorch.

    pip install -e ".[dev,benchmarks]"
    python benchmarks/quantizers.py threads=1

3136 vectors of 64 channels (64 images of 7x7 positions), 512 codes, in training. Bare: one matrix product, argmin, and
the sums and counts of an EMA update (index_add, bincount). Medians of `repeats` runs, in turn, after a warm-up.
"""

from __future__ import annotations

import os
import sys

from sampling import seconds_of

BATCH, SIDE, DIM, CODES = 64, 7, 64, 512


def main() -> None:
    options = dict(argument.split("=") for argument in sys.argv[1:])
    threads, repeats = int(options.get("threads", 1)), int(options.get("repeats", 200))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch
    import vector_quantize_pytorch

    from tokenizer.quantizers import Quantizer

    torch.set_num_threads(threads)
    ours = Quantizer.create("ema", codes=CODES, dim=DIM, revive_every=10).train()
    theirs = vector_quantize_pytorch.VectorQuantize(
        dim=DIM, codebook_size=CODES, decay=0.99, accept_image_fmap=True, threshold_ema_dead_code=0
    ).train()
    z = torch.randn(BATCH, DIM, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    rows, codebook = z.movedim(1, -1).reshape(-1, DIM), torch.randn(CODES, DIM)
    squares = codebook.square().sum(1)

    def bare() -> None:
        tokens = torch.addmm(squares, rows, codebook.t(), alpha=-2).argmin(1)
        torch.zeros_like(codebook).index_add_(0, tokens, rows)
        torch.bincount(tokens, minlength=CODES)

    def smalti() -> None:
        leaf = z.detach().requires_grad_()
        z_q, _, losses = ours.quantize(leaf)
        (z_q.sum() + losses["commitment"]).backward()

    def peer() -> None:
        leaf = z.detach().requires_grad_()
        z_q, _, loss = theirs(leaf)
        (z_q.sum() + loss.sum()).backward()

    times = seconds_of([bare, smalti, peer], repeats)
    print(f"torch {torch.__version__}, {threads} thread(s), {BATCH * SIDE**2} x {DIM}, {CODES} codes")
    for name, seconds in zip(("bare matmul + argmin + index_add", "smalti ema", "vector-quantize-pytorch"), times,
                             strict=True):  # fmt: skip
        print(f"{name:34} {seconds * 1e3:8.2f} ms  {seconds / times[0]:6.2f} x bare")


if __name__ == "__main__":
    main()
