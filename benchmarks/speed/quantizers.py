"""Time quantizers, forward and backward, against the bare arithmetic and against vector-quantize-pytorch.

    pip install -e ".[dev]"
    python -m benchmarks.speed.quantizers threads=1
    python -m benchmarks.speed.quantizers threads=1 repeats=20 large=0    # without the codebooks of 16,384

First the EMA codebook in training: 3136 vectors of 64 channels (64 images of 7x7), 512 codes. Bare: one matrix product,
argmin, and the sums and counts of an EMA update (index_add, bincount). Then each quantizer that has a counterpart, with
the same number of codes, gradients and losses: first 3136 vectors and 512 codes, then 16,384 vectors (64 images of
16x16) and 16,384 codes of 8 channels. The large case takes 6 to 10 GB and leaves out residual codebooks, for which the
peer would need 25 GB. Times are medians of `repeats` runs (`large` runs of the large case), taken in turn after a
warm-up.

`tests/project/test_peers.py` checks that both give the same results, and lists intended differences.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.support.options import read_options, require_packages, use_threads
from benchmarks.support.tables import table_head
from benchmarks.support.timing import seconds_of
from tokenizer.quantizers import Quantizer

BATCH, SIDE, DIM, CODES = 64, 7, 64, 512
LARGE_SIDE, LARGE_DIM, LARGE_BITS = 16, 8, 14
LEVELS = {9: (8, 8, 8), 14: (8, 8, 8, 6, 5)}  # of FSQ: 512 and 15,360 values
DEPTH = 4  # of residual quantization

Pair = tuple[Any, Any]


def codebooks(codes: int, dim: int) -> dict[str, Pair]:
    """Build pairs of quantizers with a codebook, ours and the peer's."""
    from vector_quantize_pytorch import ResidualVQ, SimVQ, VectorQuantize

    book = {"codes": codes, "dim": dim, "revive_every": 10}
    common = {"dim": dim, "codebook_size": codes, "decay": 0.99, "rotation_trick": False, "accept_image_fmap": True}
    deep_common = {**common, "num_quantizers": DEPTH, "accept_image_fmap": False}  # fails in version 1.32
    learned = {"learnable_codebook": True, "ema_update": False}
    deep = {"kind": "ema", **book}
    return {
        "ema": (Quantizer.create("ema", **book), VectorQuantize(**common)),
        "ema, rotation": (
            Quantizer.create("ema", **book, gradient="rotation"),
            VectorQuantize(**{**common, "rotation_trick": True}),
        ),
        "ema, cosine": (Quantizer.create("ema", **book, normalize=True), VectorQuantize(**common, use_cosine_sim=True)),
        "vq": (Quantizer.create("vq", **book), VectorQuantize(**common, **learned)),
        "simvq": (
            Quantizer.create("simvq", codes=codes, dim=dim),
            SimVQ(dim=dim, codebook_size=codes, rotation_trick=False, channel_first=True),
        ),
        f"rvq, {DEPTH} levels": (Quantizer.create("rvq", depth=DEPTH, book=deep), ResidualVQ(**deep_common)),
    }


def lookup_free(bits: int) -> dict[str, Pair]:
    """Build pairs of quantizers without a codebook. `group` treats all bits as one group, as the peer does."""
    from vector_quantize_pytorch import FSQ, LFQ

    lfq = {"dim": bits, "codebook_size": 2**bits, "commitment_loss_weight": 0.25}
    return {
        f"fsq, {LEVELS[bits]}": (Quantizer.create("fsq", levels=LEVELS[bits]), FSQ(list(LEVELS[bits]))),
        f"lfq, {bits} bits": (Quantizer.create("lfq", bits=bits, group=bits), LFQ(**lfq)),
        f"bsq, {bits} bits": (Quantizer.create("bsq", bits=bits, group=bits), LFQ(**lfq, spherical=True)),
    }


def draw_vectors(dim: int, side: int) -> Any:
    """Draw vectors `(64, dim, side, side)` in channels-last layout, as our encoders return them."""
    return torch.randn(BATCH, dim, side, side).contiguous(memory_format=torch.channels_last)


def prepare_ours(quantizer: Any, z: Any) -> Callable[[], None]:
    """Return a function that runs our quantizer forward and backward."""

    def run() -> None:
        z_q, _, losses = quantizer.quantize(z.detach().requires_grad_())
        total = z_q.sum()
        for name, weight in quantizer.loss_weights.items():
            total = total + weight * losses[name]
        total.backward()

    quantizer.train()
    return run


def prepare_peer(quantizer: Any, z: Any) -> Callable[[], None]:
    """Return a function that runs the peer's quantizer forward and backward. `ResidualVQ` takes rows and returns a loss
    per level; FSQ returns no loss."""
    from vector_quantize_pytorch import FSQ, ResidualVQ

    z = z.flatten(2).transpose(1, 2) if isinstance(quantizer, ResidualVQ) else z

    def run() -> None:
        z_q, *rest = quantizer(z.detach().requires_grad_())
        total = z_q.sum() if isinstance(quantizer, FSQ) else z_q.sum() + rest[-1].sum()
        total.backward()

    quantizer.train()
    return run


def prepare_bare(z: Any) -> Callable[[], None]:
    """Return a function that runs the minimal arithmetic of an EMA codebook."""
    rows, codebook = z.movedim(1, -1).reshape(-1, DIM), torch.randn(CODES, DIM)
    squares = codebook.square().sum(1)

    def run() -> None:
        tokens = torch.addmm(squares, rows, codebook.t(), alpha=-2).argmin(1)
        torch.zeros_like(codebook).index_add_(0, tokens, rows)
        torch.bincount(tokens, minlength=CODES)

    return run


def compare_with_bare(repeats: int) -> None:
    """Print the times of the bare arithmetic and of the EMA codebooks."""
    z = draw_vectors(DIM, SIDE)
    mine, other = codebooks(CODES, DIM)["ema"]
    times = seconds_of([prepare_bare(z), prepare_ours(mine, z), prepare_peer(other, z)], repeats)
    print(f"\n{BATCH * SIDE**2} x {DIM}, {CODES} codes")
    for name, seconds in zip(
        ("bare matmul + argmin + index_add", "smalti ema", "vector-quantize-pytorch"), times, strict=True
    ):
        print(f"{name:34} {seconds * 1e3:8.2f} ms  {seconds / times[0]:6.2f} x bare")


def compare_with_peer(pairs: dict[str, Pair], side: int, repeats: int) -> None:
    """Print a table row per pair. Each pair is timed alone and freed afterwards."""
    for name in list(pairs):
        mine, other = pairs.pop(name)
        z = draw_vectors(mine.dim, side)
        a, b = seconds_of([prepare_ours(mine, z), prepare_peer(other, z)], repeats)
        print(
            f"| {name} | {BATCH * side**2:,} x {mine.dim} | {mine.vocab_size:,} | {a * 1e3:.1f} | {b * 1e3:.1f} | "
            f"{b / a:.1f} |",
            flush=True,
        )


def main() -> None:
    options = read_options(__doc__, {"threads": 1, "repeats": 100, "large": 1})
    require_packages("vector_quantize_pytorch")
    threads = use_threads(options.threads)
    print(
        f"torch {torch.__version__}, vector-quantize-pytorch {version('vector-quantize-pytorch')}, {threads} thread(s)"
    )
    compare_with_bare(options.repeats)
    print("\nforward + backward, ms\n")
    print(table_head("quantizer", "vectors", "codes", "smalti", "vector-quantize-pytorch", "ratio"))
    compare_with_peer({**codebooks(CODES, DIM), **lookup_free(9)}, SIDE, options.repeats)
    if options.large:
        pairs = {**codebooks(2**LARGE_BITS, LARGE_DIM), **lookup_free(LARGE_BITS)}
        compare_with_peer({name: pair for name, pair in pairs.items() if "rvq" not in name}, LARGE_SIDE, options.large)


if __name__ == "__main__":
    main()
